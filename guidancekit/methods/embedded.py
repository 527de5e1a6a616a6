"""A schedule for the guidance scale that distilled models take as an input, arXiv:2210.03142."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .. import schedules
from ..errors import GuidanceError
from ..guidance import Guidance, State
from ..schedules import AnyScale, scale_at
from ..step import COND, Branch, Moment, Prediction, Step


class EmbeddedGuidance(Guidance):
    """Another scale for a distilled model in each step, arXiv:2210.03142 Sec. 3.1.

    Guidance-distilled networks (Flux, HunyuanVideo, latent consistency models) are told a scale and
    predict what CFG at that scale would have made; their pipelines tell them `guidance_scale` in
    all steps. Here they are told `scale`, in the pipeline's units; None, alone or inside a
    schedule, is the pipeline's. An Interval tells them 1 outside: no guidance.

    The schedule over the run is ours: the paper's scale is constant. It acts on the condition only:
    alone the prediction is the conditional one; for true CFG write CFG() + EmbeddedGuidance(...).
    Networks that take no scale are refused.
    Cost: no further network evaluation.
    Oracle: Diffusers' pipelines of Flux, HunyuanVideo and LCM, called at that scale.
    """

    name = "embedded"
    paper = "arXiv:2210.03142"

    def __init__(self, scale: AnyScale = None) -> None:
        self.scale = schedules.from_config(scale)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def acts(self, moment: Moment, state: State) -> bool:
        return self.told(moment) != moment.embedded_scale

    def told(self, moment: Moment) -> float | None:
        """What the network is told; None where it takes no scale."""
        own = moment.embedded_scale
        return None if own is None else scale_at(self.scale, replace(moment, guidance_scale=own))

    def condition(
        self, step: Step, branch: Branch, given: dict[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        told, own = self.told(step), step.embedded_scale
        if not own or told is None or told == own:
            return given
        return {**given, "guidance": given["guidance"] * (told / own)}

    def before_step(self, step: Step, state: State) -> Tensor:
        if step.embedded_scale is None:
            raise GuidanceError(
                f"{self!r} changes the guidance scale that distilled models take as an input "
                "(Flux, HunyuanVideo, LCM), but this network takes none. Use CFG(scale) instead."
            )
        if not step.embedded_scale:
            raise GuidanceError(
                f"{self!r}: the pipeline was called with guidance_scale=0, which does not show the "
                "units of its network. Call it with another one; the scale given here counts."
            )
        return step.x

    def guide(self, step: Step, state: State) -> Prediction:
        return step.cond
