"""Condition-annealed sampling, arXiv:2310.17347."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from .. import schedules
from ..errors import GuidanceError
from ..guidance import Companion, Preset, State
from ..parameters import Range
from ..schedules import AnyScale
from ..step import COND, Branch, Moment, Step
from ..tensors import TINY, Noise, mean, std


class CADS(Companion):
    """CADS: a noisy condition at first, for diversity, annealed to the clean one, arXiv:2310.17347.

    y <- sqrt(g) y + noise sqrt(1 - g) n with fresh n every step, where g rises from 0 (while
    tau = 1 - progress >= tau2) to 1 (from tau1 on); then the mean and standard deviation of y are
    restored by the share `rescale`. It acts on the condition, so it is free of the space, and adds
    to any method: APG(12) + CADS(). With scale None it leaves the guiding to the other terms, and
    alone is CFG at the pipeline's scale.

    Known second-hand: tau1 0.6, tau2 0.9, noise 0.25 and rescale 1 are those of a web UI for SD at
    w = 9. The noise needs tuning for every text encoder. Pooled embeddings are noised too, as in
    that code; the unconditional branch is not, unless `branches` is "both" (its choice; unverified
    which is the paper's). Mean and deviation are each sample's. Class labels, whose embedding is
    inside the network, are refused. Draws are reused in the stages of a solver step; sample i of a
    batch has the seed `seed` + i.
    Cost: 2 network evaluations per step, as CFG.
    Oracle: its formula by hand, and CFG in a loop by hand under the noised conditions.
    """

    name = "cads"
    paper = "arXiv:2310.17347"
    presets = {
        "sd15": Preset(
            {"scale": 9.0, "tau1": 0.6, "tau2": 0.9, "noise": 0.25}, "sd-webui-cads (third party)"
        ),
        "dit": Preset(
            {"tau1": 0.5, "tau2": 0.9, "noise": 0.15}, "arXiv:2407.02687 App. G, used with ICG"
        ),
    }

    def __init__(
        self,
        scale: AnyScale = None,
        tau1: Annotated[float, Range(0, 1), "noise fraction from which on y is clean"] = 0.6,
        tau2: Annotated[float, Range(0, 1), "noise fraction down to which y is only noise"] = 0.9,
        noise: Annotated[float, Range(0, slider=(0, 0.5)), "noise, in units of y"] = 0.25,
        rescale: Annotated[float, Range(0, 1), "share of the restored mean and deviation"] = 1.0,
        branches: Annotated[Literal["cond", "both"], "which conditions get noise"] = "cond",
        seed: Annotated[int, Range(0, 2**62, slider=(0, 100)), "of the noise"] = 0,
    ) -> None:
        if tau1 >= tau2:
            raise GuidanceError(f"CADS(tau1={tau1:g}, tau2={tau2:g}): tau1 must be below tau2.")
        self.scale = schedules.from_config(scale)
        self.tau1 = tau1
        self.tau2 = tau2
        self.noise = noise
        self.rescale = rescale
        self.branches = branches
        self.seed = seed

    def clean(self, moment: Moment) -> float:
        """g: 0 for a condition of noise, 1 for the clean one."""
        g = (self.tau2 - (1 - moment.progress)) / (self.tau2 - self.tau1)
        return min(max(g, 0.0), 1.0)

    def acts(self, moment: Moment, state: State) -> bool:
        return self.clean(moment) < 1 or self.needs(moment, state) != COND

    def condition(
        self, step: Step, branch: Branch, given: dict[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        if self.clean(step) == 1 or (branch == "uncond" and self.branches == "cond"):
            return given
        noisy = {
            name: self._anneal(y.float(), (branch, name), step, state)
            for name, y in given.items()
            if y.is_floating_point() and y.ndim > 1
        }
        return {**given, **noisy}

    def _anneal(self, y: Tensor, key: tuple[str, str], step: Step, state: State) -> Tensor:
        if not hasattr(state, "drawn"):
            state.draw, state.drawn = Noise(self.seed, self.name), {}
        if step.stage == 0:
            state.drawn[key] = state.draw(y)
        g = self.clean(step)
        noisy = g**0.5 * y + self.noise * (1 - g) ** 0.5 * state.drawn[key]
        restored = (noisy - mean(noisy)) / std(noisy).clamp_min(TINY) * std(y) + mean(y)
        return self.rescale * restored + (1 - self.rescale) * noisy

    def before_step(self, step: Step, state: State) -> Tensor:
        if self.clean(step) < 1 and not hasattr(state, "drawn"):
            raise GuidanceError(
                f"{self!r} noises text embeddings, and found none: this pipeline's network is "
                "conditioned on something else."
            )
        return step.x
