"""From samples to figures: everything that is known of the pictures of an arm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..loading import load_pipeline
from ..measures import STATISTICS, distance
from ..recipe import Recipe
from ..scoring import CLIPScore
from . import metrics
from .experiment import Questions, Sample
from .metrics import Array, Figure, Metric, figure, mean
from .scenes import RENDERS, TRUTH_SEED, Judge, truth

NEAR = 16  # true pictures per caption for precision and recall, whose cost grows with the square

WORDS = {
    "adherence": "everything that the caption names is right",
    "diversity": "how much the pictures of a caption differ in what it leaves free; 1 is the truth",
    "total_variation": "preferences among what is free, all captions together; 0 is the truth",
    "entropy": "of what is free, all captions together, as a share of the uniform one's",
    "precision": "pictures that lie among true ones",
    "recall": "true pictures that lie among those drawn",
    "frechet": "Frechet distance to true pictures of the same captions, recogniser's features",
    "colour_error": "distance of objects and backgrounds from the palette's colours, 0 to 1",
    "pixel_diversity": "root mean square distance of two pictures of a caption, 0 to 1",
    "saturation": "mean HSV saturation",
    "clipping": "pixels at the end of their range",
    "luminance": "mean luma",
    "contrast": "standard deviation of the luma",
    "colourfulness": "spread and strength of the opponent colours",
    "sharpness": "variance of the luma's Laplacian",
    "latent_std": "standard deviation of the last predicted clean latent",
    "latent_mean": "its drift: root mean square of its channels' means",
    "effective_scale": "how far along cond - uncond, averaged over the steps",
    "clip_score": "cosine of the CLIP embeddings of picture and prompt",
    "clip_diversity": "1 - that of two pictures of a prompt",
    "reconstruction": "root mean square distance of inverted pictures from what comes back, 0 to 1",
    "negative_shown": "pictures that show what the negative prompt names",
}
"""The figures, and what they are; besides, "colour right" and the like (adherence of an attribute),
"diversity colour" and "entropy colour" and the like (of one factor)."""


@dataclass(frozen=True)
class Measured:
    """The figures of an arm, by name, what it did per step, and what it cost per picture.

    `steps` as in `Sample`.
    """

    figures: dict[str, Figure]
    steps: Array
    rows: float
    seconds: float
    memory: float


@dataclass
class Laboratory:
    """Measures samples that answer `questions`; of the scenes world if there is a `judge`.

    `clip` holds pictures against their prompts where there is one; it runs on `device`.
    """

    questions: Questions
    judge: Judge | None = None
    clip: CLIPScore | None = None
    device: str = "cpu"

    @property
    def captions(self) -> int:
        return len(self.questions.prompts)

    def measure(self, sample: Sample) -> Measured:
        """Every figure that can be had."""
        pictures, number = sample.pictures.astype(np.float32) / 255, sample.number
        found: dict[str, Metric] = {}
        if self.judge is not None:
            found |= self._seen(self.judge, sample.pictures, number)
        if self.clip is not None:
            scores, embeddings = self._by_clip(self.clip, pictures, number)
            found["clip_score"] = mean(scores, number)
            found["clip_diversity"] = metrics.cosine_diversity(embeddings, number)
        if sample.originals is not None:
            originals = sample.originals.astype(np.float32) / 255
            found["reconstruction"] = mean(distance(pictures, originals), number)
        for name, statistic in STATISTICS.items():
            found[name] = mean(statistic(pictures), number)
        found["pixel_diversity"] = metrics.pixel_diversity(sample.pictures, number)
        found["latent_std"] = mean(sample.latent_std, number)
        found["latent_mean"] = mean(sample.latent_mean, number)
        found["effective_scale"] = mean(sample.effective_scale, number)
        figures = {name: figure(metric, self.captions) for name, metric in found.items()}
        known = {name: each for name, each in figures.items() if not np.isnan(each.value)}
        return Measured(known, sample.steps, sample.rows, sample.seconds, sample.memory)

    def _seen(self, judge: Judge, pictures: Array, number: Array) -> dict[str, Metric]:
        """What a recogniser sees, against the truth."""
        prompts = [self.questions.prompts[i] for i in number]
        seen = judge.look(pictures, prompts)
        sizes = {name: len(words) for name, words in judge.vocabularies.items()}
        near = self._near
        close, true_number = self._truth.features[near], self._truth.number[near]
        precision, recall = metrics.precision_recall(seen.features, number, close, true_number)
        true = self._truth
        found = {
            "adherence": mean(seen.marks["all"], number),
            "diversity": metrics.diversity(seen.factors, sizes, number),
            "total_variation": metrics.total_variation(seen.factors, sizes, number),
            "entropy": metrics.entropy(seen.factors, sizes, number),
            "precision": precision,
            "recall": recall,
            "frechet": metrics.frechet(seen.features, number, true.features, true.number),
            "colour_error": mean(seen.colour_error, number),
        }
        for name, marks in seen.marks.items():
            if name != "all":
                found[f"{name} right"] = mean(marks, number)
        for kind in dict.fromkeys(map(metrics.kind, seen.factors)):
            own = {name: each for name, each in seen.factors.items() if metrics.kind(name) == kind}
            found[f"diversity {kind}"] = metrics.diversity(own, sizes, number)
            found[f"entropy {kind}"] = metrics.entropy(own, sizes, number)
        if self.questions.negative:
            unwanted = [self.questions.negative] * len(pictures)
            shown = judge.look(pictures, unwanted).marks["all"]
            found["negative_shown"] = mean(shown, number)
        return found

    def _by_clip(self, clip: CLIPScore, pictures: Array, number: Array) -> tuple[Array, Array]:
        """Scores (n,) and embeddings (n, d) of pictures."""
        scores, embeddings = [], []
        for at in range(0, len(pictures), 32):
            part = slice(at, at + 32)
            images = torch.from_numpy(pictures[part]).permute(0, 3, 1, 2).to(self.device)
            held = clip.about([self.questions.prompts[caption] for caption in number[part]])
            with torch.no_grad():
                scores.append(held(images).cpu().numpy())
                embeddings.append(clip.embeddings(images).cpu().numpy())
        return np.concatenate(scores), np.concatenate(embeddings)

    @cached_property
    def _truth(self) -> _Truth:
        assert self.judge is not None
        pictures, number = self._renders(RENDERS, TRUTH_SEED)
        prompts = [self.questions.prompts[i] for i in number]
        return _Truth(self.judge.look(pictures, prompts).features, number)

    def _renders(self, count: int, seed: int) -> tuple[Array, Array]:
        """True pictures, `count` per caption, and the captions' numbers."""
        assert self.judge is not None
        parts = [
            truth(prompt, count, (seed, number))
            for number, prompt in enumerate(self.questions.prompts)
        ]
        return np.concatenate(parts), np.repeat(np.arange(self.captions), count)

    @cached_property
    def _near(self) -> Array:
        return np.arange(len(self._truth.number)) % RENDERS < NEAR

    def truth(self) -> Measured:
        """What the true distribution scores with as many pictures: no arm can be better."""
        return self.measure(self._true_sample)

    def decoded_truth(self, model: str) -> Measured:
        """The same through the autoencoder of an embedded model: what it leaves within reach."""
        sample = self._true_sample
        vae = load_pipeline(Recipe(prompt="-", model=model), "cpu").vae
        x = torch.from_numpy(sample.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            parts = [vae.decode(vae.encode(part).latents).sample for part in x.split(64)]
        y = (torch.cat(parts).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
        return self.measure(replace(sample, pictures=(y * 255).round().byte().numpy()))

    @cached_property
    def _true_sample(self) -> Sample:
        pictures, number = self._renders(self.questions.seeds, TRUTH_SEED + 1)
        unknown = np.full(len(number), np.nan)
        steps = np.empty((0, 4))
        return Sample(
            pictures, number, unknown, unknown, unknown, steps, float("nan"), 0.0, float("nan")
        )


class _Truth(NamedTuple):
    """Features of true pictures, `RENDERS` per caption."""

    features: Array
    number: Array
