"""What the engine knows of schedulers: noise levels, what is predicted, stages, what steps allow.

`SOLVERS` has one row per class of Diffusers schedulers, found by the name of the class or of one
that it derives from. A scheduler that is not there serves every strategy that needs none of this.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ..errors import GuidanceError
from ..step import Kind, Level

if TYPE_CHECKING:
    from ..guidance import Guidance

Levels = list[tuple[Level, Level]]
"""The noise levels before and after the scheduler's step, for each entry of its timesteps."""


# --- noise levels ---------------------------------------------------------------------------------


def levels(scheduler: Any, begin: int = 0) -> Levels | None:
    """Noise levels before and after the scheduler's step for each entry of `scheduler.timesteps`.

    In network coordinates: alpha^2 + sigma^2 = 1, alpha + sigma = 1 for flow models, and
    (data alpha)^2 + sigma^2 = 1 for EDM's preconditioned networks. They are what the scheduler
    itself computes with, also where it tells the network a rounded timestep. `begin` is the first
    executed entry. None for a scheduler that guidancekit does not know. Reads device tensors, so
    call it once per run.
    """
    solver = _solver(scheduler)
    if solver is None:
        return None
    found = solver.levels(scheduler, begin)
    return [(_with_noise(now), after) for now, after in found[: len(scheduler.timesteps)]]


def _with_noise(level: Level) -> Level:
    """Inversion starts at sigma = 0, where a clean latent cannot be written as noise."""
    if level.sigma:
        return level
    return Level(level.alpha, _SMALLEST_SIGMA * level.alpha, level.scale, level.data)


_SMALLEST_SIGMA = 2.0**-12


def _chain(scheduler: Any, level: Callable[[float], Level]) -> Levels:
    """Schedulers that count in sigmas, one more than timesteps."""
    return list(pairwise(level(sigma) for sigma in scheduler.sigmas.tolist()))


def _exploded(sigma: float) -> Level:
    scale = math.hypot(1, sigma)
    return Level(1 / scale, sigma / scale, scale)


def _exploding(scheduler: Any, begin: int) -> Levels:
    """Latents are x0 + sigma eps; the network sees them divided by sqrt(1 + sigma^2)."""
    return _chain(scheduler, _exploded)


def _preserving(scheduler: Any, begin: int) -> Levels:
    """Latents are as the network sees them; sigma is the noise level, or the time of a flow."""
    if scheduler.config.get("use_flow_sigmas", False):
        return _flow(scheduler, begin)
    return _chain(scheduler, lambda sigma: replace(_exploded(sigma), scale=1.0))


def _flow(scheduler: Any, begin: int) -> Levels:
    """Sigma is the share of noise; in Mochi's schedule, of signal."""
    if scheduler.config.get("invert_sigmas", False):
        return _chain(scheduler, lambda sigma: Level(sigma, 1 - sigma))
    return _chain(scheduler, lambda sigma: Level(1 - sigma, sigma))


def _preconditioned(scheduler: Any, begin: int) -> Levels:
    """EDM, arXiv:2206.00364: latents are x0 + sigma eps, the network sees them at unit variance."""
    data = float(scheduler.config.sigma_data)

    def level(sigma: float) -> Level:
        scale = math.hypot(sigma, data)
        return Level(1 / scale, sigma / scale, scale, data)

    return _chain(scheduler, level)


def _midpoint(scheduler: Any, between: Sequence[float]) -> Levels:
    """Second-order solvers that look ahead in every odd entry, at a point before the next sigma."""
    sigmas, count = scheduler.sigmas.tolist(), len(scheduler.timesteps)
    met = [between[i] if i % 2 else sigmas[i] for i in range(count)]
    return list(pairwise(_exploded(sigma) for sigma in (*met, 0.0)))


def _midpoint_next(scheduler: Any, begin: int) -> Levels:
    return _midpoint(scheduler, scheduler.sigmas_interpol.tolist())


def _midpoint_last(scheduler: Any, begin: int) -> Levels:
    return _midpoint(scheduler, [0.0, *scheduler.sigmas_interpol.tolist()])


def _midpoint_log(scheduler: Any, begin: int) -> Levels:
    steps = pairwise(scheduler.sigmas.tolist())
    return _midpoint(scheduler, [0.0, *(math.sqrt(now * after) for now, after in steps)])


def _discrete(scheduler: Any, pairs: Iterable[tuple[int, int]], final: float = 1.0) -> Levels:
    """Schedulers that count in training steps; `final` is the squared alpha at negative times."""
    squares = scheduler.alphas_cumprod.tolist()

    def level(t: int) -> Level:
        if t >= len(squares):
            raise GuidanceError(
                f"timestep {t} is beyond the {len(squares)} training steps of "
                f"{type(scheduler).__name__}: use fewer steps."
            )
        squared = squares[t] if t >= 0 else final
        return Level(math.sqrt(squared), math.sqrt(1 - squared))

    return [(level(now), level(after)) for now, after in pairs]


def _times(scheduler: Any) -> list[int]:
    return [int(t) for t in scheduler.timesteps.tolist()]


def _stride(scheduler: Any) -> int:
    stride: int = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return stride


def _strided(scheduler: Any, begin: int) -> Levels:
    """DDIM: a step covers a fixed number of training steps, wherever the next one begins."""
    stride, final = _stride(scheduler), float(scheduler.final_alpha_cumprod)
    return _discrete(scheduler, ((t, t - stride) for t in _times(scheduler)), final)


def _inverted(scheduler: Any, begin: int) -> Levels:
    """DDIM inversion: the network is told the level that the step leads to."""
    stride, initial = _stride(scheduler), float(scheduler.initial_alpha_cumprod)
    return _discrete(scheduler, ((t - stride, t) for t in _times(scheduler)), initial)


def _successive(scheduler: Any, begin: int) -> Levels:
    """DDPM, LCM: a step leads to the next entry, the last to the clean latent."""
    times = _times(scheduler)
    return _discrete(scheduler, pairwise((*times, -1)))


def _trajectory(scheduler: Any, begin: int) -> Levels:
    """TCD: as LCM, but the last step leads to the first training step."""
    times = _times(scheduler)
    return _discrete(scheduler, pairwise((*times, 0)))


def _pseudo_numerical(scheduler: Any, begin: int) -> Levels:
    """PNDM: Runge-Kutta in four evaluations or a second look at the first step, then multistep."""
    stride, final = _stride(scheduler), float(scheduler.final_alpha_cumprod)
    warming = len(scheduler.prk_timesteps)

    def after(count: int, t: int) -> int:
        if count < warming:
            return t if count % 2 else t - stride // 2
        return t if count == 1 else t - stride

    times = enumerate(_times(scheduler), start=-begin)
    return _discrete(scheduler, ((t, after(count, t)) for count, t in times), final)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver:
    """What a class of schedulers does.

    `memory` is what a step reads of earlier ones: nothing; their predictions; the latent that a
    step of several evaluations (stages) began with; or earlier latents, which a corrector goes back
    to. By the last two a change of the latents in between is lost or counted twice.
    """

    levels: Callable[[Any, int], Levels]
    memory: Literal["nothing", "predictions", "stages", "latents"]
    noisy: bool = False
    inverts: bool = False


SOLVERS = {
    "DDIMScheduler": Solver(_strided, "nothing"),
    "DDIMParallelScheduler": Solver(_strided, "nothing"),
    "DDIMInverseScheduler": Solver(_inverted, "nothing", inverts=True),
    "CogVideoXDDIMScheduler": Solver(_strided, "nothing"),
    "CogVideoXDPMScheduler": Solver(_strided, "predictions", noisy=True),
    "DDPMScheduler": Solver(_successive, "nothing", noisy=True),
    "DDPMParallelScheduler": Solver(_successive, "nothing", noisy=True),
    "LCMScheduler": Solver(_successive, "nothing", noisy=True),
    "TCDScheduler": Solver(_trajectory, "nothing", noisy=True),
    "PNDMScheduler": Solver(_pseudo_numerical, "stages"),
    "EulerDiscreteScheduler": Solver(_exploding, "nothing"),
    "EulerAncestralDiscreteScheduler": Solver(_exploding, "nothing", noisy=True),
    "LMSDiscreteScheduler": Solver(_exploding, "predictions"),
    "HeunDiscreteScheduler": Solver(_exploding, "stages"),
    "KDPM2DiscreteScheduler": Solver(_midpoint_next, "stages"),
    "KDPM2AncestralDiscreteScheduler": Solver(_midpoint_last, "stages", noisy=True),
    "DPMSolverSDEScheduler": Solver(_midpoint_log, "stages", noisy=True),
    "DPMSolverMultistepScheduler": Solver(_preserving, "predictions"),
    "DPMSolverMultistepInverseScheduler": Solver(_preserving, "predictions", inverts=True),
    "DPMSolverSinglestepScheduler": Solver(_preserving, "stages"),
    "DEISMultistepScheduler": Solver(_preserving, "predictions"),
    "UniPCMultistepScheduler": Solver(_preserving, "latents"),
    "SASolverScheduler": Solver(_preserving, "latents", noisy=True),
    "EDMEulerScheduler": Solver(_preconditioned, "nothing"),
    "EDMDPMSolverMultistepScheduler": Solver(_preconditioned, "predictions"),
    "CosineDPMSolverMultistepScheduler": Solver(_preconditioned, "predictions", noisy=True),
    "FlowMatchEulerDiscreteScheduler": Solver(_flow, "nothing"),
    "FlowMatchLCMScheduler": Solver(_flow, "nothing", noisy=True),
    "FlowMatchHeunDiscreteScheduler": Solver(_flow, "stages"),
}


def _solver(scheduler: Any) -> Solver | None:
    names = (cls.__name__ for cls in type(scheduler).__mro__)
    return next((SOLVERS[name] for name in names if name in SOLVERS), None)


def kind(scheduler: Any) -> Kind:
    """What the network predicts; `unknown` where the scheduler does not say."""
    solver, config = _solver(scheduler), scheduler.config
    predicted = config.get("prediction_type")
    if solver and solver.levels is _flow:
        return "reverse_flow" if config.get("invert_sigmas", False) else "flow"
    if solver and solver.levels is _preconditioned and predicted == "epsilon":
        return "preconditioned"
    return _KINDS.get(predicted, "unknown")


_KINDS: dict[str | None, Kind] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}


# --- where a step begins --------------------------------------------------------------------------


def stages(scheduler: Any, begin: int = 0) -> list[int]:
    """For each entry from `begin` on, which evaluation of its solver step it is, from 0.

    A solver step is what leads from one latent of the trajectory to the next; on the way a
    multi-stage solver looks at others, and PNDM looks twice at its first step.
    """
    count = len(scheduler.timesteps) - begin
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if "PNDMScheduler" in names:
        warming = len(scheduler.prk_timesteps)
        return [i % 4 if i < warming else int(i == 1) for i in range(count)]
    if "DPMSolverSinglestepScheduler" in names:
        orders = scheduler.order_list[begin:]
        return [min(order - 1, i) for i, order in enumerate(orders)]
    order = getattr(scheduler, "order", 1)
    return [i % order for i in range(count)]


def times(scheduler: Any) -> list[float]:
    """The scheduler's time at each entry, 1000 being noise.

    Where it counts in another way (the logarithm of sigma, or the share of signal), this is the
    share of noise, sigma / (alpha + sigma).
    """
    solver, config = _solver(scheduler), scheduler.config
    otherwise = config.get("timestep_type") == "continuous" or config.get("invert_sigmas")
    if solver and (otherwise or solver.levels is _preconditioned):
        found = levels(scheduler) or []
        return [1000 * now.sigma / (now.alpha + now.sigma) for now, _ in found]
    return [float(t) for t in scheduler.timesteps.tolist()]


# --- what a step allows ---------------------------------------------------------------------------


def check(scheduler: Any, guidance: Guidance, eta: float | None = None) -> None:
    """Raise `GuidanceError` for a way of stepping that has no correct form on this scheduler.

    `eta` is the pipeline's argument, with which DDIM adds noise. Reads device tensors.
    """
    terms = getattr(guidance, "terms", ())
    for term in terms:
        check(scheduler, term, eta)
    demand: str = guidance.solver
    if demand == "any" and guidance.edits_latents:
        demand = "edits"
    if demand == "any" or terms:
        return
    predicted = kind(scheduler)
    if demand == "flow" and predicted != "flow":
        raise GuidanceError(
            f"{guidance!r} is for flow models, but this network predicts {predicted}. Use "
            "CFGPlusPlus, which works on every model."
        )
    obstacle = _obstacle(scheduler, demand)
    if demand == "first order" and obstacle is None:
        takes_eta = "eta" in inspect.signature(type(scheduler).step).parameters
        obstacle = f"adds noise at eta = {eta:g}" if eta and takes_eta else _misses(scheduler)
    if obstacle:
        fit = [name for name, solver in SOLVERS.items() if _unfit(solver, demand) is None]
        raise GuidanceError(
            f"{guidance!r} {_PURPOSES[demand]}, but {type(scheduler).__name__} {obstacle}. Use one "
            f"of {', '.join(fit)}."
        )


EDITING = ("edits", "renoising")
_PURPOSES = {
    "edits": "corrects the latents after each step",
    "renoising": "corrects the latents after each step",
    "one step": "moves the latents before each step",
    "first order": "needs a first-order deterministic step",
    "flow": "needs a deterministic step of one evaluation",
}


def _obstacle(scheduler: Any, demand: str) -> str | None:
    """What keeps a scheduler, as it is configured, from giving what is demanded."""
    solver, config = _solver(scheduler), scheduler.config
    if solver is None:
        return "is not known to guidancekit"
    if unfit := _unfit(solver, demand):
        return unfit
    noisy = config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type"))
    if noisy and demand in ("first order", "flow"):
        return "adds noise as it is configured (stochastic_sampling, or an SDE algorithm_type)"
    if demand in EDITING and (config.get("clip_sample") or config.get("thresholding")):
        return "clips the clean estimate (set clip_sample and thresholding to False)"
    if getattr(scheduler, "_scale_factors", None):
        return "changes the size of the latents (scale_factors)"
    return None


def _unfit(solver: Solver, demand: str) -> str | None:
    """What keeps a class of schedulers from giving what is demanded."""
    if solver.inverts and (demand != "renoising" or solver.memory != "nothing"):
        return "walks towards noise"
    if solver.noisy and demand in ("first order", "flow"):
        return "adds noise"
    if demand == "flow":
        if solver.levels not in (_flow, _preserving):
            return "is not for flow models"
        return "evaluates the network several times" if solver.memory == "stages" else None
    if solver.memory in ("stages", "latents"):
        return "keeps latents of its own, so that this would be lost or counted twice"
    if solver.memory == "predictions" and demand not in EDITING:
        return "goes on from its predictions at earlier latents"
    return None


def _misses(scheduler: Any) -> str | None:
    """DDIM's step covers a fixed number of training steps, wherever the next one begins."""
    for (_, after), (now, _) in pairwise(levels(scheduler) or []):
        if not math.isclose(after.nsr, now.nsr, rel_tol=0.05):
            spacing = scheduler.config.get("timestep_spacing")
            return (
                f"with timestep_spacing={spacing!r} lands at sigma/alpha = {after.nsr:.3g} where "
                f"its next step begins at {now.nsr:.3g} (timestep_spacing='leading' does not)"
            )
    return None
