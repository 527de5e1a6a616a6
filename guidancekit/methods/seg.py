"""Smoothed energy guidance, arXiv:2408.00760."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from ..engine.layers import Attend, Place
from ..guidance import Preset
from ..parameters import Range
from .perturbed import AdditiveScale, PerturbedGuidance
from .sag import gaussian_blur


class SEG(PerturbedGuidance):
    """Smoothed energy guidance: away from attention with blurred queries, arXiv:2408.00760.

    In the chosen self-attention layers the image's queries are blurred over its grid, frame by
    frame (after norms and rotary embedding, Prop. 3.1); keys, values and text stay. Then guided +
    scale (cond - smoothed). As in the official code the weight is `scale` itself and the
    conditional branch is perturbed; the paper's Eq. 9 and 10 read gamma - 1 and the unconditional
    one.
    `blur_sigma` None is the infinite blur: all queries are their mean. Finite kernels are clipped
    to the grid, so a large sigma is not infinite. Scale 3 fixed, layer "mid": the paper, for SDXL.
    No layers are published for transformers (unverified).
    Cost: 1 further network evaluation per step.
    Oracle: an attention processor by hand; attention by hand in every family.
    """

    name = "seg"
    paper = "arXiv:2408.00760"
    presets = {"sdxl": Preset({"scale": 3.0, "blur_sigma": None}, "arXiv:2408.00760, best FID")}

    def __init__(
        self,
        scale: AdditiveScale = 3.0,
        blur_sigma: Annotated[
            float | None,
            Range(0.01, slider=(0.5, 10)),
            "width of the blur, in tokens; None is infinite",
        ] = None,
        layers: Annotated[str, "the layers to perturb"] = "mid",
    ) -> None:
        self.scale = scale
        self.blur_sigma = blur_sigma
        self.layers = layers

    def perturb(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, place: Place) -> Tensor:
        before, image, after = q.tensor_split([place.image.start, place.image.stop], dim=2)
        # [rows, heads, tokens, width] as [rows, heads, frames, height, width of the grid, width]
        maps = image.float().unflatten(2, (-1, *place.grid[-2:]))
        if self.blur_sigma is None:
            smooth = maps.mean(dim=(3, 4), keepdim=True).expand_as(maps)
        else:
            kernel = math.ceil(6 * self.blur_sigma) + 1 - math.ceil(6 * self.blur_sigma) % 2
            pictures = maps.movedim(-1, 3)
            smooth = gaussian_blur(pictures.flatten(0, 2), self.blur_sigma, kernel)
            smooth = smooth.view(pictures.shape).movedim(3, -1)
        smooth = smooth.flatten(2, 4).to(q.dtype)
        return attend(torch.cat([before, smooth, after], dim=2), k, v)
