"""What the engine knows of schedulers: noise levels, prediction types, who can be corrected."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from diffusers import schedulers as diffusers_schedulers

from ..errors import GuidanceError
from ..step import Kind, Level

_VARIANCE_EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
)
_FLOW = ("FlowMatchEulerDiscreteScheduler",)

# Schedulers whose step reads nothing but the sample and the predictions it is given, so that a
# correction of the latents after the step is neither lost nor counted twice.
_CORRECTABLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

# Of these, the ones whose step is a straight line to the next noise level.
_FIRST_ORDER = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

_SMALLEST_ALPHA = 2.0**-12  # diffusers' own guard for zero-terminal-SNR schedules


def _is(scheduler: Any, names: tuple[str, ...]) -> bool:
    return any(isinstance(scheduler, getattr(diffusers_schedulers, name)) for name in names)


def correctable(scheduler: Any) -> bool:
    """Whether latents may be edited after this scheduler's step."""
    return _is(scheduler, _CORRECTABLE)


def first_order(scheduler: Any) -> bool:
    """Whether this scheduler's step is first-order and deterministic."""
    return _is(scheduler, _FIRST_ORDER)


def kind(scheduler: Any) -> Kind:
    """What the network predicts."""
    if _is(scheduler, _FLOW) or scheduler.config.get("use_flow_sigmas", False):
        return "flow"
    predicted: Kind = scheduler.config.get("prediction_type", "epsilon")
    return predicted


def levels(scheduler: Any) -> list[tuple[Level, Level]] | None:
    """Noise levels before and after the scheduler step of each entry of `scheduler.timesteps`.

    In network coordinates: alpha^2 + sigma^2 = 1, or alpha + sigma = 1 for flow models. None for a
    scheduler that guidancekit does not know. Reads device tensors, so call it once per run.
    """
    if _is(scheduler, _VARIANCE_EXPLODING):
        chain = [_variance_exploding(sigma) for sigma in scheduler.sigmas.tolist()]
    elif _is(scheduler, _FLOW):
        chain = [Level(1 - sigma, sigma) for sigma in scheduler.sigmas.tolist()]
    elif hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        pairs = (scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in scheduler.sigmas.cpu())
        chain = [Level(float(alpha), float(sigma)) for alpha, sigma in pairs]
    elif hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        return _discrete(scheduler)
    else:
        return None
    return list(pairwise(chain))[: len(scheduler.timesteps)]


def _variance_exploding(sigma: float) -> Level:
    """The network sees x / sqrt(1 + nsr^2), which is variance-preserving."""
    scale = math.sqrt(1 + sigma**2)
    return Level(1 / scale, sigma / scale, scale)


def _discrete(scheduler: Any) -> list[tuple[Level, Level]]:
    """Schedulers indexed by integer timesteps (DDIM, DDPM and their kin)."""
    cumulative = scheduler.alphas_cumprod.tolist()
    times = [int(t) for t in scheduler.timesteps.tolist()]
    if _is(scheduler, ("DDIMScheduler",)):
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        following = [t - stride for t in times]
    else:
        following = [*times[1:], -1]
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))

    if max(times) >= len(cumulative):
        raise GuidanceError(
            f"timestep {max(times)} is beyond the {len(cumulative)} training steps of "
            f"{type(scheduler).__name__}: use fewer steps."
        )

    def level(t: int) -> Level:
        squared = cumulative[t] if t >= 0 else final
        return Level(max(math.sqrt(squared), _SMALLEST_ALPHA), math.sqrt(1 - squared))

    return [(level(t), level(after)) for t, after in zip(times, following, strict=True)]
