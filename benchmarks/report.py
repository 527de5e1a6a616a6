"""BENCHMARKS.md: a section per question and device, replaced when it is measured again."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

MISSING = "not measured yet"
_START = """# Benchmarks

What guidance costs beyond the network. `make bench` measures the CPU tables of this page again,
`make bench DEVICE=cuda` those of a GPU; either leaves the other's as they are.

Ratios are medians over rounds in which all contestants take turns, ± half the distance between the
quartiles: where 1 lies within that, noise decides. Times in seconds are medians, of one machine,
and only say how large things are.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def refused(error: Exception) -> str:
    """The first sentence of an error, for a cell."""
    text = " ".join(str(error).split()).replace("|", "/")
    return f"refused: {text.partition('. ')[0][:100]}"


def about(doc: str | None) -> str:
    """What a module's docstring says below its first line."""
    return (doc or "").partition("\n")[2].strip()


def circumstances(device: torch.device, command: str) -> str:
    """Hardware, versions, date and command."""
    packages = ("torch", "diffusers", "transformers", "kornia")
    rows = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "graphics": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "Python": f"{platform.python_version()}, {platform.system()}",
        "command": f"`{command}`, the latest",
    }
    return table(("", ""), [list(row) for row in rows.items()]).replace("---:", "---")


def when() -> str:
    """When something was measured, and how busy the machine was."""
    load = os.getloadavg()[0]
    return f"Measured on {datetime.date.today().isoformat()}, {load:.1f} processes at the end."


@dataclass(frozen=True)
class Chapter:
    """A heading, what stands below it, and the tables, by key, with headings of their own or ""."""

    heading: str
    intro: str
    tables: Mapping[str, str]


def write(path: Path, found: Mapping[str, str], chapters: Iterable[Chapter]) -> None:
    """Put tables, by key such as "cpu overhead", in their places; others stay as they are."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = [_START]
    for chapter in chapters:
        parts.append(f"## {chapter.heading}\n")
        parts += [f"{chapter.intro}\n"] if chapter.intro else []
        for key, heading in chapter.tables.items():
            known = re.search(rf"<!-- {re.escape(key)} -->\n(.*?)\n<!-- / -->", old, re.DOTALL)
            body = found.get(key) or (known[1] if known else MISSING)
            parts += [f"### {heading}\n"] if heading else []
            parts.append(f"<!-- {key} -->\n{body}\n<!-- / -->\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
