"""Figures of finished pictures that need no network."""

from __future__ import annotations

import numpy as np
from PIL import Image


def saturation(image: Image.Image) -> float:
    """Mean saturation (the S of HSV) from 0, grey, to 1."""
    return float(np.asarray(image.convert("RGB").convert("HSV"))[..., 1].mean() / 255)


def distance(a: Image.Image, b: Image.Image) -> float:
    """Root mean square difference of two pictures of one size, from 0 to 1 (black to white)."""
    pair = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in (a, b)]
    return float(np.sqrt(np.square(pair[0] - pair[1]).mean()))
