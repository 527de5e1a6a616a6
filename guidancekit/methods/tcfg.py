"""Tangential damping CFG, arXiv:2503.18137."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schedules
from ..guidance import ClassifierFree, State
from ..schedules import AnyScale, scale_at
from ..step import Prediction, Step
from ..tensors import dot, parallel


class TCFG(ClassifierFree):
    """TCFG: keep what the unconditional prediction shares with the conditional, arXiv:2503.18137.

    v is the dominant right singular vector of the two predictions stacked, per sample; the
    unconditional one is projected onto it, u' = <u, v> v, and then u' + w (c - u') as in CFG. The
    singular vector comes in closed form, from the angle that diagonalises a 2 x 2 matrix.

    Space: the network's own output. That is noise in the paper's formula (epsilon models); for flow
    and v models it follows Diffusers' guider (third party). No parameter but the scale, whose
    default is the pipeline's: the paper reports gains at each model's usual one (only part of the
    paper is verified).
    Cost: 2 network evaluations per step; 1 where w = 1.
    Oracle: PyTorch's singular value decomposition, in a formula in float64 and a loop by hand on
    SD3.
    """

    name = "tcfg"
    paper = "arXiv:2503.18137"

    def __init__(self, scale: AnyScale = None) -> None:
        self.scale = schedules.from_config(scale)

    def guide(self, step: Step, state: State) -> Prediction:
        w = scale_at(self.scale, step)
        if w == 1:
            return step.cond
        cond, uncond = step.cond.out, step.uncond.out
        shared = parallel(uncond, onto=dominant(cond, uncond))
        return step.predict(out=torch.lerp(shared, cond, w))


def dominant(a: Tensor, b: Tensor) -> Tensor:
    """The direction, of any length, along which `a` and `b` together are largest.

    In the basis of their mean and half difference the Gram matrix stays well conditioned in float32
    even when the two are nearly parallel, as predictions are.
    """
    mean, half = (a + b) / 2, (a - b) / 2
    angle = torch.atan2(2 * dot(mean, half), dot(mean, mean) - dot(half, half)) / 2
    return angle.cos() * mean + angle.sin() * half
