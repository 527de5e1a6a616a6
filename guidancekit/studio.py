"""Comparisons, grids and trajectories as plain data: what the app and `guidancekit grid` do.

Every method takes recipes and tells through a callback how far it is; nothing here knows Gradio.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from . import bundled
from .axes import Sheet
from .describe import evaluations
from .errors import GuidanceError
from .generate import Picture, run, scale_name, warm_up
from .grid import Label, draw_grid
from .guidance import Guidance
from .loading import choose_device, choose_dtype, default_scale, load_pipeline, make_scheduler
from .measures import distance, pixels, saturation
from .recipe import Recipe
from .registry import parse, quoted
from .step import Prediction, Step
from .trace import Trace, TracePoint

EVERY = 0.15  # seconds between two previews: more would slow a fast model down


@dataclass(frozen=True)
class Glimpse:
    """How far a run is: picture `number` of `of`, `step` of `steps`, and what it looks like."""

    number: int
    of: int
    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Result:
    """A finished picture and what is worth knowing about it."""

    label: str
    picture: Picture
    points: list[TracePoint]
    distance: float | None = None
    """To the first picture of the comparison, root mean square from 0 to 1."""

    @property
    def scales(self) -> list[float]:
        """The effective scale of each step, NaN where it says nothing (`Report.brief`)."""
        steps = zip(self.picture.effective_scale, self.picture.brief, strict=True)
        return [float("nan") if skipped else scale for scale, skipped in steps]

    @property
    def scale(self) -> float:
        """The effective scale, averaged over the steps."""
        return self.picture.mean_scale

    @property
    def saturation(self) -> float:
        return float(saturation(pixels(self.picture.image)))


@dataclass(frozen=True)
class Cost:
    """What a number of pictures will take: network evaluations, an upper bound, and seconds."""

    pictures: int
    evaluations: int
    seconds: float | None

    def __str__(self) -> str:
        pictures = "1 picture" if self.pictures == 1 else f"{self.pictures} pictures"
        words = f"{pictures}, at most {self.evaluations:,} network evaluations"
        if self.seconds is None:
            return words
        return f"{words}, about {_duration(self.seconds)}"


Tell = Callable[[Any], None]
"""Takes what there is to tell, or None, and raises when the work is to stop."""


@dataclass
class Studio:
    """The one model in memory, and what is done with it; one piece of work at a time.

    `public` is for strangers: only the embedded models and the one that it was started with are
    loaded for them, and no method may name a file.
    """

    model: str = "scenes-unet"
    device: str | None = None
    public: bool = False
    seconds_per_row: dict[str, float] = field(default_factory=dict)
    """By model: what one network evaluation took in the last run."""

    def __post_init__(self) -> None:
        self.device = choose_device(self.device)
        self.models = list(dict.fromkeys((self.model, *bundled.MODELS)))
        self._lock = threading.Lock()
        self._pipe: Any = None
        self._loaded: tuple[str, str] | None = None
        self._scheduler: Any = None

    # --- models ---------------------------------------------------------------------------------

    def load(self, model: str, dtype: str | None = None) -> None:
        """Have `model` in memory; what cannot be loaded leaves the one before in its place."""
        assert self.device is not None
        with self._lock:
            self._load(model, dtype or choose_dtype(model, self.device))

    def _load(self, model: str, dtype: str) -> None:
        if (model, dtype) == self._loaded:
            return
        if self.public and model not in self.models:
            raise GuidanceError(
                f"model: found {model!r}, expected one of {', '.join(self.models)}: this app is "
                "open to others, so it loads no further models."
            )
        recipe = Recipe(prompt="-", model=model, dtype=dtype)
        pipe = load_pipeline(recipe, self.device)
        started = time.perf_counter()
        warm_up(pipe, recipe)
        rows = 4  # two steps of two branches
        self.seconds_per_row.setdefault(model, (time.perf_counter() - started) / rows)
        self._pipe, self._loaded, self._scheduler = pipe, (model, dtype), pipe.scheduler
        if model not in self.models:
            self.models.append(model)

    def _ready(self, recipe: Recipe) -> Any:
        """The pipeline for a recipe, with its scheduler."""
        self._load(recipe.model, recipe.dtype)
        pipe = self._pipe
        name = recipe.scheduler
        pipe.scheduler = self._scheduler if name is None else make_scheduler(name, self._scheduler)
        return pipe

    def recipe(self, **values: Any) -> Recipe:
        """A recipe for this machine; raises `GuidanceError` for values that do not fit."""
        model = values.get("model") or self.model
        given = {name: value for name, value in values.items() if value is not None}
        given.setdefault("guidance_scale", default_scale(model))
        assert self.device is not None
        made = Recipe(
            **{**given, "model": model, "dtype": choose_dtype(model, self.device)},
            device=self.device.partition(":")[0],
        )
        return replace(made, guidance=repr(self.parse(made.guidance)))

    def parse(self, text: str) -> Guidance:
        """A guidance from text; see `allow`."""
        self.allow(text)
        return parse(text)

    def allow(self, text: str) -> None:
        """Refuse methods of strangers that name files, before any is opened.

        Companions of the embedded models may be named.
        """
        for name in quoted(text) if self.public else ():
            is_path = "/" in name or "\\" in name or Path(name).exists()
            if name not in bundled.COMPANIONS and is_path:
                raise GuidanceError(
                    f"found {name!r}: this app is open to others, so methods cannot name files."
                )

    # --- work -----------------------------------------------------------------------------------

    def compare(self, recipes: Sequence[Recipe], tell: Tell, fair: bool = False) -> list[Result]:
        """The pictures of recipes, from the same noise, each told as it is finished.

        With `fair` there is one more: CFG as strong as the last one, at its mean effective scale.
        """
        count = len(recipes) + fair
        results: list[Result] = []
        with self._lock:
            for recipe in recipes:
                label = chr(ord("A") + len(results))
                results.append(self._result(label, recipe, results, count, tell))
                tell(results[-1])
            if fair:
                results.append(self._result("CFG", _as_strong(results[-1]), results, count, tell))
                tell(results[-1])
        return results

    def _result(
        self, label: str, recipe: Recipe, before: list[Result], count: int, tell: Tell
    ) -> Result:
        trace = Trace()
        picture = self._run(recipe, len(before), count, tell, trace)
        images = [each.image for each in (before[0].picture, picture)] if before else []
        away = float(distance(*map(pixels, images))) if images else None
        return Result(label, picture, trace.points, away)

    def fill(self, sheet: Sheet, tell: Tell) -> Sheet:
        """The pictures of a grid; it is told after each of them."""
        cells = sheet.cells
        with self._lock:
            for number, (row, column) in enumerate(cells):
                recipe = sheet.recipes[row][column]
                sheet.pictures[row, column] = self._run(recipe, number, len(cells), tell)
                tell(sheet)
        return sheet

    def trajectory(self, recipes: Sequence[Recipe], frames: int, tell: Tell) -> Image.Image:
        """What each recipe takes the clean picture to be at `frames` steps, as film strips."""
        if not recipes:
            raise GuidanceError("there is no method to follow: give at least one.")
        rows, sides, noise = [], [], {}
        chosen = spread(min(recipe.steps for recipe in recipes), frames)
        with self._lock:
            for number, recipe in enumerate(recipes):
                strip: dict[int, Image.Image | None] = {}

                def look(step: Step, guided: Prediction, strip: Any = strip) -> None:
                    if step.stage == 0 and step.index in chosen:
                        strip[step.index] = preview(step, guided)
                        noise[step.index] = f"noise {step.nsr:.3g}" if step.grid else ""

                picture = self._run(recipe, number, len(recipes), tell, look)
                rows.append([*map(strip.get, chosen), picture.image])
                sides.append(Label(recipe.guidance))
                heads = [Label(f"step {index + 1}", (noise[index],)) for index in chosen]
                corner = Label("prediction of x0", (recipe.prompt, f"seed {recipe.seed}"))
                sheet = draw_grid(rows, sides, [*heads, Label("picture")], corner)
                tell(sheet)
        return sheet

    def cost(self, recipes: Sequence[Recipe]) -> Cost:
        """What pictures will take, before they are made."""
        rows = [each.steps * evaluations(parse(each.guidance), each.steps) for each in recipes]
        each = [self.seconds_per_row.get(recipe.model) for recipe in recipes]
        known = [n * seconds for n, seconds in zip(rows, each, strict=True) if seconds is not None]
        seconds = sum(known) if len(known) == len(rows) else None
        return Cost(len(rows), sum(rows), seconds)

    def scale_name(self) -> str:
        """What the loaded pipeline calls its CFG scale."""
        return "guidance_scale" if self._pipe is None else scale_name(self._pipe)

    def _run(
        self,
        recipe: Recipe,
        number: int,
        of: int,
        tell: Tell,
        look: Callable[[Step, Prediction], None] | None = None,
    ) -> Picture:
        """One picture; `tell` gets a `Glimpse` after every step, and may raise to stop."""
        pipe = self._ready(recipe)
        due = 0.0

        def watch(step: Step, guided: Prediction) -> None:
            nonlocal due
            if look is not None:
                look(step, guided)
            started = time.monotonic()
            if started < due:
                tell(None)
                return
            seen = preview(step, guided)
            tell(Glimpse(number, of, step.index + 1, step.total, seen))
            took = time.monotonic() - started
            due = time.monotonic() + max(EVERY, 5 * took)  # a slow decoder is asked less often

        picture = run(pipe, recipe, watch)
        if picture.evaluations:
            self.seconds_per_row[recipe.model] = picture.seconds / picture.evaluations
        return picture


def spread(steps: int, frames: int) -> list[int]:
    """Up to `frames` indices of steps, evenly spread from the first to the last."""
    frames = min(frames, steps)
    return [round(i * (steps - 1) / max(1, frames - 1)) for i in range(frames)]


def preview(step: Step, guided: Prediction) -> Image.Image | None:
    """What the run takes its first clean picture to be, or None where it cannot be decoded."""
    try:
        pixels = step.decode(guided.x0[:1])[0]
    except GuidanceError:
        return None
    array = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def _as_strong(result: Result) -> Recipe:
    """Plain CFG at the mean effective scale of a result."""
    scale = round(max(result.scale, 0.0), 2)
    return replace(result.picture.recipe, guidance=f"CFG(scale={scale})")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes"
