"""Normalized attention guidance, arXiv:2505.21179."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..guidance import Preset, State
from ..parameters import Range
from ..step import Moment
from .negative import NegativeAttention, NegativePrompt


class NAG(NegativeAttention):
    """Normalized attention guidance: negative prompts without a second pass, arXiv:2505.21179.

    Z = Z+ + scale (Z+ - Z-) per image token, its L1 norm over all features capped at tau times that
    of Z+ (Eq. 7-10, Alg. 1), blended with Z+ by alpha: in every cross-attention to the text, and in
    every joint attention of text and image. `scale` is the paper's phi (the repository's nag_scale
    is 1 + phi); 0 is off. In joint attention the pooled text stays the positive one (as the
    official code has it for SD3; for Flux it takes the negative one there).
    Defaults: phi 2, tau 2.5, alpha 0.5, the paper's Table 5 for SDXL.
    Cost: no further network evaluation; the layers named run once more for the conditional rows,
    which in joint attention is all blocks: as much as one more row.
    Oracle: Eq. 7-10 in an attention processor by hand; networks run on twice the rows.
    """

    name = "nag"
    paper = "arXiv:2505.21179"
    presets = {
        family: Preset({"scale": phi, "tau": 2.5, "alpha": alpha}, "arXiv:2505.21179 Table 5")
        for family, phi, alpha in (
            ("sd15", 2.0, 0.375),
            ("sdxl", 2.0, 0.5),
            ("sd35", 4.0, 0.125),
            ("flux", 4.0, 0.25),
            ("pixart", 4.0, 0.375),
            ("sana", 4.0, 0.375),
            ("wan", 4.0, 0.25),
        )
    }

    def __init__(
        self,
        scale: Annotated[float, Range(0, slider=(0, 10)), "extrapolation phi: 0 is off"] = 2.0,
        tau: Annotated[float, Range(1, slider=(1, 5)), "largest growth of a token's norm"] = 2.5,
        alpha: Annotated[float, Range(0, 1), "share of the guided features"] = 0.5,
        negative_prompt: NegativePrompt = None,
    ) -> None:
        self.scale = scale
        self.tau = tau
        self.alpha = alpha
        self.negative_prompt = negative_prompt

    def acts(self, moment: Moment, state: State) -> bool:
        return self.scale > 0 and self.alpha > 0

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        guided = positive + self.scale * (positive - negative)
        ratio = length(guided) / length(positive).clamp_min(1e-6)
        guided = guided * (self.tau / ratio.clamp_min(1e-6)).clamp_max(1)
        return torch.lerp(positive, guided, self.alpha)


def length(z: Tensor) -> Tensor:
    """L1 norm of each token over all heads and features, [rows, 1, tokens, 1]."""
    return z.abs().sum(dim=(1, 3), keepdim=True)
