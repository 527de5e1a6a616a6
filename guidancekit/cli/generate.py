"""`guidancekit generate`: pictures, each with its recipe inside."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GuidanceError
from ..files import check_writable, free_path
from ..recipe import Recipe, save_picture
from .options import (
    MODEL_HELP,
    OUT,
    add_command,
    add_method_options,
    add_run_options,
    read_prompts,
    read_recipes,
)
from .talk import note, progress, quiet_libraries, warn_unknown_words

if TYPE_CHECKING:
    from ..series import Job, Process


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "generate",
        generate,
        "make pictures whose PNGs carry their recipe",
        """\
        guidancekit generate "a large red circle on a white background"
        guidancekit generate "a blue star" --method apg --scale 8 --set eta=0.5 -n 4
        guidancekit generate --from guidancekit-out/a-blue-star-apg-seed0.png
        guidancekit generate "a cat" --model stabilityai/stable-diffusion-xl-base-1.0 \\
            --method apg --preset sdxl
        guidancekit generate --prompts-file prompts.txt -n 4 --out series
        accelerate launch --multi_gpu --num_processes 8 --module guidancekit generate \\
            --prompts-file prompts.txt -n 4 --out series
        """,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="more prompts, one per line: a series, whose files are named by number and recipe. "
        "Given again, the command makes what is missing; processes of a launcher share the series",
    )
    add_method_options(parser)
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the first picture [0]")
    parser.add_argument(
        "-n",
        dest="count",
        type=int,
        default=1,
        metavar="K",
        help="pictures per prompt, at seeds S, S+1, ... [1]",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PNG",
        help="repeat the recipe inside a picture; other options change it",
    )
    parser.add_argument("--model", metavar="ID_OR_FOLDER", help=MODEL_HELP)
    parser.add_argument(
        "--out", default=OUT, metavar="DIR", help="folder for pictures [%(default)s]"
    )
    add_run_options(parser)


def generate(options: argparse.Namespace) -> int:
    """Make pictures, each with its recipe inside; those of a --prompts-file are a series."""
    out = Path(options.out)
    check_writable(out)
    in_series = options.prompts_file is not None
    prompts = read_prompts(options) if in_series else options.prompts

    from ..series import slug, this_process

    process = this_process(options.device)
    if process.count > 1 and not in_series:
        raise GuidanceError(f"{process.count} processes share a --prompts-file only: give one.")
    # The first process speaks for all, except of what stops another one.
    with redirect_stderr(io.StringIO()) if process.index else nullcontext():
        recipes = read_recipes(options, prompts, process.device)
        if in_series:
            jobs = _missing(out, recipes, options.count, process)
        else:
            jobs = [(out / f"{slug(recipe)}.png", recipe) for recipe in recipes]
        if not jobs:
            return 0

        from ..generate import run
        from ..loading import load_pipeline

        quiet_libraries()
        pipe = load_pipeline(recipes[0], process.device)
        warn_unknown_words(pipe, [recipe.prompt for recipe in recipes])
        with progress(len(jobs), pipe) as advance:
            for path, recipe in jobs:
                picture = run(pipe, recipe)
                path = path if in_series else free_path(path)
                save_picture(picture.image, picture.recipe, path)
                advance(str(path))
    return 0


def _missing(out: Path, recipes: Sequence[Recipe], count: int, process: Process) -> list[Job]:
    """What is left for `process` to do in a series that has `count` pictures of each prompt."""
    from ..series import file_name, unfinished

    jobs = [(out / file_name(1 + k // count, recipe), recipe) for k, recipe in enumerate(recipes)]
    share = process.share(jobs)
    missing = unfinished(share)
    if len(missing) < len(share):
        whose = f"process {process.index + 1} of {process.count}: " if process.count > 1 else ""
        note(f"{whose}{len(share) - len(missing)} of {len(share)} pictures are there already.")
    return missing
