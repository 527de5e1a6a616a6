"""Adaptive projected guidance, arXiv:2410.02416 Algorithm 1."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from .. import schedules
from ..guidance import ClassifierFree, Preset, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..step import Prediction, Step
from ..tensors import TINY, norm, parallel

_TABLE = "arXiv:2410.02416 Table 10, quoted second-hand"


class APG(ClassifierFree):
    """Adaptive projected guidance: less saturation at high scales, arXiv:2410.02416 Algorithm 1.

    In x0 space, per sample: d = x0_cond - x0_uncond; reverse momentum d <- d + momentum * d_before;
    cap ||d|| at `norm_threshold`; damp the part of d along x0_cond to `eta`; then
    x0_cond + (w - 1) d. Momentum holds the uncapped sum, and rests where guidance is off.

    Defaults: eta 0 is the paper's. `momentum` None is -0.5, its value for SDXL and DiT.
    `norm_threshold` None is 0.06 sqrt(elements per sample) for unit-variance latents, the common
    per-element radius of the paper's SD rows (our rule, not the paper's); 0 switches the cap off.
    The table is known second-hand (unverified).
    Cost: 2 network evaluations per step; 1 where w = 1.
    Oracle: Algorithm 1 by hand in float64, over several steps.
    """

    name = "apg"
    paper = "arXiv:2410.02416"
    presets = {
        family: Preset(
            {"scale": scale, "eta": 0.0, "norm_threshold": threshold, "momentum": momentum}, _TABLE
        )
        for family, scale, threshold, momentum in (
            ("sdxl", 15.0, 15.0, -0.5),
            ("sd21", 10.0, 7.5, -0.75),
            ("dit", 4.0, 5.0, -0.5),
            ("edm2-s", 4.0, 2.5, -0.75),
        )
    }

    def __init__(
        self,
        scale: AnyScale = None,
        eta: Annotated[float, Range(0, 1), "share kept of the part along x0_cond"] = 0.0,
        norm_threshold: Annotated[
            float | None, Range(0, slider=(0, 30)), "largest norm of the difference; 0: no cap"
        ] = None,
        momentum: Annotated[
            float | None, Range(-0.99, 0.99, slider=(-0.9, 0)), "reverse momentum, usually negative"
        ] = None,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = -0.5 if momentum is None else momentum

    def guide(self, step: Step, state: State) -> Prediction:
        w = scale_at(self.scale, step)
        nothing_to_do = self.eta == 1 and self.norm_threshold == 0 and self.momentum == 0
        if w == 1 or nothing_to_do:
            return step.cfg(w)  # to the last bit
        cond = step.cond.x0
        d = cond - step.uncond.x0
        if self.momentum:
            if step.stage == 0:
                state.before = getattr(state, "sum", torch.zeros_like(d))
            d = torch.add(d, state.before, alpha=self.momentum)
            if step.stage == 0:
                state.sum = d
        d = cap(d, self._threshold(d))
        d = torch.sub(d, parallel(d, onto=cond), alpha=1 - self.eta)
        return step.predict(x0=torch.add(cond, d, alpha=w - 1))

    def _threshold(self, d: Tensor) -> float:
        if self.norm_threshold is None:
            return 0.06 * math.sqrt(d[0].numel())
        return self.norm_threshold


def cap(d: Tensor, threshold: float) -> Tensor:
    """Shrink each sample of `d` to at most `threshold` in norm; 0 leaves it alone."""
    if not threshold:
        return d
    return d * (threshold / norm(d).clamp_min(TINY)).clamp_max(1)
