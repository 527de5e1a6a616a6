"""The tab that follows the prediction over the steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .. import bundled
from ..compare import split_methods
from ..errors import GuidanceError
from ..generate import with_scale
from ..studio import Glimpse, Studio
from . import checks, show
from .jobs import Job
from .settings import Settings


class Trajectory:
    """What each method takes the clean picture to be, step by step, as film strips."""

    def __init__(
        self,
        studio: Studio,
        settings: Settings,
        guidances: list[gr.Textbox],
        job: gr.State,
    ) -> None:
        self.studio, self.settings, self.job = studio, settings, job
        gr.Markdown(
            "The picture that the run is heading for, seen from every step: A, B, and further "
            "methods.",
            elem_classes="about",
        )
        with gr.Row():
            more = gr.Textbox(
                "",
                label="further methods",
                info="between commas, such as cfg++, fdg(scale_high=8)",
                elem_id="more",
            )
            frames = gr.Slider(2, checks.MAX_FRAMES, 8, step=1, label="Frames")
        with gr.Row(elem_classes="actions"):
            go = gr.Button("Follow", variant="primary", elem_id="follow", min_width=140)
        self.status = gr.HTML(
            show.status("Press Follow to see how the methods part."), elem_id="trajectory-status"
        )
        self.image = gr.Image(
            label="film strips",
            show_label=False,
            format="png",
            interactive=False,
            elem_id="strips",
            buttons=["download", "fullscreen"],
        )
        go.click(
            checks.readable(self._run),
            [*settings.inputs, *guidances, more, frames],
            [self.job, settings.halt, self.status, self.image],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_name="trajectory",
        )

    def _run(self, *values: Any) -> Iterator[dict[Any, Any]]:
        *settings, a, b, more, frames = values
        family = bundled.family(settings[0])
        specs = split_methods(checks.text("further methods", more or "", checks.MAX_METHOD))
        if len(specs) > checks.MAX_FRAMES:
            raise GuidanceError(f"found {len(specs)} methods, expected up to {checks.MAX_FRAMES}.")
        self.studio.allow(more or "")
        further = [with_scale(spec, None, family=family)[0] for spec in specs]
        recipes = [self.settings.recipe(each, *settings) for each in (a, b, *further)]
        count = checks.whole("frames", frames, 1, checks.MAX_FRAMES)
        job = Job()
        yield {
            self.job: job,
            self.settings.halt: gr.update(interactive=True),
            self.status: show.status(f"{self.studio.cost(recipes)} ...", busy=True),
        }
        strips = None
        for told in job.stream(lambda tell: self.studio.trajectory(recipes, count, tell)):
            if isinstance(told, Glimpse):
                yield {self.status: show.progress(told)}
            else:
                strips = told
                yield {self.image: strips}
        with tempfile.TemporaryDirectory(prefix="guidancekit-") as folder:
            updates: dict[Any, Any] = {
                self.status: show.status("Stopped." if job.stopped else "Done."),
                self.settings.halt: gr.update(interactive=False),
            }
            if strips is not None:
                path = Path(folder, "trajectory.png")
                strips.save(path)
                updates[self.image] = str(path)
            yield updates
