"""A series of pictures: shared by several processes, and resumed where it broke off.

Nothing is remembered beside the pictures. The name of each follows from what was asked for, it
appears whole or not at all, and the recipe inside says whether it is the one. Processes share a
series by counting off, so they need not talk to each other, and whoever runs it again, in however
many processes, makes exactly what is missing.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import GuidanceError
from .recipe import Recipe, read_recipe

Job = tuple[Path, Recipe]
"""A picture that is asked for, and where it goes."""


@dataclass(frozen=True)
class Process:
    """One of `count` processes that share a series; `device` is its own."""

    device: str
    index: int = 0
    count: int = 1

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """Every `count`-th job: the shares are equal again in what is left of a broken series."""
        return list(jobs[self.index :: self.count])


def this_process(device: str | None = None) -> Process:
    """This one among those that `accelerate launch` or `torchrun` started, else the only one.

    Each has a GPU of its own, as far as there are enough; `device` may say cuda, mps or cpu, or
    nothing for the best there is. Raises `GuidanceError` if the processes do not find each other.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from .loading import choose_device, first_line

    if device is None and parse_flag_from_env("ACCELERATE_USE_CPU"):  # accelerate launch --cpu
        device = "cpu"
    device = choose_device(device)
    on_cuda = device.startswith("cuda")
    try:
        state = PartialState(cpu=not on_cuda)  # else it takes processes without CUDA for strangers
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise GuidanceError(f"the processes of the launcher: {first_line(error)}") from error
    if state.num_processes == 1:
        return Process(device)
    # Met only to be counted: no process ever waits for another one again.
    atexit.register(torch.distributed.destroy_process_group)
    if ":" in device:
        raise GuidanceError(
            f"--device: found {device!r} for {state.num_processes} processes, each of which has "
            f"its own: write {device.partition(':')[0]} or leave it out."
        )
    own = str(state.device) if on_cuda else device
    return Process(own, state.process_index, state.num_processes)


def slug(recipe: Recipe) -> str:
    """What is in a picture, for its file name: the prompt, the method, the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower()).strip("-")[:48].rstrip("-")
    method = re.sub(r"[^a-z0-9]+", "-", recipe.guidance.partition("(")[0].lower()).strip("-")
    return f"{words or 'picture'}-{method}-seed{recipe.seed}"


def file_name(number: int, recipe: Recipe) -> str:
    """The file name, in every run the same, of a picture of the series' prompt `number`.

    Another recipe has another name; where and by which versions it is run makes no difference.
    """
    text = replace(_written_out(recipe), device="cpu", versions={}).to_json()
    return f"{number:05d}-{slug(recipe)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png"


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose picture is not there yet; warns of another file in its place."""
    missing = []
    for path, recipe in jobs:
        if not path.exists():
            missing.append((path, recipe))
        elif not is_finished(path, recipe):
            missing.append((path, recipe))
            warnings.warn(f"{path} is damaged or another picture: it is made again.", stacklevel=2)
    return missing


def is_finished(path: Path, recipe: Recipe) -> bool:
    """Whether `path` is an undamaged picture made by `recipe`, whatever its name is."""
    try:
        made = read_recipe(path)
    except GuidanceError:
        return False
    asked = _written_out(recipe)
    if asked.guidance_scale is None:  # the pipeline's default
        made = replace(made, guidance_scale=None)
    # The size is what the pipeline made of the one asked for; the rest is where it was run.
    return replace(made, size=asked.size, device=asked.device, versions=asked.versions) == asked


def _written_out(recipe: Recipe) -> Recipe:
    """The recipe with its guidance as a picture has it."""
    return replace(recipe, guidance=_guidance(recipe.guidance))


@functools.lru_cache  # a series has few
def _guidance(text: str) -> str:
    from .registry import parse

    return repr(parse(text))
