"""The embedded models: small text-to-image pipelines that ship with the package.

Beside each lies a folder of companions: what some methods need beyond the model itself. A companion
is named like ``scenes:weak`` wherever a method takes the name of a file or folder, and the preset
of the model's family names those it needs: ``AutoGuidance.preset("scenes")``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import GuidanceError

FAMILIES = {"scenes-unet": "scenes", "scenes-flow": "scenes-flow"}
"""The embedded models, and what presets and companions call them."""

MODELS = tuple(FAMILIES)

CALL = {"scenes-flow": {"max_sequence_length": 20}}
"""What calls of a model are given besides. The flow model says nothing with the hundreds of tokens
that Stable Diffusion 3's pipeline has for a third text encoder; with few it is much faster.
"""

_FILES = ("weak", "head", "scorer", "annealing.safetensors", "linear-ag.json")
COMPANIONS = {
    f"{family}:{Path(file).stem}": Path(__file__).parent / f"{model}-companions" / file
    for model, family in FAMILIES.items()
    for file in _FILES
}
"""The files and folders of companions, by name."""


def path(name: str = "scenes-unet") -> Path:
    """The folder of an embedded model, an ordinary Diffusers pipeline folder."""
    if name not in MODELS:
        raise GuidanceError(f"there is no embedded model {name!r}. There are: {', '.join(MODELS)}.")
    return Path(__file__).parent / name


def load(name: str = "scenes-unet", **kwargs: Any) -> Any:
    """Load an embedded model with `DiffusionPipeline.from_pretrained`, which gets `kwargs`."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(path(name)), **kwargs)


def locate(source: str) -> str:
    """The path behind the name of a companion, such as ``scenes:weak``; any other text is one."""
    if source in COMPANIONS:
        return str(COMPANIONS[source])
    if source.partition(":")[0] in FAMILIES.values() and not Path(source).exists():
        raise GuidanceError(
            f"there is no companion {source!r}. There are: {', '.join(COMPANIONS)}."
        )
    return source


def family(*models: str) -> str | None:
    """The name under which methods keep presets for all these models; None if there is none."""
    found = {FAMILIES.get(model) for model in models}
    return found.pop() if len(found) == 1 else None
