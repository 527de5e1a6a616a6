"""The embedded models: small text-to-image pipelines that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import GuidanceError

MODELS = ("scenes-unet",)


def path(name: str = "scenes-unet") -> Path:
    """The folder of an embedded model, an ordinary Diffusers pipeline folder."""
    if name not in MODELS:
        raise GuidanceError(f"there is no embedded model {name!r}. There are: {', '.join(MODELS)}.")
    return Path(__file__).parent / name


def load(name: str = "scenes-unet", **kwargs: Any) -> Any:
    """Load an embedded model with `DiffusionPipeline.from_pretrained`, which gets `kwargs`."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(path(name)), **kwargs)
