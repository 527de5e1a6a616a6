"""Predictor-corrector guidance, arXiv:2408.09000: CFG as Langevin steps on a powered density."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor

from .. import schedules
from ..guidance import Guidance, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..step import COND, Branch, Moment, Prediction, Step
from ..tensors import Noise


class PCG(Guidance):
    """PCG: a conditional step, then Langevin steps on p(x|c)^q p(x)^(1-q), arXiv:2408.09000.

    The predictor is the scheduler's own step on the conditional prediction. At the level it reaches
    (primed), `corrections` times: g = eps_u + q (eps_c - eps_u), x <- x - e/2 g/sigma' + sqrt(e) n,
    with e = sigma^2 - (alpha/alpha')^2 sigma'^2, at most `step_cap` sigma'^2. Noise space.

    The scale is a CFG scale w and q = 2w - 1: with one correction and many steps this is CFG with
    DDPM at w (our derivation; the paper's statement of it, and its algorithm, are unverified). More
    corrections come closer to the density of power q. The authors call it a view of CFG, not an
    efficient sampler: 200 steps or more are faithful. `step_cap` 1 is ours: uncapped, the last
    steps diverge. Only for schedulers whose step is first-order and deterministic: DDIM at eta 0,
    Euler, EDM Euler, flow Euler. Sample i of a batch draws its noise from `seed` + i. No presets
    were published.
    Cost: 1 + 2 `corrections` network evaluations per step, 1 + `corrections` where w = 1; 1 in the
    last.
    Oracle: DDIM and flow loops by hand; the final variance of exact Gaussians.
    """

    name = "pcg"
    paper = "arXiv:2408.09000"
    edits_latents = True
    solver = "first order"
    evaluates = ("uncond",)

    def __init__(
        self,
        scale: AnyScale = None,
        corrections: Annotated[int, Range(0, 100, slider=(0, 5)), "Langevin steps per step"] = 1,
        step_cap: Annotated[
            float, Range(0, 4, slider=(0.1, 2)), "largest Langevin step, in sigma'^2; 4 diverges"
        ] = 1.0,
        seed: Annotated[int, Range(0, 2**62, slider=(0, 100)), "of the Langevin noise"] = 0,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.corrections = corrections
        self.step_cap = step_cap
        self.seed = seed

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def acts(self, moment: Moment, state: State) -> bool:
        return self.corrections > 0

    def guide(self, step: Step, state: State) -> Prediction:
        return step.cond

    def after_step(self, step: Step, latents: Tensor, state: State) -> Tensor:
        level = step.next_level
        if not self.corrections or level.sigma == 0 or step.next_timestep is None:
            return latents
        if not hasattr(state, "noise"):
            state.noise = Noise(self.seed, self.name)
        timestep = step.next_timestep
        if step.kind == "flow":
            timestep = step.flow_timestep(level.sigma)
        there = {"timestep": timestep, "level": level}
        power = 2 * scale_at(self.scale, step) - 1
        e = step.sigma**2 - (step.alpha / level.alpha * level.sigma) ** 2
        e = min(max(e, 0.0), self.step_cap * level.sigma**2)
        x = latents.float() / level.scale
        for _ in range(self.corrections):
            eps = step.evaluate("cond", x=x, **there).eps
            if power != 1:
                uncond = step.evaluate("uncond", x=x, **there).eps
                eps = uncond + power * (eps - uncond)
            x = x - e / (2 * level.sigma) * eps + math.sqrt(e) * state.noise(x)
        return (level.scale * x).to(latents.dtype)

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> float:
        """The CFG scale under DDPM that this stands for."""
        return scale_at(self.scale, step) if self.corrections else 1.0
