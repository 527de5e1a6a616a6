"""Grids over any two settings: what stands along the axes, and the pictures in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from . import bundled
from .compare import split_methods
from .editing import changed, settings, terms_of
from .errors import GuidanceError
from .generate import Picture, follows_pipeline, with_scale
from .grid import Label, Layout
from .guidance import Guidance
from .loading import check_scheduler
from .parameters import value_of
from .recipe import Recipe, installed_versions
from .registry import parse

FIELDS = {"prompt": str, "negative": str, "seed": int, "steps": int, "scheduler": str}


@dataclass(frozen=True)
class Axis:
    """What varies along one side of a grid: `name` and its `values`.

    Names are those of `names_of`: "method", "scale" (the CFG scale, whether the method has it or
    the pipeline), a field of the recipe, or a parameter of the recipe's method such as "eta", which
    is "sag.eta" where several terms have one.
    """

    name: str
    values: tuple[Any, ...]

    @classmethod
    def read(cls, name: str, text: str) -> Axis:
        """An axis from text: values stand between commas, prompts between bars (|)."""
        name = name.strip()
        if name == "method":
            values: list[Any] = split_methods(text)
        elif name in ("prompt", "negative"):
            values = [part.strip() for part in text.split("|")]
        else:
            values = [value_of(part) for part in split_methods(text)]
        if not values:
            raise GuidanceError(f"axis {name}: found no values, expected some, such as 2, 4, 8.")
        return cls(name, tuple(values))

    def labels(self) -> list[str]:
        """What stands beside the pictures."""
        if self.name in ("method", "prompt"):
            return [str(value) for value in self.values]
        return [f"{self.name} {_shown(value)}" for value in self.values]


NOTHING = Axis("", (None,))
"""The axis of a grid that has one row or column only."""


def names_of(guidance: Guidance) -> list[str]:
    """What can stand on an axis of a grid whose method is `guidance`."""
    own: list[str] = []
    for term in terms_of(guidance):
        for name, value in settings(term).items():
            own.append(f"{term.name}.{name}")
            own += [f"{term.name}.{name}.{inner}" for inner in _inner(value)]
    return ["method", "scale", *FIELDS, *dict.fromkeys(own)]


def at(recipe: Recipe, axis: Axis, value: Any) -> Recipe:
    """`recipe` with `value` of `axis`. Raises `GuidanceError` for what does not fit."""
    if axis.name == "":
        return recipe
    if axis.name == "method":
        guidance, _ = with_scale(str(value), None, family=bundled.family(recipe.model))
        return replace(recipe, guidance=guidance)
    if axis.name in FIELDS:
        if axis.name == "scheduler":
            check_scheduler(str(value))
        kind = FIELDS[axis.name]
        changes: dict[str, Any] = {axis.name: str(value) if kind is str else value}
        return replace(recipe, **changes)
    guidance = parse(recipe.guidance)
    if axis.name == "scale" and follows_pipeline(guidance):
        if not isinstance(value, (int, float)) or not value > 1:
            raise GuidanceError(f"axis scale: found {value!r}, expected numbers above 1.")
        return replace(recipe, guidance_scale=float(value))
    return replace(recipe, guidance=repr(changed(guidance, _path(guidance, axis.name), value)))


@dataclass
class Sheet:
    """A grid of pictures over two axes, once per seed, and those that are finished."""

    base: Recipe
    x: Axis
    y: Axis = NOTHING
    seeds: Sequence[int] = ()
    """Those of the rows; none means the seed of `base`, or what the axes say."""
    pictures: dict[tuple[int, int], Picture] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.x.name == self.y.name:
            raise GuidanceError(f"both axes are {self.x.name!r}: choose two different ones.")
        if self.seeds and "seed" in (self.x.name, self.y.name):
            raise GuidanceError("the seed is on an axis already: give no further seeds.")
        first = sorted((self.x, self.y), key=lambda axis: axis.name != "method")
        self.recipes: list[list[Recipe]] = []
        self.sides: list[Label] = []
        for y, label in zip(self.y.values, self.y.labels(), strict=True):
            for seed in self.seeds or (None,):
                start = self.base if seed is None else replace(self.base, seed=seed)
                row = []
                for x in self.x.values:
                    recipe = start
                    for axis in first:  # a parameter is one of the method's
                        recipe = at(recipe, axis, x if axis is self.x else y)
                    row.append(recipe)
                self.recipes.append(row)
                details = () if seed is None else (f"seed {seed}",)
                named = self.y is not NOTHING
                self.sides.append(Label(label if named else self.base.prompt, details))

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Every (row, column), in the order in which they are drawn."""
        return [(r, c) for r, row in enumerate(self.recipes) for c in range(len(row))]

    @property
    def asked(self) -> list[Recipe]:
        """The recipes of all cells."""
        return [recipe for row in self.recipes for recipe in row]

    def layout(self) -> Layout:
        """The labelled grid; unfinished cells are empty."""
        corner = [f"{self.base.steps} steps"] if "steps" not in self._varied else []
        if "seed" not in self._varied and not self.seeds:
            corner.append(f"seed {self.base.seed}")
        if "prompt" not in self._varied:
            corner.append(self.base.prompt)
        if "method" not in self._varied:
            corner.append(self.base.guidance)
        model = self.base.model.rstrip("/").rpartition("/")[2]
        return Layout(
            [
                [self.pictures[r, c].image if (r, c) in self.pictures else None for c in range(n)]
                for r, n in enumerate(map(len, self.recipes))
            ],
            self.sides,
            [Label(label) for label in self.x.labels()],
            Label(model, tuple(corner)),
        )

    def draw(self) -> Image.Image:
        """The sheet as it stands."""
        return self.layout().draw()

    def to_json(self) -> str:
        """The axes, and recipes, network evaluations and seconds of the finished pictures."""
        content = {
            "versions": installed_versions(),
            "x": {"name": self.x.name, "values": self.x.values},
            "y": {"name": self.y.name, "values": self.y.values},
            "seeds": list(self.seeds),
            "pictures": [
                {"row": row, "column": column, **picture.to_dict()}
                for (row, column), picture in self.pictures.items()
            ],
        }
        return json.dumps(content, indent=2) + "\n"

    @property
    def _varied(self) -> tuple[str, str]:
        return self.x.name, self.y.name


def _path(guidance: Guidance, name: str) -> tuple[int | str, ...]:
    """Where a parameter is: "eta" in the first term that has it, "apg.eta" in the term apg."""
    terms = terms_of(guidance)
    for number, term in enumerate(terms):
        names = name.removeprefix(f"{term.name}.").split(".")
        if names[0] in settings(term):
            return number, *names
    known = ", ".join(names_of(guidance))
    raise GuidanceError(f"axis {name!r}: {guidance!r} has none such. There are: {known}.")


def _inner(value: Any) -> list[str]:
    return list(settings(value)) if hasattr(value, "to_config") else []


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
