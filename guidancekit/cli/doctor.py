"""`guidancekit doctor`: which methods work with a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import bundled
from ..recipe import Recipe
from .options import DEFAULT_MODEL, MODEL_HELP, add_command
from .talk import quiet_libraries


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "doctor",
        show_diagnosis,
        "find out which methods work with a model, and why others do not",
        """\
        guidancekit doctor
        guidancekit doctor stabilityai/stable-diffusion-xl-base-1.0 --scheduler dpm++2m
        """,
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="ID_OR_FOLDER", help=MODEL_HELP
    )
    parser.add_argument("--scheduler", metavar="NAME", help="as for generate [the model's own]")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--device", metavar="NAME", help="cuda, mps or cpu [the best there is]")


def show_diagnosis(options: argparse.Namespace) -> int:
    """Try every method on a model, and print what works and what does not, and why."""
    from ..doctor import diagnose
    from ..loading import check_scheduler, choose_device, choose_dtype, load_pipeline

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    dtype = choose_dtype(options.model, choose_device(options.device))
    recipe = Recipe(prompt="doctor", model=options.model, dtype=dtype, scheduler=options.scheduler)
    quiet_libraries()
    pipe = load_pipeline(recipe, options.device)
    found = diagnose(pipe, bundled.family(options.model))
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 1 if found.problem else 0
