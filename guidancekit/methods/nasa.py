"""Negative-away steer attention, arXiv:2412.02687."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ..guidance import Preset, State
from ..parameters import Range
from ..step import Moment
from .negative import NegativeAttention, NegativePrompt


class NASA(NegativeAttention):
    """Negative-away steer attention: Z = Z+ - scale Z- in cross-attention, arXiv:2412.02687.

    Eq. 7-9. Negative prompts for one-step and few-step models. It does not keep norms: equal texts
    give (1 - scale) Z+. Default 0.2: the paper's for models based on SD 2.1. No code of the authors
    is public (unverified against one), and how they treat the tokens of Flux's joint blocks is not
    told: refused there.
    Cost: no further network evaluation; cross-attention runs once more.
    Oracle: Eq. 7-9 in an attention processor by hand; networks run on twice the rows.
    """

    name = "nasa"
    paper = "arXiv:2412.02687"
    joint = False
    presets = {
        family: Preset({"scale": scale}, "arXiv:2412.02687, NASA-I, one-step models")
        for family, scale in (("sd15", 0.1), ("sd21", 0.2), ("pixart", 0.5))
    }

    def __init__(
        self,
        scale: Annotated[float, Range(0, slider=(0, 1)), "share subtracted: 0 is off"] = 0.2,
        negative_prompt: NegativePrompt = None,
    ) -> None:
        self.scale = scale
        self.negative_prompt = negative_prompt

    def acts(self, moment: Moment, state: State) -> bool:
        return self.scale > 0

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        return positive - self.scale * negative
