"""What it takes to begin.

Processes of their own, in turns: what Python needs until it has imported something, or has printed
the list of methods; the target is at most a second more than `import torch`. Then attaching to a
pipeline and coming off again, for which the target is a millisecond.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable

import torch

from guidancekit import APG, CFG, PAG, Guidance, SideBySide

from .models import Subject
from .report import table
from .timing import Effort, interleaved

PROCESSES = {
    "import torch": ("-c", "import torch"),
    "import diffusers": ("-c", "import diffusers"),
    "import guidancekit": ("-c", "import guidancekit"),
    "from guidancekit import APG": ("-c", "from guidancekit import APG"),
    "guidancekit methods": ("-m", "guidancekit", "methods"),
}


def section(subject: Subject, effort: Effort) -> str:
    """A row per process, and one per guidance."""
    cpu = torch.device("cpu")
    processes = {name: functools.partial(_run, *given) for name, given in PROCESSES.items()}
    times = interleaved(processes, effort, cpu)
    least = times["import torch"].median
    begun = [
        [f"`{name}`", f"{each.median:.2f}", f"{each.median - least:+.2f}"]
        for name, each in times.items()
    ]
    attachments: dict[str, Callable[[], None]] = {
        repr(guidance): functools.partial(_attach, guidance, subject)
        for guidance in (CFG(), APG(8.0), CFG() + PAG(), SideBySide([CFG(), APG(8.0)]))
    }
    attached = [
        [f"`{name}`", f"{1e6 * each.median:.0f}"]
        for name, each in interleaved(attachments, effort, cpu).items()
    ]
    head = ("process", "seconds", "more than import torch")
    return f"{table(head, begun)}\n\n{table(('guidance', 'on and off, µs'), attached)}"


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def _attach(guidance: Guidance, subject: Subject) -> None:
    with guidance.attach(subject.pipe):
        pass
