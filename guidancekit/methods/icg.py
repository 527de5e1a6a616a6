"""Independent condition guidance, arXiv:2407.02687 Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from .. import schedules
from ..errors import GuidanceError
from ..guidance import Preset, State
from ..parameters import Range
from ..schedules import AnyScale
from ..step import Prediction, Step
from ..tensors import Noise, on_device, std
from .weak import WeakBranch

_TABLE = "arXiv:2407.02687 Table 10"


class ICG(WeakBranch):
    """Independent condition guidance: away from a random condition, arXiv:2407.02687 Alg. 1.

    weak + w (cond - weak), where weak is the same network under a condition that has nothing to do
    with the picture, drawn anew for every step and sample: so the pipeline's unconditional pass and
    its training are not needed. Free of the space. All other conditions (sizes, crops) are kept.

    The draw: with `classes`, a random class label (it may be the right one); with `texts`, one of
    these prompts; otherwise normal noise with the standard deviation of the sample's embedding. The
    paper takes that of the whole batch, and random tokens for text; noise did as well in its
    Table 5. Pooled embeddings are drawn likewise (not in the paper: unverified). On `scenes-flow`,
    a joint transformer, noise ruins the pictures, and `texts` much less (ours).
    The default scale None, the pipeline's, follows its advice: that of CFG or slightly less. Draws
    are reused in the stages of a solver step; sample i of a batch has the seed `seed` + i.
    Cost: 2 network evaluations per step; 1 where w = 1.
    Oracle: a loop by hand with the same draws; Diffusers' pipeline with the one text as negative
    prompt.
    """

    name = "icg"
    joins = True
    paper = "arXiv:2407.02687"
    presets = {
        "sd21": Preset({"scale": 3.0}, f"{_TABLE}: Stable Diffusion, with random tokens there"),
        "dit": Preset({"scale": 1.4, "classes": 1000}, f"{_TABLE}: DiT-XL/2"),
        "edm2-xs": Preset({"scale": 1.25, "classes": 1000}, _TABLE),
    }

    def __init__(
        self,
        scale: AnyScale = None,
        classes: Annotated[int | None, Range(2), "how many class labels to draw from"] = None,
        texts: Annotated[Sequence[str] | None, "prompts to draw from"] = None,
        seed: Annotated[int, Range(0, 2**62, slider=(0, 100)), "of the draws"] = 0,
    ) -> None:
        if isinstance(texts, str) or (texts is not None and not all(map(_is_text, texts))):
            raise GuidanceError(f"ICG(texts=...): found {texts!r:.80}, expected a list of prompts.")
        self.scale = schedules.from_config(scale)
        self.classes = classes
        self.texts = texts
        self.seed = seed

    def check(self, step: Step) -> None:
        self._drawable(step)

    def weak(self, step: Step, state: State) -> Prediction:
        if step.stage == 0:
            if not hasattr(state, "noise"):
                state.noise = Noise(self.seed, self.name)
            state.drawn = self._draw(step, state.noise)
        return step.evaluate("cond", conditions=state.drawn)

    def _draw(self, step: Step, noise: Noise) -> dict[str, Tensor]:
        """Random conditions, [B, ...] by argument name."""
        given = self._drawable(step)
        if self.classes is not None:
            return {name: self._classes(y, noise) for name, y in given.items()}
        if self.texts:
            count = next(iter(given.values())).shape[0]
            chosen = [step.encode(self.texts[i]) for i in noise.integers(len(self.texts), count)]
            names = [name for name in given if name in chosen[0]]
            return {name: torch.cat([each[name] for each in chosen]) for name in names}
        return {name: std(y.float()) * noise(y) for name, y in given.items()}

    def _drawable(self, step: Step) -> dict[str, Tensor]:
        """The conditions that are drawn anew: class labels, or embeddings [B, ..., width]."""
        given = step.conditions("cond")
        labels = {name: y for name, y in given.items() if not y.is_floating_point()}
        embeddings = {k: y for k, y in given.items() if y.is_floating_point() and y.ndim > 1}
        found = embeddings if self.classes is None else labels
        if not found:
            raise GuidanceError(
                f"{self!r} found the conditions {', '.join(given) or 'none'}: text embeddings need "
                "no further setting, class labels need ICG(classes=...), and a network without "
                "either cannot be guided this way (TSG can)."
            )
        return found

    def _classes(self, given: Tensor, noise: Noise) -> Tensor:
        assert self.classes is not None
        return on_device(noise.integers(self.classes, given.shape[0]), given)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
