"""What a guided run did, counted where it happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepRecord:
    """One solver step: what it cost and what it did."""

    index: int
    nsr: float | None
    rows: int = 0
    calls: int = 0
    active: bool = False
    scale: Tensor | float = 1.0

    @property
    def effective_scale(self) -> float:
        """Mean over the batch of the projection on cond - uncond; exactly w for CFG."""
        return float(torch.as_tensor(self.scale, dtype=torch.float32).mean())


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
