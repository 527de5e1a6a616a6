"""The command line.

Each command is a file here: a function that runs it, and `add`, which declares its arguments. A new
command is a new file, and its name in `COMMANDS`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from ..errors import GuidanceError
from ..recipe import installed_versions
from . import app, bench, compare, doctor, explain, fit, generate, grid, methods
from .options import Parser
from .talk import one_line_warnings

COMMANDS = (
    generate,
    compare,
    grid,
    explain,
    bench,
    fit,
    doctor,
    app,
    methods,
)  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for bad input, 130 for Ctrl-C).

    It is 1 if `doctor` finds that a model is not supported.
    """
    try:
        typed = sys.argv[1:] if argv is None else argv
        options = make_parser().parse_args(typed)
        options.typed = shlex.join(["guidancekit", *typed])
        with one_line_warnings():
            return options.command(options)
    except GuidanceError as error:
        print(f"guidancekit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("guidancekit: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0


def make_parser() -> Parser:
    """The options of all commands."""
    parser = Parser(
        prog="guidancekit",
        description="Guided sampling with any Diffusers text-to-image pipeline.",
        allow_abbrev=False,
    )
    version = "guidancekit " + installed_versions()["guidancekit"]
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser
