"""Feedback guidance (FBG), arXiv:2506.06085: a scale from a running posterior of the condition."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from ..guidance import Guidance, Preset, State
from ..parameters import Range
from ..step import Moment, Prediction, Step
from ..tensors import dot

_SOURCE = "arXiv:2506.06085 and FelixKoulischer/FBG_using_edm2"


class FBG(Guidance):
    """Feedback guidance: guide while the state does not yet fit the condition, arXiv:2506.06085.

    Per sample, in x0 and EDM coordinates (alpha = 1): L estimates log p(c|x), and starts at 0.
    The scale is w = e^L / (e^L - (1 - pi)): 1/pi at first, `maximum` at L's lower bound, nearly 1
    at its upper bound 3. After a step from sigma to sigma', with r = (sigma'/sigma)^2, s2 =
    sigma'^2 (1 - r) and mu = r x + (1 - r) x0,
    L <- L - tau / (2 s2) (||x' - mu_c||^2 - ||x' - mu_u||^2) + offset: L rises where the
    conditional prediction fits better, whatever sampler moved x. (The printed algorithm has the
    other sign on tau; the official code has this one.) The offset, negative, alone brings w to 3 at
    the noise fraction `t0`; tau is such that at `t1` a difference of 10 makes up for it.

    Defaults: Stable Diffusion 2's as for the pictures shown, offset off below a noise fraction of
    0.3; `maximum` 10 is the official sampler's (its command line says 2). `base_scale` w_b adds
    w_b - 1 (the paper's hybrid: 1.5). Where s2 is read between two steps is our reading. Only part
    of the paper was checked.
    Cost: 2 network evaluations per step.
    Oracle: its loop by hand in float64, on an exact Gaussian mixture.
    """

    name = "fbg"
    paper = "arXiv:2506.06085"
    presets = {
        "sd21": Preset({"pi": 0.85, "t0": 0.75, "t1": 0.5}, f"{_SOURCE}: SD2, pictures shown"),
        "sd21-fid": Preset(
            {"pi": 0.9, "t0": 0.55, "t1": 0.4, "offset_until": 0.0}, f"{_SOURCE}: SD2, best FID"
        ),
        "sd21-dino": Preset(
            {"pi": 0.9, "t0": 0.65, "t1": 0.45, "offset_until": 0.0},
            f"{_SOURCE}: SD2, best FD-DINOv2",
        ),
        "edm2-xs": Preset(
            {"pi": 0.999, "t0": 0.556, "t1": 0.429, "offset_until": 0.0},
            f"{_SOURCE}: EDM2-XS, best FD-DINOv2, stochastic sampler",
        ),
    }

    def __init__(
        self,
        pi: Annotated[
            float,
            Range(0.34, 0.99999, slider=(0.5, 0.999)),
            "trust in the condition; w starts 1/pi",
        ] = 0.85,
        t0: Annotated[
            float, Range(0, 0.99), "noise fraction where the offset reaches w = 3"
        ] = 0.75,
        t1: Annotated[float, Range(0, 1), "noise fraction that calibrates the feedback"] = 0.5,
        maximum: Annotated[float, Range(1.01, 1000, slider=(2, 20)), "largest scale"] = 10.0,
        offset_until: Annotated[float, Range(0, 1), "no offset below this noise fraction"] = 0.3,
        base_scale: Annotated[float, Range(0, slider=(1, 5)), "CFG added as a base; 1: none"] = 1.0,
    ) -> None:
        self.pi = pi
        self.t0 = t0
        self.t1 = t1
        self.maximum = maximum
        self.offset_until = offset_until
        self.base_scale = base_scale

    def offset(self, total: int) -> float:
        """What is added to L in each of `total` steps."""
        return math.log((1 - self.pi) * 1.5) / ((1 - self.t0) * total)

    def tau(self, moment: Moment) -> float:
        """The weight of the feedback, from the grid of the run."""
        variances = [variance(*pair) for pair in pairwise(moment.grid)]
        place = min((1 - self.t1) * moment.total, moment.total - 1)
        i = math.floor(place)
        at = variances[i] + (place - i) * (variances[min(i + 1, moment.total - 1)] - variances[i])
        return abs(2 * at * self.offset(moment.total) / 10)

    def weight(self, posterior: Tensor) -> Tensor:
        """w of L, without the base."""
        return 1 / (1 - (1 - self.pi) * (-posterior).exp())

    def guide(self, step: Step, state: State) -> Prediction:
        if not hasattr(state, "posterior"):
            state.posterior = torch.zeros_like(dot(step.x, step.x))
        elif step.stage == 0:
            state.posterior = self._updated(step, state)
        if step.stage == 0:
            state.before = step
        state.w = w = self.weight(state.posterior) + self.base_scale - 1
        cond, uncond = step.cond.out, step.uncond.out
        return step.predict(out=uncond + w * (cond - uncond))

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> Tensor:
        """w, even where the two predictions no longer differ."""
        scale: Tensor = state.w.flatten()
        return scale

    def _updated(self, step: Step, state: State) -> Tensor:
        """L after the step from `state.before` to this one."""
        before: Step = state.before
        posterior: Tensor = state.posterior
        s2 = variance(before.level.nsr, step.level.nsr)
        if s2 == 0:
            return posterior
        ratio = (step.level.nsr / before.level.nsr) ** 2
        kept = step.level.nsr**2 * before.alpha / before.sigma**2  # r / alpha, finite at alpha = 0
        new = step.x / step.alpha - kept * before.x
        cond, uncond = ((1 - ratio) * p.x0 for p in (before.cond, before.uncond))
        worse = dot(uncond - cond, 2 * new - cond - uncond)  # ||. - cond||^2 - ||. - uncond||^2
        posterior = posterior - self.tau(step) / (2 * s2) * worse
        if 1 - before.index / step.total >= self.offset_until:
            posterior = posterior + self.offset(step.total)
        lowest = math.log((1 - self.pi) * self.maximum / (self.maximum - 1))
        return posterior.clamp(lowest, 3.0)


def variance(now: float, after: float) -> float:
    """The variance of a stochastic step between two noise levels; 0 where none is left."""
    return after**2 * (1 - (after / now) ** 2) if 0 < after < now else 0.0
