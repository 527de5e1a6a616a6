"""What a guidance does to the prediction over a run, for plots and explanations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .step import Prediction, Step
from .tensors import TINY, dot, norm


@dataclass(frozen=True)
class TracePoint:
    """One solver step; means over the batch. NaN where the step did not use both branches.

    `difference` is the root mean square of cond - uncond in x0 space; `cosine` is that of the angle
    between it and the guided prediction's way from uncond: 1 for CFG, less for a rule that leaves
    the direction, NaN for one that acts after the scheduler's step. How far along the guided
    prediction lies is in the `Report`.
    """

    index: int
    noise: float
    """sigma / alpha at the start of the step."""
    difference: float
    cosine: float


class Trace:
    """Watches a run: ``with APG(12).attach(pipe, watch=trace): ...``, then read `points`."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, float, Tensor]] = []

    def __call__(self, step: Step, guided: Prediction) -> None:
        """Note a step; figures stay on the device, so that watching does not slow the run down."""
        if step.stage != 0:
            return
        noise = step.nsr if step.grid else float("nan")
        figures = torch.full((2,), float("nan"), device=guided.out.device)
        if {"cond", "uncond"} <= step.evaluated.keys():
            difference = step.cond.x0 - step.uncond.x0
            update = guided.x0 - step.uncond.x0
            lengths = norm(update) * norm(difference)
            cosine = (dot(update, difference) / lengths).where(lengths > TINY, torch.nan)
            figures = torch.stack([difference.square().mean().sqrt(), cosine.nanmean()])
        self._steps.append((step.index, noise, figures))

    @property
    def points(self) -> list[TracePoint]:
        """The steps so far, read from the device at once."""
        read = torch.stack([figures for *_, figures in self._steps]).tolist() if self._steps else []
        return [
            TracePoint(index, noise, *figures)
            for (index, noise, _), figures in zip(self._steps, read, strict=True)
        ]
