"""Perturbed-attention guidance, arXiv:2403.17377, with SoftPAG's strength, arXiv:2506.10978."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..engine.layers import Attend, Layer, Place
from ..errors import GuidanceError
from ..guidance import Preset
from ..parameters import Range
from ..step import Moment, Step
from .perturbed import AdditiveScale, PerturbedGuidance


class PAG(PerturbedGuidance):
    """Perturbed-attention guidance: away from identity attention maps, arXiv:2403.17377.

    In the chosen self-attention layers the map becomes the identity, so each token keeps its own
    value, in linear attention (Sana) too; where text and image attend together, an image token sees
    itself and all that is not the image (Diffusers' rule for SD3), and the text's map stays. Then
    guided + scale (cond - perturbed), the same in every space. `strength` u blends the maps,
    (1 - u) A + u I (SoftPAG); 1 is PAG.
    Scale 3 with CFG, 5 without, layer "mid": the authors' for SD and SDXL; their ADM code's "4" is
    our 3. No layers are published for Flux, Qwen, Wan and DiT (unverified).
    Cost: 1 further network evaluation per step.
    Oracle: Diffusers' PAG pipelines of SD and SD3, its processor of Sana; attention by hand in
    other families.
    """

    name = "pag"
    paper = "arXiv:2403.17377"
    presets = {
        family: Preset({"scale": 3.0, "layers": layers}, source)
        for family, layers, source in (
            ("sd15", "mid", "cvlab-kaist/Perturbed-Attention-Guidance, with CFG 4"),
            ("sd21", "mid", "cvlab-kaist/Perturbed-Attention-Guidance, with CFG 4"),
            ("sdxl", "mid", "cvlab-kaist/Perturbed-Attention-Guidance, with CFG 4"),
            ("kolors", "mid", "diffusers KolorsPAGPipeline, its default"),
            ("animatediff", "mid", "diffusers AnimateDiffPAGPipeline, its default"),
            ("sd3", "transformer_blocks.13", "diffusers StableDiffusion3PAGPipeline"),
            ("pixart", "transformer_blocks.14", "diffusers PixArtSigmaPAGPipeline, its example"),
            ("sana", "transformer_blocks.8", "diffusers SanaPAGPipeline, its example"),
            ("hunyuan-dit", "blocks.14", "diffusers HunyuanDiTPAGPipeline, its example"),
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

    def perturb(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, place: Place) -> Tensor:
        copies = q.shape[1] // v.shape[1]  # queries may share their keys and values
        k, v = (each.repeat_interleave(copies, dim=1) for each in (k, v))
        if not place.joint and self.strength == 1:
            return v
        out = attend(q, k, v)
        identity = itself_and_others(q, k, v, attend, place.image) if place.joint else v
        image = out[:, :, place.image]
        blend = torch.lerp(image.float(), identity.float(), self.strength).to(out.dtype)
        return torch.cat([out[:, :, : place.image.start], blend, out[:, :, place.image.stop :]], 2)

    @contextmanager
    def perturbation(self, step: Step) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(step.around(is_linear, self.perturb_linear, layers=self.layers))
            except GuidanceError:  # what other networks have
                stack.enter_context(super().perturbation(step))
            yield

    def perturb_linear(self, layer: Layer, *args: Any, **kwargs: Any) -> Tensor:
        """A layer of linear attention, which makes no map: what it puts out for own values only."""
        attention: Any = layer.module
        values = attention.to_v(layer.arguments(args, kwargs)["hidden_states"])
        identity: Tensor = attention.to_out[1](attention.to_out[0](values))
        if self.strength == 1:
            return identity
        return torch.lerp(layer(*args, **kwargs), identity, self.strength)

    def neutral(self, moment: Moment) -> bool:
        return self.scale == 0 or self.strength == 0


def is_linear(name: str, module: nn.Module) -> bool:
    return type(getattr(module, "processor", None)).__name__ == "SanaLinearAttnProcessor2_0"


def itself_and_others(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, image: slice, chunk: int = 1024
) -> Tensor:
    """Attention of each `image` token to itself and to all tokens that are not the image's.

    q, k and v are [rows, heads, tokens, width]; a map of all tokens by all is never made.
    """
    k, v = k.float(), v.float()
    other_k, other_v = without(k, image, 2), without(v, image, 2)
    mask = None if attend.mask is None else additive(attend.mask, q)
    parts = []
    for start in range(image.start, image.stop, chunk):
        now = slice(start, min(start + chunk, image.stop))
        query = q[:, :, now].float() * attend.scale
        itself = (query * k[:, :, now]).sum(-1, keepdim=True)
        others = query @ other_k.transpose(-1, -2)
        if mask is not None:
            itself = itself + mask[..., now, now].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            others = others + without(mask[..., now, :], image, -1)
        weights = torch.softmax(torch.cat([itself, others], dim=-1), dim=-1)
        parts.append(weights[..., :1] * v[:, :, now] + weights[..., 1:] @ other_v)
    return torch.cat(parts, dim=2)


def without(x: Tensor, tokens: slice, dim: int) -> Tensor:
    """`x` without those tokens along a dimension."""
    before, _, after = x.tensor_split([tokens.start, tokens.stop], dim=dim)
    return torch.cat([before, after], dim=dim)


def additive(mask: Tensor, q: Tensor) -> Tensor:
    """A mask to be added to logits [rows, heads, queries, keys], from one that broadcasts."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return mask.expand(*mask.shape[:-2], q.shape[2], -1)
