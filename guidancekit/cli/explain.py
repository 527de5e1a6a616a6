"""`guidancekit explain`: what a method does to the prediction, on one page."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import written_whole
from .options import (
    MODEL_HELP,
    OUT,
    add_command,
    add_method_options,
    add_run_options,
    numbers,
    out_file,
    read_recipes,
)
from .talk import note, progress, quiet_libraries, warn_unknown_words


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "explain",
        explain_method,
        "show on one page what a method does to the prediction, beside CFG",
        """\
        guidancekit explain "a large red circle" --method apg --scale 8
        guidancekit explain "a blue star" --method fdg --set scale_low=2 --set scale_high=8
        guidancekit explain "a cat" --model stabilityai/stable-diffusion-xl-base-1.0 \\
            --method cfg++ --seeds 0,1,2,3 --out cfgpp.html
        """,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    add_method_options(parser)
    parser.add_argument(
        "--seeds",
        type=numbers(int),
        default=[*range(8)],
        metavar="S,...",
        help="pictures that are drawn together; the figures are means over them [0 to 7]",
    )
    parser.add_argument("--model", metavar="ID_OR_FOLDER", help=MODEL_HELP)
    parser.add_argument(
        "--out", default=f"{OUT}/explain.html", metavar="HTML", help="the page [%(default)s]"
    )
    add_run_options(parser)
    parser.set_defaults(count=1, source=None, seed=None)


def explain_method(options: argparse.Namespace) -> int:
    """Run a method and plain CFG from the same noise, and write a page about them."""
    out = out_file(options.out, ".html")

    from ..loading import choose_device, load_pipeline

    device = choose_device(options.device)
    recipe = read_recipes(options, [options.prompt], device)[0]

    from ..lab.explain import explain
    from ..lab.explain_page import page

    quiet_libraries()
    pipe = load_pipeline(recipe, device)
    warn_unknown_words(pipe, [recipe.prompt])
    with progress(2 * recipe.steps, unit="step") as advance:
        explanation = explain(pipe, recipe, options.seeds, advance=advance)
    with written_whole(out) as file:
        file.write(page(explanation).encode())
    for text in explanation.notes:
        note(text)
    print(out)
    return 0
