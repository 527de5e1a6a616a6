"""Figures of sets of pictures, with their uncertainty: functions of arrays, without any model.

A set answers a number of captions, several pictures each. A figure is a function of the captions
that are kept, given as a mask, and its standard error comes from leaving out one caption at a time
(`figure`): it says what would change if somebody asked other questions. Figures of two sets that
answer the same captions are compared caption by caption (`Figure.__sub__`), which is much sharper
than their errors side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

Array = np.ndarray
Metric = Callable[[Array], float]
"""A figure of the captions that a mask (captions,) keeps."""

NEIGHBOURS = 5  # of precision and recall; 3 in arXiv:1904.06991, with far more pictures


@dataclass(frozen=True)
class Figure:
    """A value, and the values without each of the captions."""

    value: float
    without: Array = field(repr=False)

    @property
    def error(self) -> float:
        """The jackknife's standard error; NaN for fewer than two captions."""
        count = len(self.without)
        if count < 2:
            return float("nan")
        return float(np.sqrt((count - 1) * np.square(self.without - self.without.mean()).mean()))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.value - 1.96 * self.error, self.value + 1.96 * self.error

    def __sub__(self, other: Figure) -> Figure:
        """The difference over the same captions."""
        return Figure(self.value - other.value, self.without - other.without)


def figure(metric: Metric, captions: int) -> Figure:
    """The value over all captions, and without each."""
    kept = np.ones((captions, captions), bool)
    np.fill_diagonal(kept, False)
    whole = float(metric(np.ones(captions, bool)))
    return Figure(whole, np.array([metric(mask) for mask in kept] if captions > 1 else []))


def mean(values: Array, number: Array) -> Metric:
    """The mean of `values` (n,) where they are not NaN; `number` (n,) are the captions'."""

    def metric(kept: Array) -> float:
        chosen = values[kept[number]]
        known = chosen[~np.isnan(chosen)]
        return float(known.mean()) if len(known) else float("nan")

    return metric


def diversity(factors: Mapping[str, Array], sizes: Mapping[str, int], number: Array) -> Metric:
    """How often two pictures of a caption differ in what it leaves free, against the truth.

    For a factor of K values that are equally likely two pictures differ with probability 1 - 1/K;
    the share of pairs that do, over that, is 1 for the true distribution, whatever the number of
    pictures, and 0 where all are alike (Simpson's index, unbiased). Averaged over the factors of a
    caption, then over captions. `factors` hold values (n,), -1 where there is none.
    """
    captions = int(number.max()) + 1
    each: list[list[float]] = [[] for _ in range(captions)]
    for name, values in factors.items():
        for caption in range(captions):
            counts = _counts(values[number == caption], sizes[name])
            total = counts.sum()
            if total > 1:
                alike = (counts * (counts - 1)).sum() / (total * (total - 1))
                each[caption].append((1 - alike) / (1 - 1 / sizes[name]))
    means = np.array([np.mean(values) if values else np.nan for values in each])
    return mean(means, np.arange(captions))


def total_variation(
    factors: Mapping[str, Array], sizes: Mapping[str, int], number: Array
) -> Metric:
    """Distance of the free factors from uniform over all captions together: preferences.

    Half the summed absolute difference of the shares, from 0 to 1 - 1/K, averaged over the factors;
    those of both objects count as one. A model that prefers one colour shows it here even if the
    pictures of a caption differ. Chance alone makes it larger than 0: compare with true pictures.
    """
    return _of_shares(
        lambda shares: 0.5 * np.abs(shares - 1 / len(shares)).sum(), factors, sizes, number
    )


def entropy(factors: Mapping[str, Array], sizes: Mapping[str, int], number: Array) -> Metric:
    """Entropy of the free factors over all captions together, as a share of the uniform one's.

    From 0, always the same value, to 1; averaged over the factors as `total_variation` is. Chance
    alone makes it smaller than 1: compare with true pictures.
    """
    return _of_shares(
        lambda shares: -(shares * np.log(np.where(shares, shares, 1))).sum() / np.log(len(shares)),
        factors,
        sizes,
        number,
    )


def _of_shares(
    measure: Callable[[Array], float],
    factors: Mapping[str, Array],
    sizes: Mapping[str, int],
    number: Array,
) -> Metric:
    """The mean over the factors of what is measured of their values' shares, all captions' (K,)."""
    captions = int(number.max()) + 1
    counts: dict[str, Array] = {}
    for name, values in factors.items():
        table = [_counts(values[number == c], sizes[name]) for c in range(captions)]
        counts[kind(name)] = counts.get(kind(name), 0) + np.stack(table)

    def metric(kept: Array) -> float:
        totals = [table[kept].sum(0) for table in counts.values()]
        found = [measure(total / total.sum()) for total in totals if total.sum()]
        return float(np.mean(found)) if found else float("nan")

    return metric


def kind(factor: str) -> str:
    """What a factor is whichever of the two objects has it: "shape" of "shape 0" and "shape 1"."""
    return factor.rstrip(" 01")


def _counts(values: Array, size: int) -> Array:
    return np.bincount(values[values >= 0], minlength=size)


def frechet(features: Array, number: Array, true: Array, true_number: Array) -> Metric:
    """Frechet distance of Gaussians with the moments of both sets' features, (n, d) and (m, d).

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), arXiv:1706.08500 Eq. 6, of the captions
    that are kept on both sides. Few pictures bias it upwards: compare sets of one size.
    """
    features, true = features.astype(np.float64), true.astype(np.float64)

    def metric(kept: Array) -> float:
        a, b = features[kept[number]], true[kept[true_number]]
        first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        values, vectors = np.linalg.eigh(first)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
        shift = np.square(a.mean(0) - b.mean(0)).sum()
        return float(shift + np.trace(first) + np.trace(second) - 2 * cross)

    return metric


def precision_recall(
    features: Array, number: Array, true: Array, true_number: Array
) -> tuple[Metric, Metric]:
    """Precision and recall by nearest neighbours, arXiv:1904.06991.

    Precision: the share of pictures that lie within the neighbourhood of a true one. Recall: the
    share of true ones within the neighbourhood of a picture. A neighbourhood reaches to the
    `NEIGHBOURS`-th neighbour in its own set.
    """
    ours, theirs = (torch.from_numpy(each).double() for each in (features, true))
    across = torch.cdist(ours, theirs)
    inside = {"ours": torch.cdist(ours, ours), "theirs": torch.cdist(theirs, theirs)}

    def reach(which: str, chosen: torch.Tensor) -> torch.Tensor:
        own = inside[which][chosen][:, chosen]
        return own.kthvalue(min(NEIGHBOURS + 1, len(own)), dim=1).values  # itself is the nearest

    def masks(kept: Array) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(kept[number]), torch.from_numpy(kept[true_number])

    def precision(kept: Array) -> float:
        a, b = masks(kept)
        return float((reach("theirs", b) >= across[a][:, b]).any(1).double().mean())

    def recall(kept: Array) -> float:
        a, b = masks(kept)
        return float((reach("ours", a) >= across[a][:, b].T).any(1).double().mean())

    return precision, recall


def pixel_diversity(pictures: Array, number: Array) -> Metric:
    """Root mean square distance of two pictures of one caption, from 0 to 1; needs no model."""
    flat = pictures.reshape(len(pictures), -1)
    scale = 255 * np.sqrt(flat.shape[1])
    return _of_pairs(flat, number, lambda x: float(torch.pdist(x).mean()) / scale)


def cosine_diversity(features: Array, number: Array) -> Metric:
    """1 - cosine of the features (n, d) of two pictures of one caption."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    # of unit vectors half the squared distance
    return _of_pairs(unit, number, lambda x: float(torch.pdist(x).square().mean()) / 2)


def _of_pairs(values: Array, number: Array, measure: Callable[[torch.Tensor], float]) -> Metric:
    """The mean over captions of what is measured of their pictures' values, float32 (n, d)."""
    captions = int(number.max()) + 1
    means = np.full(captions, np.nan)
    for caption in range(captions):
        own = values[number == caption]
        if len(own) > 1:
            means[caption] = measure(torch.from_numpy(own).float())
    return mean(means, np.arange(captions))
