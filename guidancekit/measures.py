"""Figures of finished pictures that need no network.

All take pictures as floats from 0 to 1 of shape (..., H, W, 3) and give one value per picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Array = np.ndarray


def pixels(image: Image.Image) -> Array:
    """A picture as floats from 0 to 1, (H, W, 3)."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def saturation(pictures: Array) -> Array:
    """Mean saturation (the S of HSV) from 0, grey, to 1."""
    high, low = pictures.max(-1), pictures.min(-1)
    return np.where(high > 0, (high - low) / np.maximum(high, 1e-6), 0).mean((-2, -1))


def clipping(pictures: Array) -> Array:
    """The share of pixels one of whose channels is at the end of its range."""
    return ((pictures <= 0) | (pictures >= 1)).any(-1).mean((-2, -1))


def luminance(pictures: Array) -> Array:
    """Mean luma (Rec. 601)."""
    return _luma(pictures).mean((-2, -1))


def contrast(pictures: Array) -> Array:
    """Standard deviation of the luma."""
    return _luma(pictures).std((-2, -1))


def colourfulness(pictures: Array) -> Array:
    """Hasler and Suesstrunk's M3 (2003): spread and strength of the opponent colours."""
    red, green, blue = np.moveaxis(pictures, -1, 0)
    opponents = red - green, (red + green) / 2 - blue
    spread = np.sqrt(sum(each.var((-2, -1)) for each in opponents))
    strength = np.sqrt(sum(each.mean((-2, -1)) ** 2 for each in opponents))
    return spread + 0.3 * strength


def sharpness(pictures: Array) -> Array:
    """Variance of the luma's Laplacian."""
    luma = _luma(pictures)
    inner = luma[..., 1:-1, 1:-1]
    around = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
    return (around - 4 * inner).var((-2, -1))


STATISTICS: dict[str, Callable[[Array], Array]] = {
    function.__name__: function
    for function in (saturation, clipping, luminance, contrast, colourfulness, sharpness)
}


def distance(a: Array, b: Array) -> Array:
    """Root mean square difference of pictures of one size, from 0 to 1 (black to white)."""
    return np.sqrt(np.square(a - b).mean((-3, -2, -1)))


def _luma(pictures: Array) -> Array:
    return pictures @ np.array([0.299, 0.587, 0.114], dtype=pictures.dtype)
