"""Whether the methods that promise fewer evaluations are faster by that much.

Whole runs, in turns with plain CFG: the measured time over CFG's beside the network rows over
CFG's. "Off by" is how much longer than its rows a run takes, (time / rows) - 1: at most 3 % on a
GPU and 5 % on a CPU is the target. Far below zero, small batches are faster per row.
"""

from __future__ import annotations

import functools

from guidancekit import CFG, AdaptiveGuidance, Guidance, Interval, LinearAG, PerStep

from .models import Subject
from .report import table
from .timing import Effort, interleaved


def methods(steps: int, bundled: bool) -> dict[str, Guidance]:
    """CFG, and what promises to be cheaper; LinearAG has tables for the embedded model alone."""
    half = steps // 2
    found: dict[str, Guidance] = {
        "CFG": CFG(),
        "scale 1": CFG(1.0),
        "interval": CFG(Interval(None, low=0.5, high=3.0)),
        "cut-off after half of the steps": CFG(PerStep([4.0] * half + [1.0] * (steps - half))),
        "adaptive": AdaptiveGuidance(threshold=0.99),
    }
    return found | ({"LinearAG": LinearAG.preset("scenes")} if bundled else {})


def section(subject: Subject, steps: int, effort: Effort, bundled: bool = True) -> str:
    """A row per method."""
    each = methods(steps, bundled)
    rows: dict[str, int] = {}

    def draw(name: str) -> None:
        with each[name].attach(subject.pipe) as guidance:
            subject.draw(steps)
            rows[name] = guidance.report().rows

    calls = {name: functools.partial(draw, name) for name in each}
    times = interleaved(calls, effort, subject.device)
    lines = []
    for name in each:
        promised, found = rows[name] / rows["CFG"], times[name].over(times["CFG"])
        off = f"{100 * (found.median / promised - 1):+.1f} %"
        lines.append([name, str(rows[name]), f"{promised:.3f}", str(found), off])
    head = ("method", "rows", "rows / CFG's", "time / CFG's", "off by")
    return f"{subject.name}, {steps} steps:\n\n{table(head, lines)}"
