"""Time-step guidance, arXiv:2407.02687 Algorithm 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from .. import bundled, schedules
from ..errors import GuidanceError
from ..guidance import Preset, State
from ..parameters import Range
from ..schedules import AnyScale
from ..step import Moment, Prediction, Step
from ..tensors import Noise, std
from ..uncompiled import first_at
from .weak import WeakBranch

_MISSING = "time embedding that TSG knows"
_NAMES = (
    "time_embedding",
    "time_embedder",
    "timestep_embedder",
    "time_embed",
    "time_step_proj",
    "t_embedder",
)


_TABLE = "arXiv:2407.02687 Table 11"


class TSG(WeakBranch):
    """Time-step guidance: away from a network that is unsure of the time, arXiv:2407.02687 Alg. 2.

    weak + w (cond - weak), where weak is the same network at the same x_t and condition, but with
    strength * tau^power * std(e) n added to the time embedding e (tau = t/1000, n normal, fresh
    every step). Works without a condition too. Free of the space. Only while low <= t <= high.

    Read from the paper rather than stated there: tau is normalised, and e is what the blocks get,
    after the time MLP and before other embeddings join. The standard deviation is the sample's, not
    the batch's. The restriction to the first layers is left out. Flow models, which the paper does
    not try, take the flow time for tau (unverified).
    Defaults: Table 11, text-conditional Stable Diffusion, without CFG. The noise is reused in the
    stages of a solver step; sample i of a batch has the seed `seed` + i.
    Cost: 2 network evaluations per step inside the window, 1 outside.
    Oracle: a loop by hand with the same noisy embeddings.
    """

    name = "tsg"
    joins = True
    paper = "arXiv:2407.02687"
    presets = {
        family: Preset(
            dict(zip(("scale", "low", "high", "strength", "power"), values, strict=True)), source
        )
        for family, values, source in (
            (
                "sd21",
                (4.0, 400.0, 1000.0, 3.0, 0.25),
                f"{_TABLE}, version inferred from its Table 8",
            ),
            ("sd21-unconditional", (3.0, 100.0, 900.0, 1.25, 0.0), f"{_TABLE}, empty prompts"),
            ("dit", (2.5, 0.0, 1000.0, 2.0, 1.0), f"{_TABLE}, in the first layers only"),
            ("dit-unconditional", (5.0, 200.0, 800.0, 1.0, 0.0), f"{_TABLE}, first layers only"),
            *(
                (family, (2.0, 100.0, 900.0, 1.25, 0.0), "ours: sd21's without a prompt, at w = 2")
                for family in bundled.FAMILIES.values()
            ),
        )
    }

    def __init__(
        self,
        scale: AnyScale = 4.0,
        low: Annotated[float, Range(0, 1000), "last timestep that is guided"] = 400.0,
        high: Annotated[float, Range(0, 1000), "first timestep that is guided"] = 1000.0,
        strength: Annotated[float, Range(0, slider=(0, 5)), "noise in standard deviations"] = 3.0,
        power: Annotated[float, Range(0, slider=(0, 2)), "how fast the noise fades"] = 0.25,
        seed: Annotated[int, Range(0, 2**62, slider=(0, 100)), "of the noise"] = 0,
    ) -> None:
        if low > high:
            raise GuidanceError(f"TSG(low={low:g}, high={high:g}): low must not be above high.")
        self.scale = schedules.from_config(scale)
        self.low = low
        self.high = high
        self.strength = strength
        self.power = power
        self.seed = seed

    @property
    def scheduled(self) -> bool:
        return True  # the window

    def acts(self, moment: Moment, state: State) -> bool:
        inside = self.low <= moment.time <= self.high
        return inside and self.strength > 0 and super().acts(moment, state)

    def check(self, step: Step) -> None:
        with step.around(is_time_embedding, lambda layer: None, what=_MISSING):
            pass

    def before_step(self, step: Step, state: State) -> Tensor:
        x = super().before_step(step, state)
        if self.acts(step, state):
            self._measure(step, state)
        return x

    def _measure(self, step: Step, state: State) -> None:
        """Once per run: what the time embedding looks like, so that its noise can be drawn outside
        of the network, where it breaks no compiled graph."""
        if not hasattr(state, "draw"):
            state.draw, evaluation = Noise(self.seed, self.name), partial(step.evaluate, "cond")
            state.like = first_at(step, is_time_embedding, evaluation, embedding, _MISSING)

    def weak(self, step: Step, state: State) -> Prediction:
        self._measure(step, state)
        if step.stage == 0 and state.like is not None:
            size = self.strength * (step.time / 1000) ** self.power
            state.noise = size * state.draw(state.like)

        def perturbed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
            given = layer(*args, **kwargs)
            e = given.float()
            return (e + std(e) * state.noise).to(given.dtype)  # one draw for all such layers

        within = step.around(is_time_embedding, perturbed, what=_MISSING)
        return step.evaluate("cond", within=within)


def embedding(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """What a layer puts out."""
    found: Tensor = layer(*args, **kwargs)
    return found


def is_time_embedding(name: str, module: nn.Module) -> bool:
    """Whether a layer embeds the time, not sizes, guidance scales or frames (same class)."""
    embeds = isinstance(module, TimestepEmbedding) or type(module).__name__ == "TimestepEmbedder"
    return embeds and name.rpartition(".")[2] in _NAMES
