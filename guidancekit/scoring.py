"""Functions that judge clean predictions, and the choice of a scale by their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from . import bundled
from .errors import GuidanceError
from .tensors import on_device
from .uncompiled import uncompiled

Scorer = Callable[[Tensor, float, int], Tensor]
"""Scores [n], higher is better, of [n, ...] at a noise fraction and step index."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def score(name: str, scorer: Scorer, x: Tensor, noise_fraction: float, index: int) -> Tensor:
    """The scores [n] of one function, checked, float32."""
    with torch.no_grad():
        scores = uncompiled(lambda: scorer(x, noise_fraction, index))
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
    values = on_device(candidates, scores)
    distance = (values - default).abs()[:, None]
    winner = distance.where((total == best) & valid, torch.inf).argmin(0)
    undecided = (total == best).all(0)  # or nothing is valid
    return values[winner].where(~undecided, default)


def relative_rise(now: Tensor, before: Tensor | None) -> Tensor:
    """The paper's adaptive weights as we read them: the relative rise of mean scores [E, B]."""
    if before is None:
        return torch.ones_like(now)
    return ((now - before) / (before.abs() + 1e-6)).clamp_min(0).nan_to_num(0, posinf=0)


class LatentScorer(ModelMixin, ConfigMixin):
    """How well clean latents fit a text: attributes are read from both, and compared.

    One small classifier gives the probabilities q of every attribute's values from the latents,
    another those p from the text's embeddings, `prior` are their frequencies. The score is
    sum_attributes log sum_k p_k q_k / prior_k: log p(latents | text) / p(latents), were attributes
    independent. What the text leaves open has p = prior, and adds nothing.

    `values` counts the values of each attribute, `channels` and `text_width` are those of the
    latents and the embeddings. Both classifiers learn by cross-entropy on `logits`. Scoring takes
    no gradients, and about a hundredth of a network evaluation.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, values: Sequence[int], channels: int, text_width: int) -> None:
        super().__init__()
        total = sum(values)
        self.register_buffer("prior", torch.cat([torch.full((n,), 1 / n) for n in values]))
        self.latents = nn.Sequential(
            *(_convolution(channels, 48), _convolution(48, 96, 2)),
            *(_convolution(96, 96), _convolution(96, 128, 2)),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            *(nn.Linear(128 * 16, 160), nn.SiLU(), nn.Linear(160, total)),
        )
        queries = 8  # of an attention over the tokens
        self.queries = nn.Linear(text_width, queries, bias=False)
        self.text = nn.Sequential(
            *(nn.Linear(queries * text_width, 160), nn.SiLU(), nn.Linear(160, total)),
        )

    def logits(
        self, latents: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The logits [n, values] of every attribute, of latents or of text."""
        if latents is not None:
            _check_shape("latents", latents, 4, 1, self.config.channels)
            found = self.latents(latents.float())
        else:
            assert text is not None, "logits(latents=...) or logits(text=...)"
            _check_shape("text embeddings", text, 3, 2, self.config.text_width)
            text = text.float()
            silent = ~text.any(2, keepdim=True)  # zeros, as SD3 has for a missing encoder
            shares = self.queries(text).masked_fill(silent, -1e9).softmax(1)  # over the tokens
            found = self.text((shares.transpose(1, 2) @ text).flatten(1))
        return found.split(list(self.config.values), dim=1)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Scores [n] of latents [n, C, h, w] against text embeddings [n or 1, tokens, width]."""
        seen, asked = self.logits(latents), self.logits(text=text)
        if len(text) not in (1, len(latents)):
            raise GuidanceError(
                f"LatentScorer: found {len(latents)} latents and {len(text)} texts, expected one "
                "text, or one for each."
            )
        priors = self.prior.split(list(self.config.values))
        terms = [
            (q.log_softmax(1) + p.log_softmax(1) - prior.clamp_min(1e-6).log()).logsumexp(1)
            for q, p, prior in zip(seen, asked, priors, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def about(self, conditions: Mapping[str, Tensor]) -> Scorer:
        """The function that scores latents against what a network is conditioned on."""
        text = conditions.get("encoder_hidden_states")
        if text is None:
            raise GuidanceError(
                "LatentScorer reads text embeddings, but this network is conditioned on "
                f"{', '.join(conditions) or 'nothing'}."
            )

        def scored(latents: Tensor, noise_fraction: float = 0.0, index: int = 0) -> Tensor:
            scores: Tensor = self(latents, text)
            return scores

        return scored

    @classmethod
    def load(cls, source: str) -> LatentScorer:
        """The scorer saved in a folder, or the companion of that name, in float32."""
        folder = bundled.locate(source)
        if not Path(folder).is_dir():
            raise GuidanceError(
                f"found {source!r}, which is no folder of a saved LatentScorer: expected one, or "
                "functions by name (FeedbackGuidance), or a function that returns logits (GFCG)."
            )
        try:
            scorer: LatentScorer = uncompiled(
                lambda: cls.from_pretrained(folder, use_safetensors=True).float()
            )
        except Exception as error:  # of several libraries
            raise GuidanceError(f"LatentScorer.load({source!r}): {error}") from error
        return scorer.eval().requires_grad_(False)


def _convolution(inward: int, outward: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, stride, 1), nn.GroupNorm(8, outward), nn.SiLU()
    )


def _check_shape(what: str, tensor: Tensor, ndim: int, axis: int, expected: int) -> None:
    if tensor.ndim != ndim or tensor.shape[axis] != expected:
        raise GuidanceError(
            f"LatentScorer: found {what} {list(tensor.shape)}, expected {ndim} dimensions with "
            f"{expected} features: it was made for another model."
        )


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
        seen, text = self.embeddings(images), self._embedded_prompt(images)
        if len(text) not in (1, len(seen)):
            raise GuidanceError(
                f"CLIPScore holds {len(text)} prompts, but {len(seen)} images came: give one "
                "prompt, or one per sample of the batch."
            )
        return F.cosine_similarity(seen, text)

    def about(self, prompt: str | Sequence[str]) -> CLIPScore:
        """The same network, held against another prompt."""
        other = CLIPScore(self.model, prompt)
        other._loaded = self.load()._loaded
        return other

    def load(self) -> CLIPScore:
        """Read the network now; raises `GuidanceError` where there is none."""
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPModel

            try:
                network = uncompiled(lambda: CLIPModel.from_pretrained(self.model).eval())
                self._loaded = network, AutoTokenizer.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                raise GuidanceError(f"CLIPScore cannot load {self.model!r}: {error}") from error
        return self

    def embeddings(self, images: Tensor) -> Tensor:
        """CLIP's of images [n, 3, H, W] from 0 to 1, [n, d]."""
        network = self.load()._loaded[0].to(images.device)
        size = network.config.vision_config.image_size
        mean, std = (on_device(c, images).view(1, 3, 1, 1) for c in (_CLIP_MEAN, _CLIP_STD))
        pixels = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        seen = network.vision_model((pixels - mean) / std).pooler_output
        embedded: Tensor = network.visual_projection(seen)
        return embedded

    def _embedded_prompt(self, like: Tensor) -> Tensor:
        """Those of the prompts, [prompts, d], where `like` is."""
        if self._text is None:
            network, tokenizer = self.load()._loaded
            network.to(like.device)
            prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
            tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
            tokens = tokens.to(like.device)
            text = network.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
            self._text = network.text_projection(text)
        return self._text

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None, "_text": None}

    def __repr__(self) -> str:
        return f"CLIPScore({self.model!r}, {self.prompt!r})"
