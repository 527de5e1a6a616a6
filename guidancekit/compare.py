"""Compare methods on equal terms: the same prompts, seeds and starting noise in every column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from PIL import Image

from .errors import GuidanceError
from .generate import Picture, follows_pipeline, run, run_together, warm_up, with_scale
from .grid import Label, draw_grid
from .loading import default_scale, load_pipeline
from .recipe import Recipe, installed_versions
from .registry import methods, parse

WIDEST = 10  # columns that are still seen at a glance


@dataclass(frozen=True)
class Column:
    """A method at a scale: `method` as it was asked for, `guidance` and `guidance_scale` as run."""

    method: str
    guidance: str
    guidance_scale: float | None
    optional: bool = False
    """Whether the column is left out where it cannot work, instead of stopping the comparison."""


@dataclass
class Comparison:
    """Rows of recipes times columns of methods, and the pictures that are finished."""

    rows: list[Recipe]
    columns: list[Column]
    pictures: dict[tuple[int, int], Picture] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    """Optional columns that cannot work on these models, and why."""

    def recipe(self, row: int, column: int) -> Recipe:
        """What is run in a cell; the embedded models have a CFG scale of their own."""
        base, chosen = self.rows[row], self.columns[column]
        scale = chosen.guidance_scale
        scale = default_scale(base.model) if scale is None else scale
        return replace(base, guidance=chosen.guidance, guidance_scale=scale)

    def run(
        self, device: str | None = None, together: bool = False
    ) -> Iterator[tuple[Any, tuple[int, int]]]:
        """Make the pictures row by row, so that a column that cannot work fails in the first row.

        Yields (pipeline, cell) before each cell is computed. Models are loaded one at a time. With
        `together`, the columns of a row that share a guidance scale are one pipeline call.
        """
        pipe, loaded = None, None
        for r, base in enumerate(self.rows):
            if base.model != loaded:
                pipe = None  # let go of the last model before the next is loaded
                pipe, loaded = load_pipeline(base, device), base.model
                warm_up(pipe, base)
            for c, column in enumerate(self.columns):
                yield pipe, (r, c)
                if c in self.left_out or (r, c) in self.pictures:
                    continue
                cells = self._beside(r, c) if together else [c]
                try:
                    if len(cells) == 1:
                        self.pictures[r, c] = run(pipe, self.recipe(r, c))
                        continue
                    made = run_together(pipe, [self.recipe(r, each) for each in cells])
                    self.pictures |= {(r, each): made[i] for i, each in enumerate(cells)}
                except GuidanceError as error:
                    if not column.optional:
                        raise
                    self.left_out[c] = str(error)

    def _beside(self, row: int, column: int) -> list[int]:
        """The columns that one call can make with this one; optional ones may fail alone."""
        scale = self.recipe(row, column).guidance_scale
        alike = [
            c
            for c in range(column, len(self.columns))
            if not self.columns[c].optional and self.recipe(row, c).guidance_scale == scale
        ]
        return [column] if self.columns[column].optional else alike

    def draw(self) -> Image.Image:
        """The grid of the finished pictures; unfinished cells are empty.

        Many methods stand below each other instead of side by side.
        """
        several = len({row.model for row in self.rows}) > 1
        shown = [c for c in range(len(self.columns)) if c not in self.left_out]
        corner, first = [], self.rows[0]
        if first.scheduler is not None:
            corner.append(first.scheduler)
        corner.append(f"{first.steps} steps")
        if first.negative:
            corner.append(f"negative: {first.negative}")
        pictures = [[self._image(r, c) for c in shown] for r in range(len(self.rows))]
        sides = [
            Label(row.prompt, (f"seed {row.seed}", *((_short(row.model),) if several else ())))
            for row in self.rows
        ]
        heads = [self._head(c) for c in shown]
        name = Label("guidancekit" if several else _short(first.model), tuple(corner))
        if len(heads) > max(WIDEST, len(sides)):
            below = [Label(each.title, (*each.details, each.foot)) for each in heads]
            return draw_grid([*zip(*pictures, strict=True)], below, sides, name)
        return draw_grid(pictures, sides, heads, name)

    def to_json(self) -> str:
        """Recipes, network evaluations, seconds and effective scales of the finished pictures."""
        content = {
            "versions": installed_versions(),
            "rows": [{"prompt": r.prompt, "seed": r.seed, "model": r.model} for r in self.rows],
            "columns": [
                {
                    "method": column.method,
                    "guidance": column.guidance,
                    "guidance_scale": column.guidance_scale,
                    "left_out": self.left_out.get(c),
                }
                for c, column in enumerate(self.columns)
            ],
            "pictures": [
                {"row": row, "column": column, **picture.to_dict()}
                for (row, column), picture in self.pictures.items()
            ],
        }
        return json.dumps(content, indent=2) + "\n"

    def _image(self, row: int, column: int) -> Image.Image | None:
        picture = self.pictures.get((row, column))
        return None if picture is None else picture.image

    def _head(self, column: int) -> Label:
        """The method and its settings, then the cost of a picture, averaged over the rows."""
        chosen = self.columns[column]
        made = [picture for (_, c), picture in self.pictures.items() if c == column]
        title, settings = _split_settings(chosen.method)
        details = []
        if follows_pipeline(parse(chosen.guidance)):
            scales = sorted({p.recipe.guidance_scale for p in made if p.recipe.guidance_scale})
            details.append(f"w = {' or '.join(f'{scale:g}' for scale in scales)}")
        elif not settings:  # a scale that the method itself was given
            settings = _split_settings(chosen.guidance)[1]
        if settings:
            details.append(settings)
        if not made:
            return Label(title, tuple(details))
        evaluations = mean(picture.evaluations for picture in made)
        seconds = mean(picture.seconds for picture in made)
        cost = f"{evaluations:g} evaluations, {seconds:.2g} s"
        return Label(title, tuple(details), cost)


def make_columns(
    specs: Sequence[str], scales: Sequence[float] = (), family: str | None = None
) -> list[Column]:
    """Methods times scales; a method that names its scales itself gets one column only.

    "all" stands for every method that works without further settings. What is left open is taken
    from the methods' presets for the model `family`.
    Raises `GuidanceError` for an unknown method or an unfit value.
    """
    names = dict.fromkeys(spec for spec in specs if spec != "all")
    rest = dict.fromkeys(name for name in methods() if name not in names)
    columns = []
    for name in [*names, *(rest if "all" in specs else ())]:
        column = Column(name, *with_scale(name, None, family=family), optional=name in rest)
        if not scales or not follows_pipeline(parse(column.guidance)):
            columns.append(column)
        else:
            columns += [
                replace(column, guidance=guidance, guidance_scale=guidance_scale)
                for guidance, guidance_scale in (
                    with_scale(name, scale, family=family) for scale in scales
                )
            ]
    if not columns:
        raise GuidanceError("there is no method to compare: give names, for example cfg,apg.")
    return columns


def split_methods(text: str) -> list[str]:
    """Split at commas outside of parentheses: "cfg, apg(scale=12, eta=0.5)" are two."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1, "[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _split_settings(method: str) -> tuple[str, str]:
    """Name and settings, such as "apg" and "eta=0.5"; a sum is all name."""
    name, _, settings = method.partition("(")
    if " + " in method or not settings:
        return method, ""
    return name.strip(), settings.removesuffix(")")


def _short(model: str) -> str:
    """The last part of a Hub id or a folder."""
    return model.rstrip("/").rpartition("/")[2]
