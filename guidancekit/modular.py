"""Any strategy as a guider of Modular Diffusers.

>>> pipe.update_components(guider=as_guider(APG(scale=12)))

Diffusers' guiders see predictions only: not the latent, nor the noise level, so that what works on
the clean prediction (APG) or on the step (CFG++) is out of their reach. This one brings its own
view: it asks the pipeline for both branches, and the engine that guides the classic pipelines finds
the network and the scheduler among the running pipeline's components.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from .engine import Attachment
from .engine.frames import pipeline_of
from .errors import GuidanceError
from .guidance import Guidance
from .registry import parse


def as_guider(guidance: Guidance, guidance_scale: float = 7.5) -> Guider:
    """A Diffusers guider that guides as `guidance` does.

    `guidance_scale` stands in for the one that classic pipelines are called with: it is what a
    strategy without a scale of its own uses.
    """
    guider = Guider(guidance=repr(guidance), guidance_scale=guidance_scale)
    guider.guidance = guidance
    return guider


class Guider(BaseGuidance):
    """A guider that guides as the strategy `guidance` does, given as text; see `as_guider`.

    A Modular pipeline evaluates its branches one after the other. In steps that do not use the
    unconditional one it costs nothing.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]
    num_conditions = 2
    is_conditional = True

    @register_to_config
    def __init__(self, guidance: str, guidance_scale: float = 7.5) -> None:
        super().__init__()
        self.guidance = parse(guidance)
        self.guidance_scale = guidance_scale

    def report(self) -> Any:
        """What the last run did; see `Guidance.report`."""
        return self.guidance.report()

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.guidance.detach()
            attachment = Attachment(self.guidance, _running_pipeline(self), once=True)
            self.guidance._attachment = attachment

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        self._check(data)
        names = enumerate(self._input_predictions)
        return [self._prepare_batch(data, i, name) for i, name in names]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        self._check(
            {
                name: tuple(getattr(data, each, None) for each in fields)
                for name, fields in input_fields.items()
                if isinstance(fields, tuple)
            }
        )
        names = enumerate(self._input_predictions)
        return [
            self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in names
        ]

    def _check(self, data: dict[str, Any]) -> None:
        """Both branches must be there: without the negative one, guidance would do nothing."""
        pairs = {name: each for name, each in data.items() if isinstance(each, tuple)}
        lost = [name for name, (cond, uncond) in pairs.items() if (cond is None) < (uncond is None)]
        if lost or not any(uncond is not None for _, uncond in pairs.values()):
            raise GuidanceError(
                f"{self.guidance!r} is for two branches, but this pipeline was called without "
                f"negative {', '.join(lost) or 'embeddings'}: give it a negative prompt."
            )

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor) -> GuiderOutput:
        """The branches as the engine has answered them: both are the guided prediction."""
        pred = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def _running_pipeline(guider: Guider) -> Any:
    """The Modular pipeline that is running with this guider."""
    pipe = pipeline_of(guider)
    if pipe is None:
        raise GuidanceError(
            "This guider is for Modular pipelines: pipe.update_components(guider=as_guider(...)). "
            "On other pipelines, use guidance.attach(pipe)."
        )
    return pipe
