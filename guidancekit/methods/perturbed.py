"""What PAG, SEG and SLG share: away from the prediction of a perturbed network."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated

import torch
from torch import Tensor

from ..engine.layers import Attend, Place
from ..guidance import Guidance, State
from ..parameters import Range
from ..step import COND, Branch, Moment, Prediction, Step

AdditiveScale = Annotated[
    float, Range(0, slider=(0, 10)), "weight of the added difference: 0 is off"
]


class PerturbedGuidance(Guidance):
    """cond + scale (cond - perturbed), both at the same x_t and condition: free of the space.

    Subclasses name the `layers` and say in `perturb` what happens to their attention.
    """

    joins = True
    scale: float
    layers: str

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def neutral(self, moment: Moment) -> bool:
        """Whether this step is not guided, so that nothing further need be evaluated."""
        return self.scale == 0

    def acts(self, moment: Moment, state: State) -> bool:
        return not self.neutral(moment)

    def guide(self, step: Step, state: State) -> Prediction:
        if self.neutral(step):
            return step.cond
        perturbed = step.evaluate("cond", within=self.perturbation(step))
        return step.predict(out=torch.lerp(perturbed.out, step.cond.out, 1 + self.scale))

    def perturbation(self, step: Step) -> AbstractContextManager[None]:
        """The context in which the network is perturbed."""
        return step.attention(self.layers, self.perturb)

    def perturb(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, place: Place) -> Tensor:
        """The attention of a chosen layer, [rows, heads, tokens, width]."""
        raise NotImplementedError
