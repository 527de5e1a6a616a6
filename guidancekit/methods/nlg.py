"""Noise-level guidance of the initial noise, arXiv:2509.13936."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor

from .. import schedules
from ..errors import GuidanceError
from ..guidance import Companion, Preset, State
from ..parameters import Range
from ..schedules import AnyScale
from ..step import FLOWS, Branch, Step
from ..tensors import Noise, norm
from .apg import cap


class NLG(Companion):
    """NLG: refine the initial noise before sampling, then plain CFG, arXiv:2509.13936.

    `refinements` times: g = eps_cond - eps_uncond at the noise z, its norm capped at `clip`;
    z <- z - step_size g + sqrt(noise) n; then back to the shell ||z|| = sqrt(elements), all per
    sample. For flow models eps_cond = eps_uncond at pure noise; g is x0_uncond - x0_cond there (our
    form, unverified). Made for runs that start from noise: others are refused.

    With scale None it leaves the guiding to the other terms of a sum, and alone is CFG at the
    pipeline's scale. Defaults: the official code's (the paper's tables are unverified), except that
    n is fresh every time, as in its notebook; its script repeats one draw. Sample i of a batch has
    the seed `seed` + i.
    Cost: 2 network evaluations per step, as CFG, and 2 `refinements` once before the first.
    Oracle: loops by hand for epsilon and v models; for flow models our formula.
    """

    name = "nlg"
    paper = "arXiv:2509.13936"
    presets = {
        "sd21": Preset(
            {"refinements": 20, "step_size": 1.0, "clip": 0.5, "noise": 0.001},
            "official code: SD 2.1 notebook, 20 DPM++ steps",
        ),
        "scenes": Preset({"refinements": 5}, "ours: with 20, objects go missing now and then"),
    }

    def __init__(
        self,
        scale: AnyScale = None,
        refinements: Annotated[int, Range(0, 1000, slider=(0, 40)), "moves of the noise"] = 20,
        step_size: Annotated[
            float, Range(0, slider=(0, 4)), "length of a move in units of g"
        ] = 1.0,
        clip: Annotated[float, Range(0, slider=(0, 5)), "largest norm of g; 0: no cap"] = 0.5,
        noise: Annotated[float, Range(0, 1, slider=(0, 0.01)), "variance added per move"] = 0.001,
        seed: Annotated[int, Range(0, 2**62, slider=(0, 100)), "of the added noise"] = 0,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.refinements = refinements
        self.step_size = step_size
        self.clip = clip
        self.noise = noise
        self.seed = seed

    @property
    def evaluates(self) -> tuple[Branch, ...]:  # type: ignore[override]
        return ("uncond",) if self.refinements else ()

    def before_step(self, step: Step, state: State) -> Tensor:
        if step.index > 0 or step.stage > 0 or not self.refinements:
            return step.x
        if step.grid and step.nsr < 1:
            raise GuidanceError(
                f"{self!r} refines pure noise, but this run starts from an image: its first noise "
                f"level is {step.nsr:.2g}. Use it for text-to-image."
            )
        z, draw = step.x, Noise(self.seed, self.name)
        radius = math.sqrt(z[0].numel())
        for _ in range(self.refinements):
            cond, uncond = (step.evaluate(branch, x=z) for branch in ("cond", "uncond"))
            g = uncond.x0 - cond.x0 if step.kind in FLOWS else cond.eps - uncond.eps
            z = z - self.step_size * cap(g, self.clip) + math.sqrt(self.noise) * draw(z)
            z = z * (radius / norm(z))
        return z
