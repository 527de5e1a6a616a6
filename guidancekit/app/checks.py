"""What the server accepts, whatever the browser sends, and how errors reach the visitor."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import GuidanceError
from ..recipe import MAX_CHUNK, Recipe, read_recipe
from ..registry import parse

MAX_PROMPT = 1_000  # characters
MAX_METHOD = 2_000
MAX_NAME = 500
MAX_STEPS = 150
MAX_SEED = 2**32 - 1
MAX_SIDE = 2_048  # pixels
MAX_SCALE = 100
MAX_CELLS = 100
MAX_SEEDS = 16
MAX_FRAMES = 16
MAX_FILE = 20 * 2**20  # bytes

log = logging.getLogger(__name__)


def text(name: str, value: Any, longest: int) -> str:
    """`value` if it is text of at most `longest` characters."""
    if not isinstance(value, str):
        raise GuidanceError(f"{name}: found {value!r:.80}, expected text.")
    if len(value) > longest:
        raise GuidanceError(
            f"{name}: found {len(value):,} characters, expected at most {longest:,}."
        )
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` if it is a number between `low` and `high`."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or not low <= value <= high:
        raise GuidanceError(f"{name}: found {value!r:.80}, expected a number from {low} to {high}.")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` if it is a whole number between `low` and `high`; browsers send 3.0 for 3."""
    if number(name, value, low, high) != int(value):
        raise GuidanceError(f"{name}: found {value!r}, expected a whole number.")
    return int(value)


def recipe_in(path: str | None) -> Recipe:
    """The recipe in an uploaded PNG or JSON file; raises `GuidanceError` for anything else."""
    if path is None:
        raise GuidanceError("there is no file: give a PNG that was made here, or its JSON.")
    file = Path(path)
    size, suffix = file.stat().st_size, file.suffix.lower()
    limit = MAX_CHUNK if suffix == ".json" else MAX_FILE
    if size > limit:
        raise GuidanceError(f"the file has {size:,} bytes, expected at most {limit:,}.")
    if suffix == ".png":
        try:
            recipe = read_recipe(file)
        except GuidanceError as error:  # where the server keeps it is nobody's business
            raise GuidanceError(str(error).replace(str(file), file.name)) from error
    elif suffix == ".json":
        try:
            recipe = Recipe.from_json(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise GuidanceError("the JSON is not text in UTF-8.") from error
    else:
        raise GuidanceError(f"found a {suffix or 'nameless'} file, expected .png or .json.")
    parse(recipe.guidance)
    return recipe


def readable(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are a message to the visitor; details go to the log only."""

    def told(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, GuidanceError):
            return gr.Error(html.escape(str(error)), print_exception=False)
        log.exception("a handler of the app failed", exc_info=error)
        return gr.Error(
            f"guidancekit failed ({type(error).__name__}); the server's log says more.",
            print_exception=False,
        )

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any) -> Any:
            try:
                yield from handler(*args)
            except Exception as error:
                raise told(error) from None

        return stream

    @functools.wraps(handler)
    def call(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise told(error) from None

    return call
