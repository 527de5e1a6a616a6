"""Smoothed energy guidance, arXiv:2408.00760."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from ..engine.layers import Place
from ..guidance import Preset
from ..parameters import Range
from .perturbed import AdditiveScale, PerturbedGuidance
from .sag import gaussian_blur


class SEG(PerturbedGuidance):
    """Smoothed energy guidance: away from attention with blurred queries, arXiv:2408.00760.

    In the chosen self-attention layers the queries are blurred over the token grid (after norms and
    rotary embedding, Prop. 3.1); keys and values stay. Then guided + scale (cond - smoothed). As in
    the official code the weight is `scale` itself and the conditional branch is perturbed; the
    paper's Eq. 9 and 10 read gamma - 1 and the unconditional one.
    `blur_sigma` None is the infinite blur: all queries are their mean. Finite kernels are clipped
    to the grid, so a large sigma is not infinite. Scale 3 fixed, layer "mid": the paper, for SDXL.
    No layers are published for transformers (unverified). Cost: 1 further evaluation per step.
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

    def perturb(
        self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor], place: Place
    ) -> Tensor:
        image, text = q[:, :, : place.image], q[:, :, place.image :]
        if self.blur_sigma is None:
            smooth = image.mean(dim=2, keepdim=True).expand_as(image)
        else:
            kernel = math.ceil(6 * self.blur_sigma) + 1 - math.ceil(6 * self.blur_sigma) % 2
            # [rows, heads, tokens, width] as [rows, heads * width, height, width of the grid]
            maps = image.transpose(2, 3).flatten(1, 2).unflatten(-1, place.grid)
            smooth = gaussian_blur(maps, self.blur_sigma, kernel)
            smooth = smooth.flatten(2).unflatten(1, (q.shape[1], -1)).transpose(2, 3)
        return attend(torch.cat([smooth, text], dim=2), k, v)
