"""What a guided run did, counted where it happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepRecord:
    """One solver step: what it cost and what it did."""

    index: int
    nsr: float | None
    time: float = 0.0
    rows: int = 0
    calls: int = 0
    active: bool = False
    scale: Tensor | float = 1.0

    @property
    def effective_scale(self) -> float:
        """Mean over the batch of the projection on cond - uncond; exactly w for CFG."""
        return float(torch.as_tensor(self.scale, dtype=torch.float32).mean())


def brief(times: Sequence[float]) -> list[bool]:
    """Which steps, that begin at these times, are shorter than a tenth of the mean one.

    Some schedules end with such a step (diffusers' flow Euler at a thousandth of the noise, DDIM
    with leading spacing at timestep 0 or 1). Next to nothing is left to guide there, and the scale
    of what a method remembers of earlier steps is huge. Times are the scheduler's, 999 or 1000
    being noise; a run ends at one or the other end.
    """
    if not times or times[0] == times[-1]:
        return [False] * len(times)
    end = -1.0 if times[-1] < times[0] else 1000.0  # they count from 0
    lengths = [abs(now - after) for now, after in pairwise([*times, end])]
    shortest = fmean(lengths) / 10
    return [length < shortest for length in lengths]


@dataclass
class Report:
    """A run of an attached pipeline, step by step.

    `rows` counts network rows: a batch of two images under CFG costs four per step. Scales stay on
    the device until they are read, so that counting does not slow the run down.
    """

    guidance: str
    steps: list[StepRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def rows_per_step(self) -> list[int]:
        return [step.rows for step in self.steps]

    @property
    def rows(self) -> int:
        """Network rows evaluated in the whole run."""
        return sum(self.rows_per_step)

    @property
    def active_steps(self) -> list[int]:
        """Indices of the steps at which the prediction differed from the conditional one."""
        return [step.index for step in self.steps if step.active]

    @property
    def effective_scale(self) -> list[float]:
        return [step.effective_scale for step in self.steps]

    @property
    def brief(self) -> list[bool]:
        """Which steps are so short that their scale says nothing; see `brief`."""
        return brief([step.time for step in self.steps])

    @property
    def mean_scale(self) -> Tensor:
        """The effective scale of the run, [B] or one for all: the mean over steps not `brief`."""
        scales = [
            torch.as_tensor(step.scale, dtype=torch.float32).cpu()
            for step, skipped in zip(self.steps, self.brief, strict=True)
            if not skipped
        ]
        return torch.stack(torch.broadcast_tensors(*scales)).mean(0)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "guidance": self.guidance,
            "rows": self.rows,
            "rows_per_step": self.rows_per_step,
            "active_steps": self.active_steps,
            "effective_scale": self.effective_scale,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.guidance}: {self.rows} network rows in {len(self.steps)} steps, "
            f"{len(self.active_steps)} of them guided",
            "step  sigma/alpha  rows  effective scale",
        ]
        for step in self.steps:
            nsr = "?" if step.nsr is None else f"{step.nsr:.3f}"
            lines.append(
                f"{step.index:4d}  {nsr:>11}  {step.rows:4d}  {step.effective_scale:15.2f}"
            )
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])
