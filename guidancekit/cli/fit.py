"""`guidancekit fit`: what a method needs to know of a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import GuidanceError
from ..recipe import Recipe
from .options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    OUT,
    Parser,
    add_command,
    add_model_options,
    add_prompts,
    numbers,
    out_file,
    read_prompts,
)
from .talk import note, progress, quiet_libraries, warn_unknown_words


def add(commands: Any) -> None:
    """The command, which has one for each method that can be fitted to a model."""
    fit = commands.add_parser(
        "fit",
        help="fit what a method needs to know of a model",
        description="Fit what a method needs to know of a model. An interrupted fit goes on when "
        "the same command is given again.",
        allow_abbrev=False,
    )
    kinds = fit.add_subparsers(metavar="METHOD", required=True, parser_class=Parser)
    table = add_command(
        kinds,
        "linear-ag",
        fit_linear_ag,
        "fit LinearAG's tables from runs of plain guidance",
        """\
        guidancekit fit linear-ag --prompts-file prompts.txt --steps 20,30
        guidancekit generate "a red star" --method linear-ag \\
            --set table=guidancekit-out/linear-ag.json
        """,
    )
    add_prompts(table, "what to draw; the paper takes 200")
    table.add_argument(
        "--steps",
        type=numbers(int),
        default=[30],
        metavar="N,...",
        help="solver steps, a table for each [30]",
    )
    table.add_argument("--negative", metavar="TEXT", help="what to guide away from")
    _add_fit_options(table, f"{OUT}/linear-ag.json", "the scale that the table is for")

    network = add_command(
        kinds,
        "annealing",
        fit_annealing,
        "train the network of annealing guidance on pictures",
        """\
        guidancekit fit annealing --prompts-file prompts.txt --minutes 30
        guidancekit fit annealing --pictures folder --model some/model
        guidancekit generate "a red star" --method annealing \\
            --set weights=guidancekit-out/annealing.safetensors
        """,
    )
    add_prompts(network, "pictures that the model makes itself, for want of others")
    network.add_argument(
        "--pictures", metavar="DIR", help="pictures, each with its prompt in a .txt of its name"
    )
    network.add_argument(
        "--count", type=int, default=2000, metavar="N", help="pictures to train on [%(default)s]"
    )
    network.add_argument(
        "--steps", type=int, default=30, metavar="N", help="solver steps [%(default)s]"
    )
    _add_fit_options(network, f"{OUT}/annealing.safetensors", "of the model's own pictures")


def _add_fit_options(parser: argparse.ArgumentParser, out: str, scale: str) -> None:
    parser.add_argument(
        "--scale", type=float, metavar="W", help=f"CFG scale, {scale} [4 for embedded models]"
    )
    parser.add_argument(
        "--seeds", type=numbers(int), default=[0], metavar="S,...", help="prompt i starts at S+i"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long")
    parser.add_argument("--model", metavar="ID_OR_FOLDER", help=MODEL_HELP)
    parser.add_argument("--out", default=out, metavar="FILE", help="the file [%(default)s]")
    add_model_options(parser)


def fit_linear_ag(options: argparse.Namespace) -> int:
    """Fit LinearAG's tables for a model."""
    out = out_file(options.out, ".json")
    prompts, base = read_prompts(options), _fit_recipe(options, options.steps[0])
    if base.guidance_scale is None:
        raise GuidanceError("--scale: found none, but a table holds for one scale only: give it.")
    for steps in options.steps:
        replace(base, steps=steps)  # raises for a number out of range

    from ..fitting import fit_linear_ag_file

    pipe = _load_for_fit(base, options, prompts)
    total = len(prompts) * len(options.seeds) * len(options.steps)
    with progress(total, unit="run") as advance:
        fitted = fit_linear_ag_file(
            pipe,
            base,
            prompts,
            out,
            scale=base.guidance_scale,
            steps=options.steps,
            seeds=options.seeds,
            minutes=options.minutes,
            advance=advance,
        )
    print(fitted.path)
    for steps, errors in fitted.errors.items():
        worst = f"estimates are off by {100 * max(errors):.2g} % at most"
        note(f"{steps} steps: {worst}, root mean square")
    note(f"{fitted.runs} of {fitted.of} runs. Use it: --method linear-ag --set table={out}")
    return 0


def fit_annealing(options: argparse.Namespace) -> int:
    """Train the network of annealing guidance for a model."""
    out = out_file(options.out, ".safetensors")
    if options.pictures is not None and (options.prompts or options.prompts_file):
        raise GuidanceError("--pictures: the prompts come with the pictures: give none besides.")
    if options.count < 1:
        raise GuidanceError(f"--count: found {options.count}, expected at least 1.")
    prompts = ["-"] if options.pictures else read_prompts(options)
    base = _fit_recipe(options, options.steps)

    from ..annealing import fit_annealing_file
    from ..pictures import FolderPictures, OwnPictures

    pipe = _load_for_fit(base, options, [] if options.pictures else prompts)
    if options.pictures:
        pictures: Any = FolderPictures(pipe, Path(options.pictures), base.size)
    else:
        pictures = OwnPictures(pipe, base, prompts, options.seeds)
    with progress(options.count) as advance:
        trained = fit_annealing_file(
            pipe,
            base,
            pictures,
            out,
            count=options.count,
            minutes=options.minutes,
            seed=options.seeds[0],
            advance=advance,
        )
    print(trained.path)
    means = ", ".join(f"{name} {value:.3g}" for name, value in trained.means.items())
    note(f"{trained.pictures} pictures; {means or 'nothing left to do'}")
    note(f"use it: --method annealing --set weights={out}")
    return 0


def _fit_recipe(options: argparse.Namespace, steps: int) -> Recipe:
    """What a fit says about the model and its runs."""
    from ..loading import check_scheduler, choose_device, choose_dtype, default_scale

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    if options.minutes is not None and not options.minutes > 0:
        raise GuidanceError(f"--minutes: found {options.minutes:g}, expected more than 0.")
    model = options.model or DEFAULT_MODEL
    return Recipe(
        prompt="-",  # each run has its own
        model=model,
        negative=getattr(options, "negative", None) or "",
        guidance_scale=default_scale(model) if options.scale is None else options.scale,
        steps=steps,
        scheduler=options.scheduler,
        size=options.size,
        dtype=options.dtype or choose_dtype(model, choose_device(options.device)),
    )


def _load_for_fit(base: Recipe, options: argparse.Namespace, prompts: Sequence[str]) -> Any:
    from ..loading import load_pipeline

    quiet_libraries()
    pipe = load_pipeline(base, options.device)
    warn_unknown_words(pipe, prompts)
    return pipe
