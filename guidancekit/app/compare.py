"""The tab that compares two methods."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..snippets import as_command, as_python
from ..studio import Glimpse, Result, Studio
from . import checks, show
from .controls import Card
from .jobs import Job
from .settings import Settings

# What to try: prompt, scale of the run, A, B, fair.
LESSONS: dict[str, list[Any]] = {
    "at scale 15, APG keeps the colours that CFG burns": [
        "a small striped orange moon on a navy background",
        15,
        "CFG()",
        "APG()",
        False,
    ],
    "guiding in the middle of the run only costs less": [
        "a striped green heart left of a purple ring",
        6,
        "CFG()",
        "CFG(scale=Interval())",
        True,
    ],
    "CFG++ beside CFG of the same strength": [
        "a blue star above a yellow square",
        4,
        "CFG()",
        "CFGPlusPlus()",
        True,
    ],
    "self-attention guidance needs no second prompt": [
        "a large dotted pink heart on a white background",
        4,
        "CFG(scale=1.0)",
        "CFG(scale=1.0) + SAG(scale=1.0)",
        False,
    ],
}
FIRST = next(iter(LESSONS.values()))
WELCOME = (
    "Press Generate, or take one of the lessons below. Both methods start from the same noise."
)


class Compare:
    """Two methods from the same noise: `a` and `b` are the texts of their cards."""

    def __init__(self, app: gr.Blocks, studio: Studio, settings: Settings, job: gr.State) -> None:
        self.studio, self.settings, self.job = studio, settings, job
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(show.status(WELCOME), elem_id="status")
                wipe = functools.partial(
                    gr.ImageSlider, type="filepath", format="png", max_height=600
                )
                self.wipe = wipe(label="A | B", elem_id="wipe")
                self.fair_wipe = wipe(
                    label="CFG as strong as B | B", elem_id="fair-wipe", visible=False
                )
                lessons = gr.Column()
                self.figures = gr.Markdown(elem_id="figures")
                with gr.Row():
                    self.plots = {
                        name: gr.LinePlot(
                            x="step",
                            y=name,
                            color="method",
                            color_map=show.COLOURS,
                            x_title="step",
                            y_title=" ",
                            title=title,
                            height=190,
                            min_width=200,
                            visible=False,
                            elem_id=f"plot-{name}",
                        )
                        for name, title in show.PLOTS.items()
                    }
                self.files = gr.File(
                    label="PNGs that carry their recipes", file_count="multiple", visible=False
                )
                with gr.Accordion("Copy as code", open=False, elem_id="code"):
                    gr.Markdown("What makes these pictures again, to the same pixels.")
                    self.codes = [
                        gr.Code(
                            label=f"{which}, {what}",
                            language=language,
                            interactive=False,
                            wrap_lines=True,
                        )
                        for what, language in (("Python", "python"), ("command line", "shell"))
                        for which in "AB"
                    ]
            with gr.Column(scale=2, min_width=320):
                self.a, self.b = Card("A", FIRST[2]), Card("B", FIRST[3])
                fair = gr.Checkbox(
                    False,
                    label="fair",
                    info="also draw CFG as strong as B, at B's mean effective scale",
                    elem_id="fair",
                )
                gr.Markdown(
                    "The controls write these lines; typing works too.", elem_classes="about"
                )
                with gr.Tabs():
                    for card in (self.a, self.b):
                        with gr.Tab(f"Controls of {card.title}"):
                            card.controls(app, settings.model, studio.allow)
        with lessons:
            gr.Examples(
                list(LESSONS.values()),
                [settings.prompt, settings.scale, self.a.text, self.b.text, fair],
                [self.a.drawn, self.b.drawn],
                lambda prompt, scale, a, b, fair: (a, b),
                label="Lessons: choose one, then press Generate",
                example_labels=list(LESSONS),
                run_on_click=True,
                cache_examples=False,
            )
        gr.on(
            [settings.go.click, settings.prompt.submit],
            checks.readable(self._run),
            [*settings.inputs, settings.lock, self.a.text, self.b.text, fair],
            [
                job,
                settings.seed,
                settings.halt,
                self.status,
                self.wipe,
                self.fair_wipe,
                self.figures,
                *self.plots.values(),
                *self.codes,
                self.files,
            ],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_name="compare",
        )
        settings.halt.click(stop, job, None, queue=False, show_progress="hidden", api_name="stop")

    def _run(self, *values: Any) -> Iterator[dict[Any, Any]]:
        *settings, lock, a, b, fair = values
        if not lock:
            settings[4] = random.randint(0, checks.MAX_SEED)
        recipes = [self.settings.recipe(guidance, *settings) for guidance in (a, b)]
        results: list[Result] = []
        job, fair = Job(), bool(fair)
        yield {
            self.job: job,
            self.settings.seed: recipes[0].seed,
            self.settings.halt: gr.update(interactive=True),
            self.status: show.status(f"{self.studio.cost(recipes)} ...", busy=True),
            self.fair_wipe: gr.update(visible=False),
        }
        with tempfile.TemporaryDirectory(prefix="guidancekit-") as folder:
            for told in job.stream(lambda tell: self.studio.compare(recipes, tell, fair)):
                if isinstance(told, Glimpse):
                    yield self._glimpse(told, results, Path(folder))
                else:
                    results.append(told)
                    yield self._results(results, Path(folder))
            yield {  # all there is, for callers who read the last word only
                **self._results(results, Path(folder)),
                **{
                    plot: gr.update(value=show.curves(results, name), visible=bool(results))
                    for name, plot in self.plots.items()
                },
                self.settings.seed: recipes[0].seed,
                self.settings.halt: gr.update(interactive=False),
                self.status: show.status(
                    "Done: move the slider over the picture."
                    if len(results) == len(recipes) + fair
                    else "Stopped; what was finished is kept."
                ),
            }

    def _glimpse(self, told: Glimpse, results: list[Result], folder: Path) -> dict[Any, Any]:
        """The bar, and the picture as it comes out, on its side of the wipe."""
        updates: dict[Any, Any] = {self.status: show.progress(told)}
        if told.preview is not None:
            left = show.saved(results[0], folder) if results else told.preview
            if told.number < 2:
                updates[self.wipe] = (left, told.preview)
            else:
                right = show.saved(results[1], folder)
                updates[self.fair_wipe] = gr.update(value=(told.preview, right), visible=True)
        return updates

    def _results(self, results: list[Result], folder: Path) -> dict[Any, Any]:
        """Everything that is known of the pictures that are finished."""
        if not results:
            return {}
        paths = [show.saved(each, folder) for each in results]
        updates: dict[Any, Any] = {
            self.figures: show.figures(results),
            self.files: gr.update(value=paths, visible=True),
            self.wipe: (paths[0], paths[min(1, len(paths) - 1)]),
        }
        if len(results) == 3:
            updates[self.fair_wipe] = gr.update(value=(paths[2], paths[1]), visible=True)
        recipes = [each.picture.recipe for each in results[:2]]
        scale_name = self.studio.scale_name()
        codes = [as_python(recipe, scale_name) for recipe in recipes]
        updates |= dict(zip(self.codes, codes, strict=False))
        updates |= dict(zip(self.codes[2:], map(as_command, recipes), strict=False))
        return updates


def stop(job: Job | None) -> None:
    """End a visitor's own run, if there is one."""
    if job is not None:
        job.stop()
