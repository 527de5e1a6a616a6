"""Skip-layer guidance of Stable Diffusion 3.5, and the residual skip of STG, arXiv:2411.18664."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any

from torch import nn

from ..engine.layers import Layer, streams_of
from ..guidance import Preset
from ..parameters import Range
from ..step import Moment, Step
from .perturbed import AdditiveScale, PerturbedGuidance


class SLG(PerturbedGuidance):
    """Skip-layer guidance: away from a network without some blocks; STG is arXiv:2411.18664.

    guided + scale (cond - skipped), only while start N < i < end N: strict on both sides, so that
    step 0 is never guided. Whole transformer blocks are bypassed, image and text unchanged.
    Scale 2.5 and the window 0.01 to 0.2 are Stable Diffusion 3.5 Medium's (official code, together
    with CFG 4). For SD3.5 Large no layers are published.
    Cost: 1 further network evaluation per step inside the window.
    Oracle: Diffusers' skip_guidance_layers of SD3; networks without the block in every family.
    """

    name = "slg"
    paper = "arXiv:2411.18664"
    presets = {
        "sd35": Preset(
            {
                "scale": 2.5,
                "layers": "transformer_blocks.7, transformer_blocks.8, transformer_blocks.9",
            },
            "Stability-AI/sd3.5, Medium only, with CFG 4",
        )
    }

    def __init__(
        self,
        scale: AdditiveScale = 2.5,
        layers: Annotated[str, "the blocks to skip"] = "mid",
        start: Annotated[float, Range(0, 1), "guide after this share of the steps"] = 0.01,
        end: Annotated[float, Range(0, 1), "guide before this share of the steps"] = 0.2,
    ) -> None:
        self.scale = scale
        self.layers = layers
        self.start = start
        self.end = end

    @property
    def scheduled(self) -> bool:
        return self.scale != 0

    def neutral(self, moment: Moment) -> bool:
        inside = self.start * moment.total < moment.index < self.end * moment.total
        return self.scale == 0 or not inside

    def perturbation(self, step: Step) -> AbstractContextManager[None]:
        return step.around(is_block, bypass, layers=self.layers)


def is_block(name: str, module: nn.Module) -> bool:
    return bool(streams_of(module))


def bypass(layer: Layer, *args: Any, **kwargs: Any) -> Any:
    """A transformer block that changes nothing."""
    given = layer.arguments(args, kwargs)
    kept = tuple(given[name] for name in streams_of(layer.module))
    return kept if len(kept) > 1 else kept[0]
