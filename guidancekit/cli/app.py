"""`guidancekit app`: the app in the browser."""

from __future__ import annotations

import argparse
from typing import Any

from .options import DEFAULT_MODEL, MODEL_HELP, add_command
from .talk import note, quiet_libraries


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "app",
        start_app,
        "compare methods in the browser, on this machine only",
        """\
        guidancekit app
        guidancekit app --model stabilityai/stable-diffusion-xl-base-1.0 --port 7861
        """,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="ID_OR_FOLDER", help=MODEL_HELP)
    parser.add_argument("--port", type=int, metavar="N", help="[the first free one from 7860]")
    parser.add_argument(
        "--share", action="store_true", help="also serve it to others, under a public address"
    )
    parser.add_argument("--device", metavar="NAME", help="cuda, mps or cpu [the best there is]")


def start_app(options: argparse.Namespace) -> int:
    """Serve the app until Ctrl-C."""
    from ..app import launch

    quiet_libraries()
    note(f"loading {options.model} ...")
    launch(options.model, device=options.device, share=options.share, port=options.port)
    return 0
