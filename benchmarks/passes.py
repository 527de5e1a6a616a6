"""Further passes in one batch with the branches (`attach(joined=True)`), or one after the other.

The rows are the same; joined, the network is called less often on larger batches, for more memory
at once. Peak memory is what tensors occupy beyond the model's own at the worst moment of a step:
PyTorch's own count on a GPU, its profiler's on a CPU. Pipelines that call their network once per
branch (Flux, Wan) have no batch to join: there both are the same.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from guidancekit import CFG, ICG, PAG, SEG, SLG, TSG, Guidance, GuidanceError

from .models import Subject
from .report import refused, table
from .timing import Effort, interleaved


def methods(few: bool) -> dict[str, Guidance]:
    pag, icg, tsg = PAG(layers="mid"), ICG(3.0), TSG(low=0.0)
    found = {"CFG + PAG": CFG() + pag, "ICG": icg, "CFG + TSG": CFG() + tsg}
    return found | (
        {}
        if few
        else {
            "CFG + SEG": CFG() + SEG(layers="mid"),
            "CFG + SLG": CFG() + SLG(layers="mid", start=0.0, end=1.0),
            "CFG + ICG": CFG() + icg,
            "TSG": tsg,
        }
    )


def section(subjects: list[Subject], steps: int, effort: Effort) -> str:
    """A table per subject."""
    return "\n\n".join(_table(each, steps, effort) for each in subjects)


def _table(subject: Subject, steps: int, effort: Effort) -> str:
    lines = []
    for name, guidance in methods(subject.heavy).items():
        calls = {
            joined: functools.partial(_draw, subject, guidance, joined == "joined", steps)
            for joined in ("joined", "apart")
        }
        try:
            times = interleaved(calls, effort, subject.device)
        except GuidanceError as error:
            lines.append([name, refused(error), "", ""])
            continue
        peaks = [f"{peak(call, subject.device) / 2**20:.1f}" for call in calls.values()]
        lines.append([name, str(times["joined"].over(times["apart"])), *peaks])
    head = ("method", "time, joined / apart", "peak joined, MiB", "peak apart, MiB")
    return f"{subject.name}:\n\n{table(head, lines)}"


def _draw(subject: Subject, guidance: Guidance, joined: bool, steps: int) -> None:
    with guidance.attach(subject.pipe, joined=joined):
        subject.draw(steps)


def peak(call: functools.partial[None], device: torch.device) -> float:
    """The most bytes that tensors occupied at once during a call, beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return float(most)
