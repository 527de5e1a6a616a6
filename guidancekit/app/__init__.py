"""The app: compare guidance methods side by side, in a browser.

`guidancekit/studio.py` does the work and gives plain data; `jobs.py` streams it and stops it;
`checks.py` says what the server accepts. The rest is looks: `settings.py` is the left column,
`controls.py` a method's card, `compare.py`, `grid.py` and `trajectory.py` the tabs, `show.py` how
results look.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import GuidanceError
from ..loading import first_line
from ..studio import Studio
from . import checks
from .compare import FIRST, Compare
from .grid import Grid
from .settings import Settings
from .trajectory import Trajectory

OPTIONS: dict[str, Any] = {
    "css": Path(__file__).with_name("style.css").read_text(encoding="utf-8"),
    "theme": gr.themes.Default(  # fonts of the visitor's own system: nothing is fetched
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ),
    "max_file_size": checks.MAX_FILE,
    "show_error": True,
    "footer_links": [],
}
"""How the app is served, wherever it is."""


def build(studio: Studio) -> gr.Blocks:
    """The app on a studio."""
    with gr.Blocks(title="guidancekit", analytics_enabled=False, fill_width=True) as app:
        job = gr.State(None)
        gr.HTML(
            "<h1>guidancekit</h1><p>What a guidance method does: two at a time, from the same "
            "noise, with what each costs.</p>",
            elem_id="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300, elem_id="settings"):
                settings = Settings(studio, FIRST[0], FIRST[1])
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Compare"):
                    compare = Compare(app, studio, settings, job)
                with gr.Tab("Grid"):
                    Grid(studio, settings, compare.a.text, job)
                with gr.Tab("Trajectory"):
                    Trajectory(studio, settings, [compare.a.text, compare.b.text], job)
        settings.connect(compare.a, compare.status)
    return app


def launch(
    model: str = "scenes-unet",
    *,
    device: str | None = None,
    share: bool = False,
    port: int | None = None,
    host: str | None = None,
    public: bool = False,
    **options: Any,
) -> Any:
    """Start the app, on this machine only unless `share` or `host` say otherwise.

    With `public` (and `share`) visitors load no models but the embedded ones and `model`, and name
    no files. `options` are those of `gradio.Blocks.launch`, whose result is returned.
    Raises `GuidanceError` if `model` cannot be loaded or `port` is taken.
    """
    studio = Studio(model, device, public or share)
    studio.load(model)
    app = build(studio)
    app.queue(max_size=64)
    try:
        return app.launch(
            share=share,
            server_port=port,
            server_name=host or "127.0.0.1",
            **{**OPTIONS, **options},
        )
    except OSError as error:
        raise GuidanceError(f"cannot serve the app: {first_line(error)}") from error
