"""The embedded models: small text-to-image pipelines that ship with the package.

Beside each lies a folder of companions: what some methods need beyond the model itself. A companion
is named like ``scenes:weak`` wherever a method takes the name of a file or folder, and the preset
of the model's family names those it needs: ``AutoGuidance.preset("scenes")``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import GuidanceError

MODELS = ("scenes-unet",)
FAMILIES = {"scenes-unet": "scenes"}  # what presets call a model

CALL = {"scenes-flow": {"max_sequence_length": 20}}
"""What calls of a model are given besides. The flow model says nothing with the hundreds of tokens
that Stable Diffusion 3's pipeline has for a third text encoder; with few it is much faster.
"""

_SCENES = Path(__file__).parent / "scenes-unet-companions"
COMPANIONS = {
    "scenes:weak": _SCENES / "weak",
    "scenes:head": _SCENES / "head",
    "scenes:scorer": _SCENES / "scorer",
    "scenes:annealing": _SCENES / "annealing.safetensors",
    "scenes:linear-ag": _SCENES / "linear-ag.json",
}


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
