"""The world of scenes: what can be in a picture, and the captions that describe it.

A scene holds one or two things on a plain background. Every attribute comes from a short closed
vocabulary, so what a picture shows can be compared with what its caption asked for, exactly.

    scene    = sample_scene(rng)                 # every attribute set
    text     = caption(scene, rng)               # names a random subset of them
    partial  = parse(text)                       # the named attributes; the others are None
    assert fits(scene, partial)

The grammar, in lower case words::

    caption = thing [("and" | "left of" | "above") thing] ["on a" background "background"]
    thing   = ("a" | "an") [size] [texture] [colour] (shape | "shape")
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = {
    "red": (222, 42, 46),
    "orange": (246, 134, 28),
    "yellow": (248, 214, 44),
    "green": (44, 160, 66),
    "cyan": (40, 200, 214),
    "blue": (42, 92, 228),
    "purple": (136, 62, 200),
    "pink": (248, 128, 190),
    "brown": (134, 84, 46),
    "grey": (146, 148, 154),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("left of", "above")
BACKGROUNDS = {
    "black": (20, 20, 22),
    "navy": (18, 28, 78),
    "forest": (14, 54, 36),
    "plum": (66, 20, 62),
    "white": (246, 246, 244),
    "mint": (196, 240, 214),
    "sky": (190, 222, 250),
    "peach": (252, 218, 192),
}

ANY_SHAPE = "shape"  # the noun that leaves the shape free: "a red shape"

# The attributes of a thing in the order a caption names them, with their vocabularies.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
}


@dataclass(frozen=True)
class Thing:
    """One object. None stands for an attribute that a caption leaves free."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; None stands for what a caption leaves free.

    With two things and a relation, the first is the one left of, or above, the second. Two things
    without a relation come in no particular order. One thing has no relation.
    """

    objects: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


def sample_scene(rng: np.random.Generator, things: int | None = None) -> Scene:
    """A scene with every attribute drawn uniformly; `things` is 1 or 2, None draws that too."""
    count = things or int(rng.integers(1, 3))
    objects = tuple(
        Thing(**{name: str(rng.choice(words)) for name, words in ATTRIBUTES.items()})
        for _ in range(count)
    )
    relation = str(rng.choice(RELATIONS)) if count == 2 else None
    return Scene(objects, relation, str(rng.choice(tuple(BACKGROUNDS))))


def complete(wanted: Scene, rng: np.random.Generator) -> Scene:
    """A full scene from the true distribution given a partial one (from `parse`).

    What is open is uniform and independent of what is named, because so are the scenes, and which
    of its attributes a caption names does not depend on them.
    """
    free = sample_scene(rng, len(wanted.objects))
    objects = tuple(
        Thing(**{name: getattr(want, name) or getattr(drawn, name) for name in ATTRIBUTES})
        for want, drawn in zip(wanted.objects, free.objects, strict=True)
    )
    if len(objects) == 2 and wanted.relation is None and rng.random() < 0.5:
        objects = objects[::-1]
    return Scene(objects, wanted.relation or free.relation, wanted.background or free.background)


def fits(scene: Scene, wanted: Scene) -> bool:
    """Whether a scene shows everything a partial one (from `parse`) asks for."""

    def same(have: object, want: object, names: tuple[str, ...]) -> bool:
        return all(getattr(want, name) in (None, getattr(have, name)) for name in names)

    if len(scene.objects) != len(wanted.objects):
        return False
    if not same(scene, wanted, ("relation", "background")):
        return False
    orders = [wanted.objects]
    if wanted.relation is None:
        orders.append(wanted.objects[::-1])
    return any(
        all(same(a, b, tuple(ATTRIBUTES)) for a, b in zip(scene.objects, order, strict=True))
        for order in orders
    )


# --- captions -----------------------------------------------------------------------------------


def held_out(text: str) -> bool:
    """Whether a caption is kept for evaluation: about one in sixteen, decided by its text alone."""
    return zlib.crc32(text.encode()) % 16 == 0


def caption(
    scene: Scene, rng: np.random.Generator, split: str | None = None, related: float = 0.75
) -> str:
    """A caption that names a random subset of a scene's attributes.

    How much is named varies from caption to caption, from the bare nouns to everything; `related`
    is the chance that the relation of two things is. `split` "train" draws until the caption is not
    held out, "held-out" until it is; None takes any. Raises ValueError for a scene none of whose
    captions is in the split, as far as 500 draws tell.
    """
    for _ in range(500):
        text = _describe(scene, rng, related)
        if split is None or held_out(text) == (split == "held-out"):
            return text
    raise ValueError(f"found no {split} caption for {write(scene)!r}: take another scene.")


def write(scene: Scene) -> str:
    """The caption of a partial scene: names exactly the attributes that are set."""
    text = f" {scene.relation or 'and'} ".join(_noun_phrase(thing) for thing in scene.objects)
    return f"{text} on a {scene.background} background" if scene.background else text


def _describe(scene: Scene, rng: np.random.Generator, related: float) -> str:
    detail = rng.random()  # the chance of naming each optional attribute of this caption

    def keep(value: str | None, chance: float = detail) -> str | None:
        return value if rng.random() < chance else None

    objects = tuple(
        Thing(
            shape=keep(thing.shape, 0.92),
            colour=keep(thing.colour, max(detail, 0.5)),
            size=keep(thing.size),
            texture=keep(thing.texture),
        )
        for thing in scene.objects
    )
    relation = keep(scene.relation, related)
    if len(objects) == 2 and relation is None and rng.random() < 0.5:
        objects = objects[::-1]  # "a star and a ring" promises no order
    return write(Scene(objects, relation, keep(scene.background)))


def _noun_phrase(thing: Thing) -> str:
    words = [thing.size, thing.texture, thing.colour, thing.shape or ANY_SHAPE]
    words = [word for word in words if word]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


# --- parsing ------------------------------------------------------------------------------------


def parse(text: str) -> Scene:
    """The partial scene that a caption names.

    Letter case and the punctuation ``, .`` do not matter. Raises ValueError for a text outside
    the grammar, saying what was found and what was expected there.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    at = 0

    def fail(expected: str) -> ValueError:
        found = f"{words[at]!r} (word {at + 1})" if at < len(words) else "the end"
        return ValueError(f"caption {text!r}: expected {expected}, found {found}")

    def take(*choices: str) -> str | None:
        """The next word or words if they are one of the choices, else None."""
        nonlocal at
        for choice in choices:
            phrase = choice.split()
            if words[at : at + len(phrase)] == phrase:
                at += len(phrase)
                return choice
        return None

    def require(*choices: str) -> str:
        word = take(*choices)
        if word is None:
            raise fail(" or ".join(choices))
        return word

    def thing() -> Thing:
        require("a", "an")
        named = {name: take(*ATTRIBUTES[name]) for name in ("size", "texture", "colour")}
        shape = take(*SHAPES, ANY_SHAPE)
        if shape is None:
            optional = [
                "/".join(words_) for name, words_ in ATTRIBUTES.items() if not named.get(name)
            ]
            raise fail(f"one of {', '.join(optional)} or {ANY_SHAPE!r}")
        return Thing(shape=None if shape == ANY_SHAPE else shape, **named)

    objects = [thing()]
    joint = take("and", *RELATIONS)
    if joint:
        objects.append(thing())
    background = None
    if take("on a", "on an"):
        background = require(*BACKGROUNDS)
        require("background")
    if at < len(words):
        expected = [] if background else ["'on a ... background'"]
        if not joint and not background:
            expected += ["'and'", "'left of'", "'above'"]
        raise fail(" or ".join([*expected, "the end"]))
    return Scene(tuple(objects), joint if joint in RELATIONS else None, background)
