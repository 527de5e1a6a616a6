"""CFG++, arXiv:2406.08070, for every scheduler whose step it can correct afterwards."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import Annotated, Literal

from torch import Tensor

from .. import schedules
from ..errors import GuidanceError
from ..guidance import Guidance, Preset, State
from ..parameters import Range
from ..schedules import Schedule, scale_at
from ..step import Moment, Prediction, Step
from ..tensors import TINY


class Renoising(Guidance):
    """Denoise with guidance, re-noise without: what CFG++ and the annealed scale share.

    The scheduler steps on the unconditional prediction; then the clean estimate moves by
    lambda (x0_cond - x0_uncond) at fixed noise. Towards noise (DDIM inversion) it is the other way
    about, which undoes such a step: the noise moves by lambda (eps_cond - eps_uncond). Subclasses
    say what lambda is.
    """

    edits_latents = True
    solver = "renoising"

    def strength_at(self, step: Step) -> Tensor | float:
        """Lambda: a number, or one per sample [B, 1, ...]."""
        raise NotImplementedError

    def guide(self, step: Step, state: State) -> Prediction:
        return step.uncond

    def after_step(self, step: Step, latents: Tensor, state: State) -> Tensor:
        strength, cond, uncond = self.strength_at(step), step.cond, step.uncond
        if step.next_level.nsr > step.level.nsr:
            return step.renoise_next(latents, strength * (cond.eps - uncond.eps))
        return step.shift_next(latents, strength * (cond.x0 - uncond.x0))

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> Tensor | float:
        """The CFG scale that a first-order deterministic step would need for the same result."""
        scale = self.strength_at(step) * gains(step.grid)[step.index]
        return scale.flatten() if isinstance(scale, Tensor) else scale


class CFGPlusPlus(Renoising):
    """CFG++: denoise with guidance, re-noise without it, arXiv:2406.08070 Algorithm 1.

    The solver steps on the unconditional prediction; then the clean estimate moves by
    lambda (x0_cond - x0_uncond) at fixed noise. This holds for schedulers that keep no latents of
    their own: DDIM, DDPM, Euler, Euler ancestral, LMS, DPM++ multistep, DEIS, LCM, TCD, EDM's and
    flow Euler; Heun, KDPM2, UniPC, PNDM and singlestep DPM are refused. On Diffusers'
    DDIMInverseScheduler it is the official code's inversion, at the same lambda as the way back.

    In a deterministic first-order step CFG++ at lambda is CFG at lambda / (1 - nsr'/nsr), so its
    strength grows with the number of steps; on LCM, which draws new noise, CFG at lambda. With
    `strength="lambda"` the scale is the paper's lambda (0.6 at 50 DDIM steps of SD). With
    `strength="equivalent_cfg"`, or a scale of None, it is a CFG scale w, and lambda is w over the
    median gain of the run's steps (our rule): the same strength at any number of steps.
    Cost: 2 network evaluations per step, at every scale.
    Oracle: Algorithm 1 in loops by hand: DDIM, Euler, Euler ancestral, DPM++ 2M.
    """

    name = "cfg++"
    paper = "arXiv:2406.08070"
    presets = {
        family: Preset({"scale": 0.6}, "CFGpp-diffusion/CFGpp README, 50 DDIM steps")
        for family in ("sd15", "sd21", "sdxl")
    }
    presets["sdxl-lightning"] = Preset({"scale": 1.0}, "CFGpp-diffusion/CFGpp, 4 steps")

    def __init__(
        self,
        scale: Annotated[
            float | Schedule | None,
            Range(0, slider=(0, 2)),
            "lambda, or a CFG scale (see strength); None is the pipeline's guidance_scale",
        ] = None,
        strength: Annotated[Literal["lambda", "equivalent_cfg"], "what the scale means"] = "lambda",
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.strength = strength

    def lam(self, step: Moment) -> float:
        """The paper's lambda at this step."""
        if self.strength == "lambda" and self.scale is not None:
            return scale_at(self.scale, step)
        return scale_at(self.scale, step) / typical_gain(step.grid)

    def strength_at(self, step: Step) -> float:
        return self.lam(step)

    def guide(self, step: Step, state: State) -> Prediction:
        if step.index == 0 and self.lam(step) * typical_gain(step.grid) > 40:
            step.warn(
                f"{self!r}: lambda = {self.lam(step):g} is as strong as a CFG scale of "
                f"{self.lam(step) * typical_gain(step.grid):.0f} over {step.total} steps. "
                'For CFG scales write CFGPlusPlus(scale, strength="equivalent_cfg").'
            )
        return step.uncond


def gains(grid: tuple[float, ...]) -> list[float]:
    """CFG scale per unit of lambda at each step, 1 / (1 - nsr'/nsr), nsr/nsr' towards noise."""
    if not grid:
        raise GuidanceError(
            "CFG++ needs the noise level of each step, which is unknown for this scheduler: "
            "use DDIM, Euler, DPM++ or a flow-matching Euler scheduler."
        )
    steps = ((min(pair), max(pair)) for pair in pairwise(grid))
    ratios = (0.0 if math.isinf(noisier) else clean / noisier for clean, noisier in steps)
    return [1 / max(1 - ratio, TINY) for ratio in ratios]  # some schedules end with a level twice


def typical_gain(grid: tuple[float, ...]) -> float:
    """The median gain of a run, R(N): 12.8 for 50 DDIM steps of Stable Diffusion."""
    return statistics.median(gains(grid))
