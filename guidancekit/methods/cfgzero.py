"""CFG-Zero*, arXiv:2503.18886: an optimised unconditional velocity, and none at the start."""

from __future__ import annotations

from typing import Annotated

import torch

from .. import schedules
from ..guidance import ClassifierFree, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..step import Branch, Moment, Prediction, Step
from ..tensors import dot


class CFGZeroStar(ClassifierFree):
    """CFG-Zero*: least-squares scaling of the unconditional velocity, arXiv:2503.18886.

    In velocity space, per sample: k = <v_cond, v_uncond> / (||v_uncond||^2 + 1e-8), then
    k v_uncond + w (v_cond - k v_uncond). In the first `zero_init` steps the velocity is zero: the
    latent of a flow model stays where it is. Made for flow models; for others the same is done to
    the variance-preserving velocity, whose zero only shrinks the latent a little (our extension).

    Defaults: w is the pipeline's. `zero_init` None is 4 % of the steps, rounded: the advice of the
    authors' repository, which counts inclusively (its 1 is our 2, and 4 % of 50 steps). The authors
    mean both parts to be used together. Nothing was published per model family, so no presets.
    Cost: 2 network evaluations per step; 1 where w = 1; 0 in the steps of `zero_init`.
    Oracle: its formula in float64, and a loop by hand on SD3.
    """

    name = "cfg-zero*"
    paper = "arXiv:2503.18886"

    def __init__(
        self,
        scale: AnyScale = None,
        zero_init: Annotated[
            int | None, Range(0, slider=(0, 5)), "first steps without motion; None: 4 % of them"
        ] = None,
        optimize: Annotated[bool, "scale the unconditional velocity by least squares"] = True,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.zero_init = zero_init
        self.optimize = optimize

    def _at_rest(self, moment: Moment) -> bool:
        count = round(0.04 * moment.total) if self.zero_init is None else self.zero_init
        return moment.index < count

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return () if self._at_rest(moment) else super().needs(moment, state)

    def guide(self, step: Step, state: State) -> Prediction:
        if self._at_rest(step):
            return step.predict(v=torch.zeros_like(step.x))
        w = scale_at(self.scale, step)
        if w == 1 or not self.optimize:
            return step.cfg(w)
        cond, uncond = step.cond.v, step.uncond.v
        uncond = uncond * (dot(cond, uncond) / (dot(uncond, uncond) + 1e-8))
        return step.predict(v=torch.lerp(uncond, cond, w))
