"""Magnitude-aware guidance, arXiv:2508.03442: guide less where the difference is large."""

from __future__ import annotations

from typing import Annotated

from .. import schedules
from ..guidance import ClassifierFree, Preset, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..step import Prediction, Step
from ..tensors import TINY, norm


class MAMBOG(ClassifierFree):
    """MAMBO-G (RAAG): a scale damped by the size of the difference, arXiv:2508.03442.

    In velocity space, per sample: rho = ||v_cond - v_uncond|| / ||v_uncond||, and CFG at
    1 + (w - 1) exp(-damping rho). Made for flow models in few steps, where rho is large at first.

    Defaults: damping 8 is that of Diffusers' guider, under the name MAMBO-G (third party); w is the
    pipeline's. Which of the two names the paper itself carries is unverified.
    Cost: 2 network evaluations per step; 1 where w = 1.
    Oracle: its formula in float64.
    """

    name = "mambo-g"
    paper = "arXiv:2508.03442"
    presets = {"sd35": Preset({"scale": 18.0, "damping": 12.0}, "code of RAAG, 10 steps")}

    def __init__(
        self,
        scale: AnyScale = None,
        damping: Annotated[float, Range(0, slider=(0, 20)), "0 is plain CFG"] = 8.0,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.damping = damping

    def guide(self, step: Step, state: State) -> Prediction:
        w = scale_at(self.scale, step)
        if w == 1 or not self.damping:
            return step.cfg(w)
        cond, uncond = step.cond.v, step.uncond.v
        rho = norm(cond - uncond) / norm(uncond).clamp_min(TINY)
        excess = (w - 1) * (-self.damping * rho).exp()
        return step.predict(v=cond + excess * (cond - uncond))
