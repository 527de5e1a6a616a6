"""`guidancekit methods`: the list of methods, and each one explained."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import GuidanceError
from .options import add_command


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "methods",
        show_methods,
        "list the guidance methods, or explain one",
        """\
        guidancekit methods
        guidancekit methods apg
        """,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a strategy or a schedule")
    parser.add_argument(
        "--markdown", action="store_true", help="papers, costs and tests of all, as a table"
    )


def show_methods(options: argparse.Namespace) -> int:
    """List the methods and schedules, or explain one."""
    if options.markdown and options.name is not None:
        raise GuidanceError(f"--markdown is the table of all methods: leave out {options.name!r}.")
    if options.name is None and not options.markdown:
        from ..listing import overview

        print(overview())
    else:
        from ..describe import describe, markdown

        print(markdown() if options.markdown else describe(options.name))
    return 0
