"""A recipe: all that made a picture, carried inside its PNG, and read back with suspicion."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .errors import GuidanceError
from .files import written_whole

CHUNK = "guidancekit"  # the keyword of the PNG text chunk
MAX_CHUNK = 65_536  # characters; a recipe takes about one thousand
MAX_PROMPT = 8_000  # characters
MAX_STEPS = 1_000  # the noise levels that nearly all models are trained on
MAX_SIDE = 16_384  # pixels
MAX_SEED = 2**63 - 1
DTYPES = ("float32", "float16", "bfloat16")
PACKAGES = ("diffusers", "torch", "transformers")


@dataclass(frozen=True)
class Recipe:
    """What a run needs to make one picture again.

    `guidance` is the text of a strategy, such as ``APG(scale=12.0)``. `guidance_scale` is what the
    pipeline is called with; `scheduler` is a name of `guidancekit.loading.SCHEDULERS`; `size` is
    (width, height) in pixels. Where these are None the model's own default holds.
    Raises `GuidanceError` for a value of the wrong type or out of range.
    """

    prompt: str
    model: str
    negative: str = ""
    guidance: str = "CFG()"
    guidance_scale: float | None = None
    steps: int = 30
    seed: int = 0
    scheduler: str | None = None
    size: tuple[int, int] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        for name in ("prompt", "model", "negative", "guidance", "device"):
            _check_text(name, getattr(self, name), empty=name == "negative")
        if self.scheduler is not None:
            _check_text("scheduler", self.scheduler)
        if self.dtype not in DTYPES:
            _refuse("dtype", self.dtype, "one of " + ", ".join(DTYPES))
        _check_whole("steps", self.steps, 1, MAX_STEPS)
        _check_whole("seed", self.seed, 0, MAX_SEED)
        if self.guidance_scale is not None and not _is_finite(self.guidance_scale):
            _refuse("guidance_scale", self.guidance_scale, "a finite number")
        if self.size is not None:
            if not isinstance(self.size, tuple) or len(self.size) != 2:
                _refuse("size", self.size, "[width, height]")
            _check_whole("width", self.size[0], 8, MAX_SIDE)
            _check_whole("height", self.size[1], 8, MAX_SIDE)
        if not isinstance(self.versions, dict) or not all(
            isinstance(item, str) for pair in self.versions.items() for item in pair
        ):
            _refuse("versions", self.versions, "package names with their versions")

    def to_json(self) -> str:
        """One line of JSON in ASCII."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Undo `to_json`; raises `GuidanceError` unless `text` is exactly a recipe."""
        if len(text) > MAX_CHUNK:
            _refuse("recipe", f"{len(text)} characters", f"at most {MAX_CHUNK}")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GuidanceError(f"the recipe is not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise GuidanceError(
                f"the recipe is a JSON {type(values).__name__}, expected an object."
            )
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise GuidanceError(
                f"the recipe has unknown entries {_short(unknown)}: "
                "was it written by a newer guidancekit?"
            )
        if missing := sorted({"prompt", "model"} - set(values)):
            raise GuidanceError(f"the recipe lacks {missing}.")
        return cls(**values)


def installed_versions() -> dict[str, str]:
    """The versions of the packages that decide about pixels."""
    return {"guidancekit": __version__, **{package: version(package) for package in PACKAGES}}


def save_picture(image: Image.Image, recipe: Recipe, path: Path) -> None:
    """Write `image` as a PNG that carries `recipe`; the file appears whole or not at all."""
    chunks = PngInfo()
    chunks.add_text(CHUNK, recipe.to_json())
    with written_whole(path) as file:
        image.save(file, format="PNG", pnginfo=chunks)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe inside a PNG; raises `GuidanceError` for a broken, foreign or forged file."""
    path = Path(path)
    try:
        with warnings.catch_warnings(), Image.open(path, formats=("PNG",)) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            text = image.info.get(CHUNK)
            image.verify()  # the checksums of all chunks, to the end of the file
    except FileNotFoundError as error:
        raise GuidanceError(f"{path}: there is no such file.") from error
    except UnidentifiedImageError as error:
        raise GuidanceError(
            f"{path} is not a PNG: give a picture that guidancekit made."
        ) from error
    # Pillow reports damage in many ways, SyntaxError and DecompressionBombError among them.
    except Exception as error:
        raise GuidanceError(f"{path} cannot be read as a PNG ({error}).") from error
    if not isinstance(text, str):
        raise GuidanceError(
            f"{path} carries no guidancekit recipe: it was not made by `guidancekit generate`, "
            "or a program has removed its metadata."
        )
    try:
        return Recipe.from_json(text)
    except GuidanceError as error:
        raise GuidanceError(f"{path}: {error}") from error


def _check_text(name: str, value: Any, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        _refuse(name, value, "text")
    if not (empty or value.strip()):
        _refuse(name, value, "text that is not blank")
    if len(value) > MAX_PROMPT:
        _refuse(name, f"{len(value)} characters", f"at most {MAX_PROMPT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(name, value, "valid Unicode text")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, value, f"a whole number from {low} to {high}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise GuidanceError(f"{name}: found {_short(value)}, expected {expected}.")


def _short(value: Any) -> str:
    """`repr`, cut to what an error line can hold."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
