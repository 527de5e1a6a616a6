"""`guidancekit grid`: one prompt over any two settings, in one picture."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import GuidanceError
from ..files import free_path
from .options import (
    MODEL_HELP,
    OUT,
    add_command,
    add_method_options,
    add_run_options,
    numbers,
    out_file,
    partial_file,
    read_recipes,
    save_grid,
)
from .talk import note, progress, quiet_libraries


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "grid",
        draw_sheet,
        "draw one prompt over any two settings",
        """\
        guidancekit grid "a red star" --x scale=2,4,8,15 --y method=cfg,apg,cfg++
        guidancekit grid "a red star" --method apg --x eta=0,0.5,1 --y "norm_threshold=0,5,none"
        guidancekit grid "a red star" --x "prompt=a red star | a blue ring" --seeds 0,1,2
        """,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument(
        "--x",
        required=True,
        metavar="NAME=VALUES",
        help="across: method, scale, steps, scheduler, seed, prompt (values between bars: |), "
        "negative, or a parameter of the method",
    )
    parser.add_argument("--y", metavar="NAME=VALUES", help="down, as --x [nothing]")
    parser.add_argument(
        "--seeds", type=numbers(int), metavar="S,...", help="seeds, a row each [that of --seed]"
    )
    add_method_options(parser)
    parser.add_argument("--seed", type=int, metavar="S", help="seed of all pictures [0]")
    parser.add_argument("--model", metavar="ID_OR_FOLDER", help=MODEL_HELP)
    parser.add_argument(
        "--out",
        default=f"{OUT}/grid.png",
        metavar="PNG",
        help="the grid; a JSON of recipes is written beside it [%(default)s]",
    )
    add_run_options(parser)
    parser.set_defaults(count=1, source=None)


def draw_sheet(options: argparse.Namespace) -> int:
    """Draw pictures over two settings, labelled."""
    out = out_file(options.out, ".png")

    from ..axes import NOTHING, Axis, Sheet
    from ..loading import choose_device
    from ..studio import Studio

    device = choose_device(options.device)
    base = read_recipes(options, [options.prompt], device)[0]

    def axis(option: str, text: str) -> Axis:
        name, equals, values = text.partition("=")
        if not equals or not name.strip():
            found = f"{option}: found {text!r}"
            raise GuidanceError(f"{found}, expected NAME=VALUES, such as scale=2,4,8.")
        return Axis.read(name, values)

    down = NOTHING if options.y is None else axis("--y", options.y)
    sheet = Sheet(base, axis("--x", options.x), down, options.seeds or ())
    quiet_libraries()
    studio = Studio(base.model, device)
    note(f"loading {base.model} ...")
    studio.load(base.model, base.dtype)
    note(str(studio.cost(sheet.asked)))
    try:
        with progress(len(sheet.cells)) as advance:
            studio.fill(sheet, lambda told: advance() if told is sheet else None)
    except KeyboardInterrupt:
        if sheet.pictures:
            save_grid(sheet.draw(), sheet.to_json(), free_path(partial_file(out)))
        raise
    save_grid(sheet.draw(), sheet.to_json(), out)
    return 0
