"""What a strategy sees: the moment in the run, the latent, and predictions readable in any space.

Notation (the field's): ``x = alpha * x0 + sigma * eps`` is the noisy latent *as the network sees
it*; ``nsr = sigma / alpha`` is the noise level of EDM-style papers. For schedulers that keep their
latents in another scale (Euler, Heun, LMS) the engine converts, so one convention is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from .errors import GuidanceError
from .tensors import combine

Branch = Literal["cond", "uncond"]
COND: tuple[Branch, ...] = ("cond",)
UNCOND: tuple[Branch, ...] = ("uncond",)
BOTH: tuple[Branch, ...] = ("uncond", "cond")


def branches_at(w: float) -> tuple[Branch, ...]:
    """The branches that plain classifier-free guidance at scale w is made of."""
    return {0.0: UNCOND, 1.0: COND}.get(w, BOTH)


Kind = Literal[
    "epsilon", "v_prediction", "sample", "flow", "reverse_flow", "preconditioned", "unknown"
]
"""What a network predicts: eps, v, x0, or the velocity eps - x0 of a flow model.

`reverse_flow` is x0 - eps; `preconditioned` is the raw output of EDM's network, which is -v.
"""
FLOWS: tuple[Kind, ...] = ("flow", "reverse_flow")

_SMALLEST_ALPHA = 2.0**-12  # diffusers' own guard: eps says nothing about x0 at alpha = 0


@dataclass(frozen=True)
class Level:
    """A noise level: `alpha`, `sigma`, and the `scale` of the scheduler's latents over `x`.

    `data` is the standard deviation of clean latents that the coordinates assume: EDM's sigma_data.
    Then v = data alpha eps - sigma x0 / data, where (data alpha)^2 + sigma^2 = 1.
    """

    alpha: float
    sigma: float
    scale: float = 1.0
    data: float = 1.0

    @property
    def nsr(self) -> float:
        """sigma / alpha; infinite where no signal is left."""
        return self.sigma / self.alpha if self.alpha > 0 else float("inf")


class Prediction:
    """One network prediction at (x, t), readable as `out` (the network's own), `x0`, `eps` or `v`.

    All are float32 tensors of the latent's shape [B, ...].
    """

    def __init__(self, out: Tensor, x: Tensor, level: Level, kind: Kind) -> None:
        self.out = out.float()
        self._x = x
        self.level = level
        self.kind = kind

    @cached_property
    def x(self) -> Tensor:
        """The latent that the network saw."""
        return self._x.float()

    @cached_property
    def x0(self) -> Tensor:
        """The clean latent."""
        return self._read(_x0(self.kind, self.level))

    @cached_property
    def eps(self) -> Tensor:
        """The noise."""
        return self._read(_eps(self.kind, self.level))

    @cached_property
    def v(self) -> Tensor:
        """The velocity: ``eps - x0`` for flow models, ``alpha * eps - sigma * x0`` otherwise."""
        return self._read(_v(self.kind, self.level))

    def _read(self, space: Space) -> Tensor:
        of_x, of_out = space
        return self.out if space == (0, 1) else combine(of_x, self.x, of_out, self.out)

    @classmethod
    def from_x0(cls, x0: Tensor, x: Tensor, level: Level, kind: Kind) -> Prediction:
        """What a network of this kind would put out to say `x0` at `x`."""
        return cls(_solve(_x0(kind, level), x0, x), x, level, kind)

    @classmethod
    def from_v(cls, v: Tensor, x: Tensor, level: Level, kind: Kind) -> Prediction:
        """What a network of this kind would put out to say the velocity `v` at `x`."""
        return cls(_solve(_v(kind, level), v, x), x, level, kind)


Space = tuple[float, float]
"""The factors (a, b) of ``a * x + b * out``: every space is linear in the latent and the output."""


def _x0(kind: Kind, level: Level) -> Space:
    alpha, sigma, data = level.alpha, level.sigma, level.data
    match kind:
        case "epsilon":
            alpha = max(alpha, _SMALLEST_ALPHA)
            return 1 / alpha, -sigma / alpha
        case "v_prediction":
            return data**2 * alpha, -data * sigma
        case "preconditioned":
            return data**2 * alpha, data * sigma
        case "flow":
            return 1, -sigma
        case "reverse_flow":
            return 1, sigma
        case "sample":
            return 0, 1
    raise _unknown()


def _eps(kind: Kind, level: Level) -> Space:
    alpha, sigma, data = level.alpha, level.sigma, level.data
    match kind:
        case "epsilon":
            return 0, 1
        case "v_prediction":
            return sigma, data * alpha
        case "preconditioned":
            return sigma, -data * alpha
        case "flow":
            return 1, alpha
        case "reverse_flow":
            return 1, -alpha
        case "sample":
            return 1 / sigma, -alpha / sigma
    raise _unknown()


def _v(kind: Kind, level: Level) -> Space:
    if kind in _VELOCITY:
        return 0, _VELOCITY[kind]
    pairs = zip(_eps(kind, level), _x0(kind, level), strict=True)
    of_x, of_out = (level.alpha * eps - level.sigma * x0 for eps, x0 in pairs)
    return of_x, of_out


_VELOCITY = {"v_prediction": 1, "flow": 1, "preconditioned": -1, "reverse_flow": -1}
"""The kinds whose output is the velocity, and its sign."""


def _solve(space: Space, value: Tensor, x: Tensor) -> Tensor:
    """The network's output that means `value` in a space, at `x`."""
    of_x, of_out = space
    return value if space == (0, 1) else combine(1 / of_out, value, -of_x / of_out, x)


def _unknown() -> GuidanceError:
    return GuidanceError(
        "This strategy needs to know what the network predicts (noise, v, or the clean latent), "
        "which the scheduler does not say. Use DDIM, Euler, DPM++ or a flow-matching Euler "
        "scheduler."
    )


@dataclass
class Moment:
    """Where a run stands at one solver step, before anything is evaluated.

    `grid` holds the noise level (nsr) at the start of each of the `total` steps and after the last;
    it is empty where the scheduler's noise levels are unknown. `guidance_scale` is the pipeline's.
    `time` is the scheduler's timestep at the start of the step, 1000 being noise. `embedded_scale`
    is the guidance scale that the pipeline tells a distilled network, if it takes one.
    """

    index: int
    total: int
    grid: tuple[float, ...]
    guidance_scale: float | None
    time: float = field(default=0.0, kw_only=True)
    embedded_scale: float | None = field(default=None, kw_only=True)

    @property
    def progress(self) -> float:
        """0 at the first step (noise), 1 at the last (clean)."""
        return self.index / (self.total - 1) if self.total > 1 else 0.0

    @property
    def nsr(self) -> float:
        """Noise level at the start of this solver step."""
        return self.grid[self.index]


@dataclass
class Step(Moment):
    """One evaluation of the guidance: the moment, the latent and the predictions.

    `stage` counts the evaluations of a multi-stage solver in one step; state advances at stage 0.
    `level` and `next_level` are the noise levels of this evaluation and after the step.

    `evaluate(branch, ...)` runs the network once more: at another latent `x` (with its `timestep`
    and `level`), under other `conditions`, through another `network`, for some `rows` only, or
    `within` a context of `attention` or `around`, which then is about this evaluation alone.
    `gather({branch: rows})` evaluates rows of several branches at once, and returns outputs.
    `conditions(branch)` are the tensors that a branch is conditioned on, by argument name;
    `encode(prompt)` those of other text. `decode(x0)` makes images [n, 3, H, W] in [0, 1] of clean
    latents.
    `attention(layers, tap)` is a context in which `tap` stands in for the attention of the named
    layers, `around(matches, wrapper)` one in which `wrapper` stands in for layers themselves (both:
    `guidancekit.engine.layers`); `rows(branch, count)` tells the rows of a branch inside.
    Timesteps are the network's: `timestep` now, `next_timestep` after the step, and
    `flow_timestep(sigma)` that of a flow model at another noise level.
    `needed` are the branches that will be evaluated; `warn(message)` warns once, in the report too.
    """

    stage: int
    timestep: Tensor
    next_timestep: Tensor | None
    flow_timestep: Callable[[float], Tensor]
    x: Tensor
    level: Level
    next_level: Level
    kind: Kind
    evaluate: Callable[..., Prediction]
    gather: Callable[[Mapping[Branch, Sequence[int] | None]], dict[Branch, Tensor]]
    conditions: Callable[[Branch], dict[str, Tensor]]
    encode: Callable[[str], dict[str, Tensor]]
    decode: Callable[[Tensor], Tensor]
    attention: Callable[..., AbstractContextManager[None]]
    around: Callable[..., AbstractContextManager[None]]
    rows: Callable[[Branch, int], slice]
    warn: Callable[[str], None]
    needed: tuple[Branch, ...]
    evaluated: dict[Branch, Prediction]

    @property
    def alpha(self) -> float:
        return self.level.alpha

    @property
    def sigma(self) -> float:
        return self.level.sigma

    @property
    def cond(self) -> Prediction:
        """The conditional prediction; evaluated now if it was not foreseen."""
        return self._branch("cond")

    @property
    def uncond(self) -> Prediction:
        """The unconditional (or negative) prediction; evaluated now if it was not foreseen."""
        return self._branch("uncond")

    def _branch(self, branch: Branch) -> Prediction:
        if branch not in self.evaluated:
            self.evaluated[branch] = self.evaluate(branch)
        return self.evaluated[branch]

    def predict(
        self, *, out: Tensor | None = None, x0: Tensor | None = None, v: Tensor | None = None
    ) -> Prediction:
        """A prediction of this step from an output of the network's kind, from `x0` or from `v`."""
        if out is not None:
            return Prediction(out, self.x, self.level, self.kind)
        if v is not None:
            return Prediction.from_v(v, self.x, self.level, self.kind)
        assert x0 is not None, "predict(out=...), predict(x0=...) or predict(v=...)"
        return Prediction.from_x0(x0, self.x, self.level, self.kind)

    def cfg(self, w: float) -> Prediction:
        """Plain classifier-free guidance, uncond + w (cond - uncond): the same in every space."""
        if w == 1:
            return self.cond
        if w == 0:
            return self.uncond
        cond, uncond = self.cond.out, self.uncond.out
        return self.predict(out=(cond - uncond).mul_(w).add_(uncond))

    def renoise_next(self, latents: Tensor, d: Tensor) -> Tensor:
        """Move the noise in the next `latents` by `d`; see `shift_next`."""
        return self._edited(latents, self.next_level.sigma, d)

    def shift_next(self, latents: Tensor, d: Tensor) -> Tensor:
        """Move the clean estimate behind the next `latents` by `d` at fixed noise (float32 inside).

        Exact for any solver step: ``latents + scale' * alpha' * d`` in the scheduler's own scale.
        """
        return self._edited(latents, self.next_level.alpha, d)

    def _edited(self, latents: Tensor, share: float, d: Tensor) -> Tensor:
        return (latents.float() + self.next_level.scale * share * d).to(latents.dtype)
