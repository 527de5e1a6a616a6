"""Perp-Neg, arXiv:2304.04968: negative prompts that leave the positive one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from .. import schedules
from ..errors import GuidanceError
from ..guidance import ClassifierFree, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..step import BOTH, UNCOND, Branch, Moment, Prediction, Step
from ..tensors import parallel


class PerpNeg(ClassifierFree):
    """Perp-Neg: only what is perpendicular to the prompt is subtracted, arXiv:2304.04968.

    With d = cond - uncond and d_j = negative_j - uncond, per sample over all dimensions:
    uncond + w (d - sum_j weight_j (d_j - <d_j, d> d / ||d||^2)). Only differences enter, so the
    space does not matter. The negatives are the same for every sample; the pipeline's own negative
    prompt stays empty. Where w = 1 the negatives still act; where w = 0 nothing but uncond does.

    Defaults: weight 1.5, the paper's for one negative; a weight below 0 adds instead. The scale is
    the pipeline's. Without negatives it is CFG.
    Cost: 2 + len(`negatives`) network evaluations per step.
    Oracle: a loop by hand in float64.
    """

    name = "perp-neg"
    paper = "arXiv:2304.04968"

    def __init__(
        self,
        negatives: Annotated[Sequence[str], "prompts to steer away from"] = (),
        weights: Annotated[Sequence[float] | None, Range(), "of each; None: all 1.5"] = None,
        scale: AnyScale = None,
    ) -> None:
        negatives = [negatives] if isinstance(negatives, str) else list(negatives)
        if not all(isinstance(negative, str) for negative in negatives):
            raise GuidanceError(f"PerpNeg(negatives=...): found {negatives!r:.80}, expected texts.")
        if weights is not None and len(weights) != len(negatives):
            raise GuidanceError(
                f"PerpNeg(weights=...): found {len(weights)} weights for {len(negatives)} "
                "negatives, expected one for each."
            )
        self.negatives = negatives
        self.weights = [1.5] * len(negatives) if weights is None else weights
        self.scale = schedules.from_config(scale)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        if not self.negatives:
            return super().needs(moment, state)
        return BOTH if scale_at(self.scale, moment) else UNCOND

    def guide(self, step: Step, state: State) -> Prediction:
        w = scale_at(self.scale, step)
        if not self.negatives or w == 0:
            return step.cfg(w)
        uncond = step.uncond.out
        total = d = step.cond.out - uncond
        given = step.conditions("cond")
        for negative, weight in zip(self.negatives, self.weights, strict=True):
            conditions = {
                name: encoded.expand(given[name].shape[0], *encoded.shape[1:])
                for name, encoded in step.encode(negative).items()
                if name in given
            }
            difference = step.evaluate("cond", conditions=conditions).out - uncond
            total = total - weight * (difference - parallel(difference, onto=d))
        return step.predict(out=uncond + w * total)
