"""Normalized attention guidance, arXiv:2505.21179: negative prompts inside cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..engine.layers import Intercept, unseen
from ..errors import GuidanceError
from ..guidance import Guidance, Preset, State
from ..parameters import Range
from ..step import COND, Branch, Moment, Prediction, Step

NegativePrompt = Annotated[
    str | None, "what to steer away from; None: the pipeline's negative prompt, or an empty one"
]


class NegativeAttention(Guidance):
    """Cross-attention run once more with a negative prompt's keys and values, and combined.

    The queries of the conditional rows are doubled inside each text cross-attention; everything
    else runs as it is, so there is no further network evaluation. Networks whose text and image
    share one attention (SD3, Flux) are refused. Subclasses say in `combine` what is made of both.
    """

    negative_prompt: str | None

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Attention outputs [rows, heads, tokens, width] under both texts, float32, to one."""
        raise NotImplementedError

    def guide(self, step: Step, state: State) -> Prediction:
        return step.cond

    @contextmanager
    def during(self, step: Step, state: State) -> Iterator[None]:
        if not self.acts(step, state):
            yield
            return
        negative, calls = self._negative(step), 0

        def wrapper(
            forward: Callable[..., Any],
            hidden: Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            nonlocal calls
            count = hidden.shape[0]
            rows = step.rows("cond", count)
            if rows.stop == rows.start:
                return forward(hidden, encoder_hidden_states, attention_mask, **kwargs)

            def tap(q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
                out = attend(q, k, v)
                if intercept.calls == 1:  # the text; image adapters attend after it
                    both = out[rows].float(), out[count:].float()
                    out = out.clone()
                    out[rows] = self.combine(*both).to(out.dtype)
                return out

            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask[rows]])
            texts = append(encoder_hidden_states, negative, rows)
            with Intercept(tap) as intercept:
                out = forward(torch.cat([hidden, hidden[rows]]), texts, attention_mask, **kwargs)
            calls += intercept.calls
            return out[:count]

        def matches(name: str, module: nn.Module) -> bool:
            return isinstance(module, Attention) and module.is_cross_attention

        with step.around(matches, wrapper):
            yield
        if not calls:
            raise GuidanceError(unseen("the network"))

    def _negative(self, step: Step) -> Tensor:
        """Text embeddings [1 or B, tokens, width] of what to steer away from."""
        if self.negative_prompt is not None:
            return step.encode(self.negative_prompt)["encoder_hidden_states"]
        try:
            return step.conditions("uncond")["encoder_hidden_states"]
        except GuidanceError:
            return step.encode("")["encoder_hidden_states"]


class NAG(NegativeAttention):
    """Normalized attention guidance: negative prompts without a second pass, arXiv:2505.21179.

    Z = Z+ + scale (Z+ - Z-) per image token, its L1 norm over all features capped at tau times that
    of Z+ (Eq. 7-10, Alg. 1), blended with Z+ by alpha, in every text cross-attention. `scale` is
    the paper's phi (the repository's nag_scale is 1 + phi); 0 is off.
    Defaults: phi 2, tau 2.5, alpha 0.5, the paper's Table 5 for SDXL.
    Cost: no further network evaluation; one more row inside cross-attention.
    """

    name = "nag"
    paper = "arXiv:2505.21179"
    presets = {
        family: Preset({"scale": 2.0, "tau": 2.5, "alpha": alpha}, "arXiv:2505.21179 Table 5")
        for family, alpha in (("sdxl", 0.5), ("sd15", 0.375))
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


def append(text: Any, negative: Tensor, rows: slice) -> Any:
    """The text embeddings with the negative's as further rows; image adapters' repeat their own."""
    if isinstance(text, tuple):
        first, images = text
        return append(first, negative, rows), [torch.cat([each, each[rows]]) for each in images]
    more = negative.to(text).expand(rows.stop - rows.start, *negative.shape[1:])
    if more.shape[1] != text.shape[1]:
        raise GuidanceError(
            f"The negative prompt has {more.shape[1]} tokens and the prompt {text.shape[1]}: they "
            "share a batch, so encode both to the same length."
        )
    return torch.cat([text, more])
