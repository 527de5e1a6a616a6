"""Functions that judge clean predictions, and the choice of a scale by their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GuidanceError

Scorer = Callable[[Tensor, float, int], Tensor]
"""Scores [n], higher is better, of [n, ...] at a noise fraction and step index."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def score(name: str, scorer: Scorer, x: Tensor, noise_fraction: float, index: int) -> Tensor:
    """The scores [n] of one function, checked, float32."""
    with torch.no_grad():
        scores = scorer(x, noise_fraction, index)
    if not isinstance(scores, Tensor) or scores.shape != x.shape[:1]:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise GuidanceError(
            f"The scorer {name!r} returned {found}, expected a tensor of {x.shape[0]} scores, one "
            "for each of what it was given."
        )
    return scores.to(x.device, torch.float32)


def choose(scores: Tensor, weights: Tensor, candidates: Sequence[float], default: float) -> Tensor:
    """The best of S candidates for each sample, [B], by scores [E, S, B] and weights [E, B].

    Scores are normalised per function and sample. Of equals the nearest to `default` wins; where
    all are equal it is `default`. A candidate with a score that is not finite never wins.
    """
    valid = scores.isfinite().all(0)
    kept = scores.where(valid, torch.nan)
    centred = kept - kept.nanmean(1, keepdim=True)
    spread = (centred**2).nanmean(1, keepdim=True).sqrt()
    total = (weights[:, None] * centred / (spread + 1e-6)).sum(0)
    total = total.where(valid, -torch.inf)
    best = total.amax(0)
    values = torch.tensor(candidates, device=scores.device)
    distance = (values - default).abs()[:, None]
    winner = distance.where((total == best) & valid, torch.inf).argmin(0)
    undecided = (total == best).all(0)  # or nothing is valid
    return values[winner].where(~undecided, default)


def relative_rise(now: Tensor, before: Tensor | None) -> Tensor:
    """The paper's adaptive weights as we read them: the relative rise of mean scores [E, B]."""
    if before is None:
        return torch.ones_like(now)
    return ((now - before) / (before.abs() + 1e-6)).clamp_min(0).nan_to_num(0, posinf=0)


class CLIPScore:
    """How well images fit a prompt: the cosine of their CLIP embeddings. Score decoded images.

    `model` is the folder or Hub id of a CLIPModel, read at the first use. With a list of prompts
    sample i of the batch is held against the i-th.
    """

    def __init__(self, model: str, prompt: str | Sequence[str]) -> None:
        self.model = model
        self.prompt = prompt
        self._loaded: Any = None
        self._text: Tensor | None = None

    def __call__(self, images: Tensor, noise_fraction: float = 0.0, index: int = 0) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise GuidanceError(
                f"CLIPScore found {list(images.shape)}, expected images [n, 3, H, W]: write "
                "FeedbackGuidance(..., decode=True)."
            )
        network = self._network(images)
        size = network.config.vision_config.image_size
        mean, std = (images.new_tensor(c).view(1, 3, 1, 1) for c in (_CLIP_MEAN, _CLIP_STD))
        pixels = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        seen = network.visual_projection(network.vision_model((pixels - mean) / std).pooler_output)
        assert self._text is not None
        if len(self._text) not in (1, len(seen)):
            raise GuidanceError(
                f"CLIPScore holds {len(self._text)} prompts, but {len(seen)} images came: give one "
                "prompt, or one per sample of the batch."
            )
        return F.cosine_similarity(seen, self._text)

    def _network(self, like: Tensor) -> Any:
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPModel

            try:
                network = CLIPModel.from_pretrained(self.model).eval()
                tokenizer = AutoTokenizer.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                raise GuidanceError(f"CLIPScore cannot load {self.model!r}: {error}") from error
            prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
            tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
            text = network.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
            self._text = network.text_projection(text).to(like.device)
            self._loaded = network.to(like.device)
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None, "_text": None}

    def __repr__(self) -> str:
        return f"CLIPScore({self.model!r}, {self.prompt!r})"
