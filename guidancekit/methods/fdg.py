"""Frequency-decoupled guidance, arXiv:2506.19713 Algorithms 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import schedules
from ..errors import GuidanceError
from ..guidance import Guidance, Preset, State
from ..parameters import Range
from ..schedules import Schedule, scale_at
from ..step import BOTH, COND, Branch, Moment, Prediction, Step
from ..tensors import on_device, parallel

_FID = "arXiv:2506.19713 Table 8 (a), best FID"
_QUALITY = "arXiv:2506.19713 Table 8 (b), quality at low CFG"


class FDG(Guidance):
    """Frequency-decoupled guidance: one scale per spatial frequency band, arXiv:2506.19713 Alg. 1.

    The difference cond - uncond is split by a Laplacian pyramid; low frequencies (layout, colour)
    are guided less than high ones (detail). Linear, hence the same in every space, unless
    `parallel_weights` damps the part of each band along the conditional one (x0 space, Alg. 2).

    Defaults: None for `scale_high` is the pipeline's guidance_scale; None for `scale_low` is half
    of `scale_high`, at least 1: the paper's ratio for SDXL. Two levels are the paper's setting;
    scales of further levels are interpolated (ours). Works on any grid of at least 3 x 3, frame by
    frame on video.
    Cost: 2 network evaluations per step; 1 where both scales are 1.
    Oracle: the paper's two pyramids by hand, pixel by pixel in float64.
    """

    name = "fdg"
    paper = "arXiv:2506.19713"
    presets = {
        family: Preset({"scale_low": low, "scale_high": high}, source)
        for family, low, high, source in (
            ("sd21", 3.0, 7.0, _FID),
            ("sdxl", 5.0, 10.0, _FID),
            ("sd3", 3.0, 7.0, _FID),
            ("dit", 1.0, 2.0, _FID),
            ("edm2-s", 1.0, 3.0, _FID),
            ("sd21-quality", 3.0, 12.0, _QUALITY),
            ("sdxl-quality", 3.0, 12.0, _QUALITY),
            ("sd3-quality", 1.5, 12.0, _QUALITY),
        )
    }

    def __init__(
        self,
        scale_low: Annotated[
            float | Schedule | None, Range(0, slider=(1, 10)), "scale of the lowest frequencies"
        ] = None,
        scale_high: Annotated[
            float | Schedule | None, Range(0, slider=(1, 15)), "scale of the highest frequencies"
        ] = None,
        levels: Annotated[int, Range(1, 8), "number of frequency bands"] = 2,
        parallel_weights: Annotated[
            Sequence[float] | None, Range(0, 1), "per band from high to low: share kept along cond"
        ] = None,
    ) -> None:
        if parallel_weights is not None and len(parallel_weights) != levels:
            raise GuidanceError(
                f"FDG(parallel_weights=...): found {len(parallel_weights)} weights, expected one "
                f"for each of the {levels} levels, from high to low frequency."
            )
        self.scale_low = schedules.from_config(scale_low)
        self.scale_high = schedules.from_config(scale_high)
        self.levels = levels
        self.parallel_weights = parallel_weights

    def scales(self, moment: Moment) -> list[float]:
        """One scale per band, from high to low frequency."""
        high = scale_at(self.scale_high, moment)
        low = max(high / 2, 1.0) if self.scale_low is None else scale_at(self.scale_low, moment)
        if self.levels == 1:
            return [high]
        return [high + (low - high) * i / (self.levels - 1) for i in range(self.levels)]

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return BOTH if any(w != 1 for w in self.scales(moment)) else COND

    def guide(self, step: Step, state: State) -> Prediction:
        scales = self.scales(step)
        if self.needs(step, state) == COND:
            return step.cond
        if self.parallel_weights is None:
            cond, uncond = step.cond.out, step.uncond.out
            return step.predict(out=cond + self._update(cond - uncond, scales))
        cond, uncond = step.cond.x0, step.uncond.x0
        return step.predict(x0=cond + self._update(cond - uncond, scales, onto=cond))

    def _update(self, d: Tensor, scales: list[float], onto: Tensor | None = None) -> Tensor:
        factors = [w - 1 for w in scales]
        if onto is None or self.parallel_weights is None:
            return rescaled(images(d), factors).reshape(d.shape)
        bands = zip(*(pyramid(images(x), self.levels) for x in (d, onto)), strict=True)
        kept = [
            factor * torch.sub(band, parallel(band, onto=along), alpha=1 - weight)
            for factor, weight, (band, along) in zip(
                factors, self.parallel_weights, bands, strict=True
            )
        ]
        return collapse(kept).reshape(d.shape)


def images(x: Tensor) -> Tensor:
    """[B, C, H, W] or [B, C, T, H, W] as [B, channels, H, W]: bands are spatial only."""
    if x.ndim < 4:
        raise GuidanceError(
            f"FDG needs latents on a spatial grid [B, C, H, W], found shape {list(x.shape)}."
        )
    return x.flatten(1, -3)


def smaller(x: Tensor, levels: int) -> list[Tensor]:
    """[B, C, H, W], at half its size, at a quarter, ..."""
    sizes = [x]
    for _ in range(levels - 1):
        if min(sizes[-1].shape[-2:]) < 3:
            raise GuidanceError(
                f"FDG(levels={levels}) is too deep for this latent: a band would be smaller than "
                "3 x 3. Use fewer levels."
            )
        sizes.append(down(sizes[-1]))
    return sizes


def pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Laplacian pyramid of [B, C, H, W], from high to low frequency; exact for any size >= 3."""
    sizes = smaller(x, levels)
    return [*(fine - up(coarse, fine.shape[-2:]) for fine, coarse in pairwise(sizes)), sizes[-1]]


def collapse(bands: list[Tensor]) -> Tensor:
    """Undo `pyramid`."""
    x = bands[-1]
    for band in reversed(bands[:-1]):
        x = up(x, band.shape[-2:]).add_(band)
    return x


def rescaled(x: Tensor, factors: list[float]) -> Tensor:
    """`collapse` of the bands of `x`, each times its factor; being linear, it needs no bands."""
    sizes = smaller(x, len(factors))
    result = factors[-1] * sizes[-1]
    for factor, (fine, coarse) in reversed([*zip(factors, pairwise(sizes), strict=False)]):
        result = up(result.sub_(coarse, alpha=factor), fine.shape[-2:]).add_(fine, alpha=factor)
    return result


def down(x: Tensor) -> Tensor:
    """Blur, then bilinear resize to half the size (rounded down)."""
    size = [side // 2 for side in x.shape[-2:]]
    return F.interpolate(blur(x), size, mode="bilinear", align_corners=False)


def up(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize to `size`, then blur."""
    return blur(F.interpolate(x, list(size), mode="bilinear", align_corners=False))


def blur(x: Tensor) -> Tensor:
    """The binomial 5 x 5 kernel [1, 4, 6, 4, 1] / 16, per channel, with reflected borders."""
    row = on_device((1, 4, 6, 4, 1), x) / 16
    kernel = torch.outer(row, row).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])
