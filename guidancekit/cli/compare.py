"""`guidancekit compare`: prompts and seeds under several methods, in one picture."""

from __future__ import annotations

import argparse
from typing import Any

from .. import bundled
from ..files import free_path
from ..recipe import Recipe
from .options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    OUT,
    add_command,
    add_prompts,
    add_run_options,
    numbers,
    out_file,
    partial_file,
    read_prompts,
    save_grid,
)
from .talk import progress, quiet_libraries, show_steps, warn, warn_unknown_words

DEFAULT_METHODS = "cfg,apg,cfg++,fdg,interval"


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "compare",
        compare,
        "draw one grid: prompts x seeds down, methods x scales across",
        """\
        guidancekit compare "a large red circle" "a blue star above a yellow square"
        guidancekit compare "a green heart" --methods cfg,apg --scales 2,4,8 --seeds 0,1,2
        guidancekit compare "a cat" --methods "cfg,apg(norm_threshold=15),cfg++(0.6)" \\
            --model stabilityai/stable-diffusion-xl-base-1.0
        """,
    )
    add_prompts(parser, "one row per prompt and seed")
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="A,B,...",
        help="names, 'all', or texts such as 'apg(eta=0.5)' [%(default)s]",
    )
    parser.add_argument(
        "--scales", type=numbers(float), metavar="W,...", help="CFG scales, a column for each"
    )
    parser.add_argument(
        "--seeds", type=numbers(int), default=[0], metavar="S,...", help="seeds, a row each [0]"
    )
    parser.add_argument(
        "--model", action="append", metavar="ID_OR_FOLDER", help=MODEL_HELP + "; repeatable"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="the methods of a row in one pipeline call: faster on a GPU; seconds are shares of it",
    )
    parser.add_argument(
        "--out",
        default=f"{OUT}/compare.png",
        metavar="PNG",
        help="the grid; a JSON of costs and recipes is written beside it [%(default)s]",
    )
    add_run_options(parser)


def compare(options: argparse.Namespace) -> int:
    """Draw one labelled grid: prompts x seeds down, methods x scales across."""
    out = out_file(options.out, ".png")
    prompts = read_prompts(options)

    from ..compare import Comparison, make_columns, split_methods
    from ..loading import check_scheduler, choose_device, choose_dtype

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    device = choose_device(options.device)
    models = options.model or [DEFAULT_MODEL]
    family = bundled.family(*models)
    columns = make_columns(split_methods(options.methods), options.scales or (), family)
    rows = [
        Recipe(
            prompt=prompt,
            model=model,
            negative=options.negative or "",
            steps=30 if options.steps is None else options.steps,
            seed=seed,
            scheduler=options.scheduler,
            size=options.size,
            dtype=options.dtype or choose_dtype(model, device),
        )
        for model in models
        for prompt in prompts
        for seed in options.seeds
    ]
    comparison = Comparison(rows, columns)
    quiet_libraries()
    seen = None
    try:
        with progress(len(rows) * len(columns)) as advance:
            for pipe, cell in comparison.run(device, options.together):
                if pipe is not seen:
                    seen = pipe
                    warn_unknown_words(pipe, prompts)
                    show_steps(pipe)
                if cell != (0, 0):
                    advance()
            advance()
    except KeyboardInterrupt:
        if comparison.pictures:
            save_grid(comparison.draw(), comparison.to_json(), free_path(partial_file(out)))
        raise
    for c, reason in comparison.left_out.items():
        warn(f"left out {columns[c].method}: {reason}")
    save_grid(comparison.draw(), comparison.to_json(), out)
    return 0
