"""BENCHMARKS.md: a section per question and device, replaced when it is measured again."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
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
        "date": datetime.date.today().isoformat(),
        "load": f"{os.getloadavg()[0]:.1f} processes at the end",
        "command": f"`{command}`",
    }
    return table(("", ""), [list(row) for row in rows.items()]).replace("---:", "---")


def write(path: Path, found: Mapping[str, str], titles: Mapping[str, str]) -> None:
    """Put sections, by key such as "cpu overhead", in their places; others stay as they are."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = [_START]
    for key, title in titles.items():
        known = re.search(rf"<!-- {re.escape(key)} -->\n(.*?)\n<!-- / -->", old, re.DOTALL)
        body = found.get(key) or (known[1] if known else MISSING)
        parts.append(f"## {title}\n\n<!-- {key} -->\n{body}\n<!-- / -->\n")
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
