"""Perturbed-attention guidance, arXiv:2403.17377, with SoftPAG's strength, arXiv:2506.10978."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from ..engine.layers import Place
from ..guidance import Preset
from ..parameters import Range
from ..step import Moment
from .perturbed import AdditiveScale, PerturbedGuidance


class PAG(PerturbedGuidance):
    """Perturbed-attention guidance: away from identity attention maps, arXiv:2403.17377.

    In the chosen self-attention layers the map becomes the identity, so each token keeps its own
    value; joint attention keeps its text part. Then guided + scale (cond - perturbed), the same in
    every space. `strength` u blends the map, (1 - u) A + u I (SoftPAG); 1 is PAG.
    Scale 3 with CFG, 5 without, layer "mid": the authors' for SD and SDXL; their ADM code's "4" is
    our 3. No layers are published for Flux, Qwen, Wan and DiT (unverified).
    Cost: 1 further evaluation per step.
    """

    name = "pag"
    paper = "arXiv:2403.17377"
    presets = {
        family: Preset({"scale": 3.0, "layers": layers}, source)
        for family, layers, source in (
            ("sd15", "mid", "cvlab-kaist/Perturbed-Attention-Guidance, with CFG 4"),
            ("sd21", "mid", "cvlab-kaist/Perturbed-Attention-Guidance, with CFG 4"),
            ("sdxl", "mid", "cvlab-kaist/Perturbed-Attention-Guidance, with CFG 4"),
            ("sd3", "transformer_blocks.13", "diffusers StableDiffusion3PAGPipeline"),
        )
    }

    def __init__(
        self,
        scale: AdditiveScale = 3.0,
        layers: Annotated[str, "the layers to perturb"] = "mid",
        strength: Annotated[float, Range(0, 1), "share of the identity map"] = 1.0,
    ) -> None:
        self.scale = scale
        self.layers = layers
        self.strength = strength

    def perturb(
        self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor], place: Place
    ) -> Tensor:
        if place.image == q.shape[2]:
            identity = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        else:
            identity = attend(q, k, v, mask=self._image_to_itself(q, place))
        if self.strength == 1:
            return identity
        return torch.lerp(attend(q, k, v), identity, self.strength)

    @staticmethod
    def _image_to_itself(q: Tensor, place: Place) -> Tensor:
        """Additive mask [tokens, tokens]: an image token sees itself and all text."""
        tokens, n = q.shape[2], place.image
        mask = torch.zeros(tokens, tokens, device=q.device, dtype=q.dtype)
        mask[:n, :n] = -torch.inf
        mask[:n, :n].fill_diagonal_(0)
        return mask

    def neutral(self, moment: Moment) -> bool:
        return self.scale == 0 or self.strength == 0
