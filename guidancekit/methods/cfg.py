"""Classifier-free guidance, arXiv:2207.12598 Eq. 6, with the rescaling of arXiv:2305.08891."""

from __future__ import annotations

from typing import Annotated

from .. import schedules
from ..guidance import ClassifierFree, Preset, State
from ..parameters import Range
from ..schedules import AnyScale, Interval, Linear, PowerCosine, scale_at
from ..step import Branch, Moment, Prediction, Step, branches_at
from ..tensors import match_std

_INTERVAL_PAPER = "arXiv:2404.07724 Table 1 and Sec. 4"
_SCHEDULES = "arXiv:2404.13040, known second-hand"
_SCENES = Interval.presets["scenes"]


class CFG(ClassifierFree):
    """Classifier-free guidance: uncond + w (cond - uncond), arXiv:2207.12598.

    Linear, so it is the same in every space. `rescale` (phi) brings the standard deviation of the
    network's output back to the conditional one's, per sample, arXiv:2305.08891 Sec. 3.4; the value
    0.7 recommended with w = 7.5 is known second-hand (unverified).
    Cost: 2 network evaluations per step; 1 where w = 1.
    Oracle: Diffusers' own pipelines, to the last bit; their guidance_rescale; exact Gaussians.
    """

    name = "cfg"
    paper = "arXiv:2207.12598"
    presets = {
        "sdxl-interval": Preset({"scale": Interval(16, 0.28, 5.42)}, f"{_INTERVAL_PAPER}, by eye"),
        "dit-interval": Preset(
            {"scale": Interval(2.5, 0.34, 1.02)}, f"{_INTERVAL_PAPER}, best FID"
        ),
        "dit-interval-dino": Preset(
            {"scale": Interval(4.0, 0.45, 1.23)}, f"{_INTERVAL_PAPER}, best FD-DINOv2"
        ),
        **{
            f"{family}-linear": Preset({"scale": Linear(floor=floor)}, f"{_SCHEDULES}, clamped")
            for family, floor in (("sd15", 2.0), ("sdxl", 4.0), ("sd3", 0.5))
        },
        **{
            f"{family}-power-cosine": Preset({"scale": PowerCosine(power=power)}, _SCHEDULES)
            for family, power in (("sd15", 1.0), ("sdxl", 0.1))
        },
        "scenes-interval": Preset({"scale": Interval(None, **_SCENES.values)}, _SCENES.source),
    }

    def __init__(
        self,
        scale: AnyScale = None,
        rescale: Annotated[float, Range(0, 1), "share of the rescaled prediction (phi)"] = 0.0,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.rescale = rescale

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return branches_at(scale_at(self.scale, moment))

    def guide(self, step: Step, state: State) -> Prediction:
        w = scale_at(self.scale, step)
        guided = step.cfg(w)
        if not self.rescale or w == 1:
            return guided
        return step.predict(out=match_std(guided.out, step.cond.out, self.rescale))
