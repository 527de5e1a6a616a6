"""The tab that lays pictures out over two axes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..axes import FIELDS, NOTHING, Axis, Sheet, names_of
from ..compare import split_methods
from ..errors import GuidanceError
from ..files import written_whole
from ..registry import parse
from ..studio import Glimpse, Result, Studio
from . import checks, show
from .controls import QUIET
from .jobs import Job
from .settings import Settings

NOBODY = "nothing"  # on the second axis
SUGGESTED = {
    "method": "cfg, apg, cfg++, fdg",
    "scale": "2, 4, 8, 15",
    "prompt": "a red star | a blue ring on a white background",
    "negative": "red | blue",
    "seed": "0, 1, 2",
    "steps": "10, 20, 40",
    "scheduler": "ddim, euler, dpm++2m",
}


class Grid:
    """Pictures over any two settings of the method A, once for each of some seeds."""

    def __init__(
        self, studio: Studio, settings: Settings, guidance: gr.Textbox, job: gr.State
    ) -> None:
        self.studio, self.settings, self.job = studio, settings, job
        self.sheet = gr.State(None)
        gr.Markdown(
            "What is not on an axis is as set on the left; the method is A's of the first tab. "
            "Every cell starts from the same noise.",
            elem_classes="about",
        )
        names = names_of(parse("CFG()"))
        with gr.Row():
            with gr.Column(min_width=260):
                x_name = gr.Dropdown(names, value="scale", label="across", elem_id="x-name")
                x_values = gr.Textbox(SUGGESTED["scale"], label="values", elem_id="x-values")
            with gr.Column(min_width=260):
                y_name = gr.Dropdown(
                    [NOBODY, *names], value="method", label="down", elem_id="y-name"
                )
                y_values = gr.Textbox(SUGGESTED["method"], label="values", elem_id="y-values")
            with gr.Column(min_width=160):
                seeds = gr.Textbox("", label="Seeds", info="a row each; empty: the one on the left")
        with gr.Row(elem_classes="actions"):
            go = gr.Button("Draw the grid", variant="primary", elem_id="draw", min_width=140)
        self.status = gr.HTML(
            show.status("Press Draw the grid; its cost is shown here before it runs."),
            elem_id="grid-status",
        )
        self.image = gr.Image(
            label="the grid",
            show_label=False,
            type="filepath",
            format="png",
            interactive=False,
            elem_id="sheet",
            buttons=["download", "fullscreen"],
        )
        with gr.Row():
            self.cell = gr.Image(
                label="cell", type="filepath", format="png", interactive=False, visible=False
            )
            self.about = gr.Markdown(elem_id="cell-figures")
        self.files = gr.File(
            label="the grid and its JSON",
            file_count="multiple",
            visible=False,
            elem_id="grid-files",
        )
        axes = [*settings.inputs, guidance, x_name, x_values, y_name, y_values, seeds]
        for name, values in ((x_name, x_values), (y_name, y_values)):
            name.input(_suggested, name, values, **QUIET)
            guidance.change(self._choices, [guidance, name], name, **QUIET)
        gr.on(
            [each.change for each in axes[1:]],
            self._estimate,
            axes,
            self.status,
            **QUIET,
            trigger_mode="always_last",
        )
        go.click(
            checks.readable(self._run),
            axes,
            [
                self.job,
                self.sheet,
                settings.halt,
                self.status,
                self.image,
                self.cell,
                self.about,
                self.files,
            ],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_name="grid",
        )
        self.image.select(
            checks.readable(self._enlarge),
            self.sheet,
            [self.cell, self.about],
            show_progress="hidden",
            api_visibility="private",
        )

    def _read(self, *values: Any) -> Sheet:
        """The grid that the controls ask for, checked."""
        *settings, guidance, x_name, x_values, y_name, y_values, seeds = values
        longest = checks.MAX_METHOD
        x = Axis.read(str(x_name), checks.text("values", x_values, longest))
        y = NOTHING
        if y_name not in (None, "", NOBODY):
            y = Axis.read(str(y_name), checks.text("values", y_values, longest))
        for axis in (x, y):  # values of methods that would open files
            if axis.name not in FIELDS:
                self.studio.allow(", ".join(map(str, axis.values)) + repr(axis.values))
        numbers = []
        for part in split_methods(checks.text("seeds", seeds or "", longest)):
            if not part.isdecimal():
                raise GuidanceError(f"seeds: found {part!r}, expected whole numbers and commas.")
            numbers.append(checks.whole("seed", int(part), 0, checks.MAX_SEED))
        if len(numbers) > checks.MAX_SEEDS:
            raise GuidanceError(f"seeds: found {len(numbers)}, expected up to {checks.MAX_SEEDS}.")
        cells = len(x.values) * len(y.values) * max(1, len(numbers))
        if cells > checks.MAX_CELLS:
            raise GuidanceError(f"found {cells} cells, expected up to {checks.MAX_CELLS}.")
        sheet = Sheet(self.settings.recipe(guidance, *settings), x, y, numbers)
        for recipe in sheet.asked:
            checks.whole("steps", recipe.steps, 1, checks.MAX_STEPS)
            checks.text("prompt", recipe.prompt, checks.MAX_PROMPT)
            self.studio.allow(recipe.guidance)
        return sheet

    def _estimate(self, *values: Any) -> str:
        try:
            sheet = self._read(*values)
        except GuidanceError as error:
            return show.status(str(error), alert=True)
        return show.status(f"This will be {self._cost(sheet)}.")

    def _cost(self, sheet: Sheet) -> str:
        return str(self.studio.cost(sheet.asked))

    def _run(self, *values: Any) -> Iterator[dict[Any, Any]]:
        sheet, job = self._read(*values), Job()
        yield {
            self.job: job,
            self.settings.halt: gr.update(interactive=True),
            self.sheet: sheet,
            self.status: show.status(f"{self._cost(sheet)} ...", busy=True),
            self.cell: gr.update(visible=False),
            self.about: "",
        }
        for told in job.stream(lambda tell: self.studio.fill(sheet, tell)):
            if isinstance(told, Glimpse):
                yield {self.status: show.progress(told)}
            else:
                yield {self.image: sheet.draw()}
        whole = len(sheet.pictures) == len(sheet.cells)
        with tempfile.TemporaryDirectory(prefix="guidancekit-") as folder:
            image, table = Path(folder, "grid.png"), Path(folder, "grid.json")
            sheet.draw().save(image)
            with written_whole(table) as file:
                file.write(sheet.to_json().encode())
            yield {
                self.image: str(image),
                self.files: gr.update(value=[str(image), str(table)], visible=True),
                self.settings.halt: gr.update(interactive=False),
                self.status: show.status(
                    "Done: click a cell to enlarge it." if whole else "Stopped; the rest is kept."
                ),
            }

    def _enlarge(self, sheet: Sheet | None, event: gr.SelectData) -> Iterator[tuple[Any, str]]:
        """The picture under the pointer, as a PNG with its recipe."""
        found = sheet.layout().cell_at(*event.index) if sheet is not None else None
        if sheet is None or found not in sheet.pictures:
            yield gr.update(visible=False), ""
            return
        result = Result("cell", sheet.pictures[found], [])
        with tempfile.TemporaryDirectory(prefix="guidancekit-") as folder:
            path = show.saved(result, Path(folder))
            yield gr.update(value=path, visible=True), show.figures([result])

    def _choices(self, guidance: str, chosen: str) -> Any:
        """The axes that a method allows; the one chosen stays."""
        try:
            names = names_of(self.studio.parse(guidance))
        except GuidanceError:
            return gr.skip()
        return gr.update(choices=[NOBODY, *names] if chosen == NOBODY else names)


def _suggested(name: str) -> str:
    """Values to start with."""
    return SUGGESTED.get(name, SUGGESTED["scale"] if name.endswith("scale") else "0, 0.5, 1")
