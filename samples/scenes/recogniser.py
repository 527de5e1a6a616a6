"""Says what is in a picture of a scene, and whether that is what a caption asked for.

Use it as::

    recogniser = load()
    seen = recogniser.recognise(pictures)                      # one full Scene per picture
    marks = recogniser.score(pictures, ["a red star", ...])    # one dict per picture
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .world import ATTRIBUTES, BACKGROUNDS, RELATIONS, Scene, Thing, parse

WEIGHTS = Path(__file__).with_name("recogniser.safetensors")

# Each output head: its name and vocabulary. Slot 0 is the left or upper object, or the only one.
HEADS: dict[str, tuple] = {
    "count": (1, 2),
    "relation": RELATIONS,
    "background": tuple(BACKGROUNDS),
    **{f"{name} {slot}": words for slot in range(2) for name, words in ATTRIBUTES.items()},
}
ABSENT = -100  # the target of a head that has nothing to say; cross_entropy ignores it


class Recogniser(nn.Module):
    """A small convolutional network with one classifier per attribute, about 0.64M parameters."""

    def __init__(self) -> None:
        super().__init__()

        def block(inward: int, outward: int, stride: int, kernel: int = 3) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inward, outward, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(outward),
                nn.ReLU(),
            )

        self.layers = nn.Sequential(
            block(3, 32, 2, kernel=5),
            block(32, 64, 2),
            block(64, 64, 1),
            block(64, 96, 2),
            block(96, 96, 1),
            block(96, 128, 2),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, 160),
            nn.ReLU(),
            nn.Linear(160, sum(len(words) for words in HEADS.values())),
        )

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits per head, each (n, vocabulary), of pictures (n, 3, 64, 64) in [-1, 1]."""
        return self.heads(self.features(pictures))

    def features(self, pictures: Tensor) -> Tensor:
        """What all heads read, (n, 160), of pictures (n, 3, 64, 64) in [-1, 1]."""
        return self.layers[:-1](pictures)

    def heads(self, features: Tensor) -> dict[str, Tensor]:
        """Logits per head, each (n, vocabulary), of features (n, 160)."""
        logits = self.layers[-1](features).split([len(words) for words in HEADS.values()], dim=1)
        return dict(zip(HEADS, logits, strict=True))

    @torch.no_grad()
    def recognise(self, pictures: Sequence | np.ndarray) -> list[Scene]:
        """What each picture shows, every attribute set.

        Pictures are PIL images or arrays of shape (64, 64, 3): uint8, or floats in [0, 1].
        """
        return scenes(self(to_input(pictures)))

    def score(
        self, pictures: Sequence | np.ndarray, wanted: Sequence[str | Scene]
    ) -> list[dict[str, bool]]:
        """For each picture, which of the attributes that its caption names are right.

        Captions that are not parsed yet are; see `marks` for the meaning of the entries.
        """
        asked = [parse(item) if isinstance(item, str) else item for item in wanted]
        seen = self.recognise(pictures)
        return [marks(*pair) for pair in zip(seen, asked, strict=True)]


def load(path: Path = WEIGHTS) -> Recogniser:
    """The trained recogniser, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    model = Recogniser()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def to_input(pictures: Sequence | np.ndarray) -> Tensor:
    """PIL images or arrays (64, 64, 3), uint8 or floats in [0, 1], as the network's input."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    if array.shape[1:] != (64, 64, 3):
        raise ValueError(f"pictures must be of shape (64, 64, 3), these are {array.shape[1:]}")
    scale = 255 if array.dtype == np.uint8 else 1
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / scale * 2 - 1


def scenes(logits: dict[str, Tensor]) -> list[Scene]:
    """The most likely scenes, every attribute set."""
    found = {name: each.argmax(1).tolist() for name, each in logits.items()}

    def word(head: str, i: int) -> str:
        return HEADS[head][found[head][i]]

    result = []
    for i in range(len(found["count"])):
        count = HEADS["count"][found["count"][i]]
        objects = tuple(
            Thing(**{name: word(f"{name} {slot}", i) for name in ATTRIBUTES})
            for slot in range(count)
        )
        relation = word("relation", i) if count == 2 else None
        result.append(Scene(objects, relation, word("background", i)))
    return result


def marks(seen: Scene, wanted: Scene) -> dict[str, bool]:
    """Which attributes of `wanted` a fully described scene gets right.

    Only what `wanted` names is present, plus "count" and "all". An attribute of two objects is
    right when it is for both; see `match` for which is which.
    """
    return match(seen, wanted)[1]


def match(seen: Scene, wanted: Scene) -> tuple[tuple[int, ...], dict[str, bool]]:
    """Which object of `seen` is taken for each one of `wanted`, and the marks of that.

    It is the order that gets most right; when a relation is named, the reverse order makes the
    relation wrong.
    """

    def attempt(order: tuple[int, ...]) -> dict[str, bool]:
        result = {"count": len(seen.objects) == len(wanted.objects)}
        for name in ATTRIBUTES:
            pairs = [
                (getattr(want, name), getattr(things[slot], name))
                for want, slot in zip(wanted.objects, order, strict=True)
                if getattr(want, name)
            ]
            if pairs:
                result[name] = all(want == have for want, have in pairs)
        if wanted.relation:
            result["relation"] = seen.relation == wanted.relation and order == (0, 1)
        if wanted.background:
            result["background"] = seen.background == wanted.background
        return result

    things = seen.objects + (Thing(),) * (len(wanted.objects) - len(seen.objects))
    attempts = {o: attempt(o) for o in permutations(range(len(things)), len(wanted.objects))}
    order, best = max(attempts.items(), key=lambda item: sum(item[1].values()))
    return order, {**best, "all": all(best.values())}


def targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right answer of every head for fully specified scenes, ABSENT where there is none."""

    def answer(scene: Scene, head: str) -> int:
        if head == "count":
            value = len(scene.objects)
        elif head in {field.name for field in fields(Scene)}:
            value = getattr(scene, head)
        else:
            name, slot = head.split()
            here = scene.objects[int(slot) :][:1]  # no object in this slot: nothing to answer
            value = getattr(here[0], name) if here else None
        return ABSENT if value is None else HEADS[head].index(value)

    return {head: torch.tensor([answer(s, head) for s in scenes]) for head in HEADS}
