"""beta-CFG, arXiv:2502.10574: a normalised difference under a Beta curve."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from .. import schedules
from ..guidance import ClassifierFree, Preset, State
from ..parameters import Range
from ..schedules import AnyScale, BetaCurve
from ..step import BOTH, COND, UNCOND, Branch, Moment, Prediction, Step
from ..tensors import TINY, norm

_REPOSITORY = "gmum/beta-CFG, defaults of its command line, 50 DDIM steps"
_STABLE_DIFFUSION = 4 * 64 * 64


class BetaCFG(ClassifierFree):
    """beta-CFG: steps of a fixed length, mostly in the middle of the run, arXiv:2502.10574.

    uncond + w B(p) d (R / ||d||)^gamma on the network's output, per sample: d = cond - uncond, and
    B is the Beta(a, b) density over progress p, zero at both ends: the first and the last step are
    unconditional, and w = 1 is *not* the conditional prediction. `base="cond"` is our variant,
    cond + (w - 1) B(p) d (R / ||d||)^gamma, conditional at both ends.

    Defaults: a = b = 2 and gamma = 1 are the official code's; it uses w = 7.5 (ours: the
    pipeline's). `radius` R is 1 in the paper, which ties w to the size of the latent; None is
    sqrt(elements / 16384), equal to the paper's on SD's 4 x 64 x 64 latents (ours). The velocities
    of flow models are further apart: there that guides hardly at all, and R should be such that
    `report().effective_scale` is about w (ten times as large on `scenes-flow`). The paper's own
    tables are not verified.
    Cost: 2 network evaluations per step; 1 where the curve is 0.
    Oracle: its formula in float64, over a run.
    """

    name = "beta-cfg"
    paper = "arXiv:2502.10574"
    presets = {
        family: Preset({"scale": 7.5, "a": 2.0, "b": 2.0, "gamma": 1.0, "radius": 1.0}, _REPOSITORY)
        for family in ("sd15", "sdxl")
    }
    presets["scenes-flow"] = Preset(
        {"radius": 3.5}, "ours: on average as strong as CFG at w = 4, in 20 steps; at 0.35 hardly"
    )

    def __init__(
        self,
        scale: AnyScale = None,
        a: Annotated[float, Range(1, slider=(1, 5)), "first shape parameter"] = 2.0,
        b: Annotated[float, Range(1, slider=(1, 5)), "second shape parameter"] = 2.0,
        gamma: Annotated[float, Range(0, 2, slider=(0, 1)), "0: no normalisation"] = 1.0,
        radius: Annotated[
            float | None, Range(0, slider=(0.1, 10)), "norm to which the difference is brought"
        ] = None,
        base: Annotated[Literal["uncond", "cond"], "what is left where the curve is 0"] = "uncond",
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.curve = BetaCurve(self.scale, a, b, base)
        self.gamma = gamma
        self.radius = radius
        self.base = base

    def _weight(self, moment: Moment) -> float:
        """The factor of the normalised difference, counted from the base."""
        return self.curve(moment) - (1 if self.base == "cond" else 0)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        if self._weight(moment):
            return BOTH
        return COND if self.base == "cond" else UNCOND

    def guide(self, step: Step, state: State) -> Prediction:
        weight = self._weight(step)
        base = step.cond if self.base == "cond" else step.uncond
        if not weight:
            return base
        d = step.cond.out - step.uncond.out
        if self.gamma:
            elements = d[0].numel()
            radius = self.radius
            if radius is None:
                radius = math.sqrt(elements / _STABLE_DIFFUSION)
            d = d * (radius / norm(d).clamp_min(TINY)) ** self.gamma
        return step.predict(out=base.out + weight * d)
