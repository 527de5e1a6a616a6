"""The world of scenes as a laboratory: captions, the true distribution, and what pictures show.

Everything here is known exactly but what a picture shows, which a recogniser says that is right in
more than 99 of 100 cases per attribute (`samples/scenes/README.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..errors import GuidanceError
from .metrics import Array

RENDERS = 64  # true pictures per caption that samples are held against
TRUTH_SEED = 11
COMPONENTS = 32  # of the recogniser's 160 features: 89 % of their variance
LAYOUT = "layout"
"""Relation and order of two objects, where a caption leaves both open."""


def world() -> Any:
    """`samples.scenes`, which is in the repository but not in the package."""
    try:
        from samples.scenes import evaluate, recogniser, render, world
    except ImportError as error:
        raise GuidanceError(
            "the world of scenes is not in the installed package: clone the repository of "
            "guidancekit, `pip install -e .` there, and run the command again. Other models are "
            "measured without it: --models NAME --prompts-file FILE."
        ) from error
    return SimpleNamespace(evaluate=evaluate, recogniser=recogniser, render=render, world=world)


def captions(count: int, seed: int = 3) -> list[str]:
    """Held-out captions that leave something open, of one object and of two in turn."""
    here = world()
    kinds = [here.evaluate.held_out_captions(2 * count, things, seed) for things in (1, 2)]
    open_ones = [[text for text in kind if len(free(here.world.parse(text))) > 1] for kind in kinds]
    pairs = zip(*open_ones, strict=False)
    return [text for pair in pairs for text in pair][:count]


def free(wanted: Any) -> list[str]:
    """The factors that a parsed caption leaves open, such as "shape 0" and "background"."""
    names = [
        f"{name} {slot}"
        for slot, thing in enumerate(wanted.objects)
        for name in world().world.ATTRIBUTES
        if getattr(thing, name) is None
    ]
    if wanted.background is None:
        names.append("background")
    if len(wanted.objects) == 2 and wanted.relation is None:
        names.append(LAYOUT)
    return names


def truth(prompt: str, count: int, seed: tuple[int, ...] = (TRUTH_SEED,)) -> Array:
    """Fresh renders of what a caption may mean, uint8 (count, 64, 64, 3)."""
    here, rng = world(), np.random.default_rng([*seed, *prompt.encode()])
    wanted = here.world.parse(prompt) if prompt else None
    scenes = [
        here.world.complete(wanted, rng) if wanted else here.world.sample_scene(rng)
        for _ in range(count)
    ]
    return here.render.render_batch(scenes, rng)


@dataclass(frozen=True)
class Seen:
    """What pictures show: one row each.

    `marks` has, for "count", every attribute and "all", whether what the caption names is right
    (NaN where it names none). `factors` holds for every free factor the number of the value that is
    seen, and -1 where the factor is not free, or the picture has another number of objects.
    `features` (n, COMPONENTS) are principal components of the recogniser's, in units in which all
    scenes have a total variance of 1; `colour_error` see `Judge.colour_error`.
    """

    marks: dict[str, Array]
    factors: dict[str, Array]
    features: Array
    colour_error: Array


class Judge:
    """Looks at pictures of scenes."""

    def __init__(self) -> None:
        self.here = world()
        self.network = self.here.recogniser.load().requires_grad_(False)

    @cached_property
    def vocabularies(self) -> dict[str, tuple]:
        """The values of every factor that can be free."""
        heads = {
            k: v for k, v in self.here.recogniser.HEADS.items() if k not in ("count", "relation")
        }
        layouts = [(r, o) for r in self.here.world.RELATIONS for o in ((0, 1), (1, 0))]
        return {**heads, LAYOUT: tuple(layouts)}

    @cached_property
    def components(self) -> tuple[Array, Array]:
        """Mean (160,) and scaled principal components (160, COMPONENTS) over all scenes."""
        features = self._features(truth("", 2048)).numpy()
        centred = features - features.mean(0)
        vectors = np.linalg.svd(centred, full_matrices=False)[2][:COMPONENTS].T
        return features.mean(0), vectors / np.sqrt(centred.var(0).sum())

    def _features(self, pictures: Array) -> torch.Tensor:
        parts = torch.split(self.here.recogniser.to_input(pictures), 256)
        return torch.cat([self.network.features(part) for part in parts])

    def look(self, pictures: Array, prompts: Sequence[str]) -> Seen:
        """What uint8 pictures (n, 64, 64, 3) show; the empty prompt leaves everything open."""
        features = self._features(pictures)
        mean, components = self.components
        scenes = self.here.recogniser.scenes(self.network.heads(features))
        wanted = {prompt: self.here.world.parse(prompt) for prompt in set(prompts) if prompt}
        names = ("count", *self.here.world.ATTRIBUTES, "relation", "background", "all")
        marks = {name: np.full(len(pictures), np.nan) for name in names}
        factors = {name: np.full(len(pictures), -1) for name in self.vocabularies}
        for i, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
            if not prompt:
                continue
            order, found = self.here.recogniser.match(scene, wanted[prompt])
            for name, right in found.items():
                marks[name][i] = right
            if found["count"]:
                for name, value in self._factors(scene, wanted[prompt], order).items():
                    factors[name][i] = self.vocabularies[name].index(value)
        projected = (features.numpy() - mean) @ components
        return Seen(marks, factors, projected, self.colour_error(pictures, scenes))

    def _factors(self, seen: Any, wanted: Any, order: tuple[int, ...]) -> dict[str, Any]:
        """The values that a scene gives to what a caption leaves open."""

        def value(name: str) -> Any:
            if name == "background":
                return seen.background
            if name == LAYOUT:
                return seen.relation, order
            attribute, slot = name.split()
            return getattr(seen.objects[order[int(slot)]], attribute)

        return {name: value(name) for name in free(wanted)}

    def colour_error(self, pictures: Array, scenes: Sequence[Any]) -> Array:
        """Distance of a picture's colours from the palette's that they are recognised as, (n,).

        Every pixel belongs to the nearest of the scene's colours: the background's, the objects',
        and that of their stripes and dots. Root mean square over the channels, from 0 to 1, of the
        difference between the median of what belongs to a colour and that colour; the mean over
        background and objects. True pictures have some too: the world varies its colours a little.
        """
        found = np.empty(len(pictures))
        for i, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
            objects = {self.here.world.COLOURS[thing.colour] for thing in scene.objects}
            plain = np.array([self.here.world.BACKGROUNDS[scene.background], *objects]) / 255
            colours = np.concatenate([plain, self.here.render.second_shade(plain[1:])])
            pixels = picture.reshape(-1, 3) / 255
            nearest = np.square(pixels[:, None] - colours).sum(-1).argmin(1)
            medians = [
                (np.median(pixels[nearest == k], axis=0), colour)
                for k, colour in enumerate(plain)
                if (nearest == k).any()
            ]
            found[i] = np.mean([np.sqrt(np.square(a - b).mean()) for a, b in medians])
        return found
