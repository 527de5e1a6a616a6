"""What ICG, TSG and AutoGuidance share: away from a weaker prediction of the same thing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance import Guidance, State
from ..schedules import Scale, scale_at
from ..step import COND, Branch, Moment, Prediction, Step


class WeakBranch(Guidance):
    """weak + w (cond - weak), both at the same x_t: free of the space; w = 1 is no guidance.

    Subclasses evaluate the weaker prediction in `weak`, and say in `check` where they cannot. No
    unconditional pass is needed.
    """

    scale: Scale

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def acts(self, moment: Moment, state: State) -> bool:
        return scale_at(self.scale, moment) != 1

    def before_step(self, step: Step, state: State) -> Tensor:
        if step.index == step.stage == 0 and (self.scheduled or self.acts(step, state)):
            self.check(step)
        return step.x

    def check(self, step: Step) -> None:
        """Raise `GuidanceError`, before anything is evaluated, where there is no weaker one."""

    def guide(self, step: Step, state: State) -> Prediction:
        if not self.acts(step, state):
            return step.cond
        w = scale_at(self.scale, step)
        weak, cond = self.weak(step, state).out, step.cond.out
        return step.predict(out=torch.lerp(weak, cond, w))

    def weak(self, step: Step, state: State) -> Prediction:
        """The weaker prediction, of the network's own kind."""
        raise NotImplementedError
