"""Guidance scales that change over the run. All in the convention w = 1: no guidance.

A schedule stands wherever a scale does, and its own `scale` may be a number, another schedule, or
None for the pipeline's `guidance_scale`. Where it is exactly 1 the unconditional pass is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from .errors import GuidanceError
from .parameters import Preset, Range, check
from .step import Moment


@dataclass(frozen=True)
class Schedule:
    """Base class: a scale as a function of the moment in the run."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Preset]] = {}

    def __post_init__(self) -> None:
        values = dict(vars(self))
        for key, value in values.items():
            if isinstance(value, dict):
                object.__setattr__(self, key, from_config(value))
            elif isinstance(value, list):
                object.__setattr__(self, key, tuple(value))
        check(type(self), values)

    def __call__(self, moment: Moment) -> float:
        raise NotImplementedError

    def __repr__(self) -> str:
        """The shortest call that makes this schedule."""
        given = [
            f"{each.name}={value!r}"
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def to_config(self) -> dict[str, Any]:
        """Plain values that `from_config` rebuilds the schedule from."""
        values = {key: to_config(value) for key, value in vars(self).items()}
        return {"schedule": self.name, **values}


Scale = float | Schedule | None
AnyScale = Annotated[
    float | Schedule | None,
    Range(0, slider=(1, 20)),
    "guidance scale: 1 is no guidance, None is the pipeline's own guidance_scale",
]


def scale_at(scale: Scale, moment: Moment) -> float:
    """The value of a scale at a moment; None stands for the pipeline's `guidance_scale`."""
    if isinstance(scale, Schedule):
        return scale(moment)
    if scale is not None:
        return scale
    if moment.guidance_scale is None:
        raise GuidanceError(
            "scale=None stands for the pipeline's guidance_scale, but this pipeline has none: "
            "give the scale, for example scale=5."
        )
    return moment.guidance_scale


def to_config(scale: Any) -> Any:
    """A scale as plain values."""
    return scale.to_config() if isinstance(scale, Schedule) else scale


def from_config(value: Any) -> Any:
    """Undo `to_config`."""
    if isinstance(value, dict):
        arguments = dict(value)
        name = arguments.pop("schedule", None)
        if name not in SCHEDULES:
            raise GuidanceError(f"found schedule {name!r}, expected one of {sorted(SCHEDULES)}.")
        return SCHEDULES[name](**arguments)
    return value


@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """The same scale at every step: plain classifier-free guidance, arXiv:2207.12598."""

    name: ClassVar[str] = "constant"
    paper: ClassVar[str] = "arXiv:2207.12598"

    scale: AnyScale = None

    def __call__(self, moment: Moment) -> float:
        return scale_at(self.scale, moment)


@dataclass(frozen=True, repr=False)
class Interval(Schedule):
    """Guidance in a limited interval of noise levels, arXiv:2404.07724 Eq. 6; 1 outside.

    `low` and `high` are noise levels sigma/alpha at the start of a solver step; the interval is
    half-open, (low, high]. The paper prints bounds rounded from its own grid, hence `tolerance`
    (added to both bounds). Default bounds: the paper's SDXL setting, chosen by eye at w = 16.
    """

    name: ClassVar[str] = "interval"
    paper: ClassVar[str] = "arXiv:2404.07724"
    presets: ClassVar[Mapping[str, Preset]] = {
        "scenes": Preset(
            {"low": 0.28, "high": 20.0},
            "ours: follows prompts as well as CFG at w = 6, with 15 % fewer evaluations",
        )
    }

    scale: AnyScale = None
    low: Annotated[float, Range(0, slider=(0, 5)), "lower bound, exclusive"] = 0.28
    high: Annotated[float, Range(0, slider=(0, 20)), "upper bound, inclusive"] = 5.42
    tolerance: Annotated[float, Range(0, 0.1), "added to both bounds, for rounded ones"] = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise GuidanceError(
                f"Interval(low={self.low:g}, high={self.high:g}) is empty: low must be below high. "
                "Both are noise levels sigma/alpha, which fall during a run."
            )

    def __call__(self, moment: Moment) -> float:
        if not moment.grid:
            raise GuidanceError(
                "Interval needs the noise level of each step, which is unknown for this scheduler: "
                "use DDIM, Euler, DPM++ or a flow-matching Euler scheduler."
            )
        inside = self.low + self.tolerance < moment.nsr <= self.high + self.tolerance
        return scale_at(self.scale, moment) if inside else 1.0


@dataclass(frozen=True, repr=False)
class _Ramp(Schedule):
    """A ramp over progress p, of mean 1, applied to the excess w - 1 (or to w itself).

    `decreasing` takes the complement 2 - shape(p): it falls where the other rises.
    """

    scale: AnyScale = None
    decreasing: Annotated[bool, "fall where the ramp would rise"] = False
    floor: Annotated[float | None, Range(0, slider=(0, 4)), "least value of the ramp"] = None
    ramps: Annotated[
        Literal["excess", "scale"],
        "what is ramped: the excess w - 1 (never below conditional) or the scale w itself",
    ] = "excess"

    def shape(self, p: float) -> float:
        raise NotImplementedError

    def __call__(self, moment: Moment) -> float:
        base = 1.0 if self.ramps == "excess" else 0.0
        shape = self.shape(moment.progress)
        ramp = (scale_at(self.scale, moment) - base) * (2 - shape if self.decreasing else shape)
        return base + (ramp if self.floor is None else max(self.floor, ramp))


@dataclass(frozen=True, repr=False)
class Linear(_Ramp):
    """Linear ramp, arXiv:2404.13040: w = 1 + (scale - 1) 2p; with `floor`, clamp-linear.

    The paper's own code ramps the excess w - 1; other passages can be read as ramping w
    (`ramps="scale"`; unverified which one its tables use).
    """

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "arXiv:2404.13040"

    def shape(self, p: float) -> float:
        return 2 * p


@dataclass(frozen=True, repr=False)
class Cosine(_Ramp):
    """Cosine ramp, arXiv:2404.13040: w = 1 + (scale - 1)(1 - cos pi p); `floor`: clamp-cosine.

    The exact form of the non-linear shapes is known second-hand only (unverified).
    """

    name: ClassVar[str] = "cosine"
    paper: ClassVar[str] = "arXiv:2404.13040"

    def shape(self, p: float) -> float:
        return 1 - math.cos(math.pi * p)


@dataclass(frozen=True, repr=False)
class Triangle(_Ramp):
    """Up to the middle of the run and down again (Lambda; `decreasing`: V), arXiv:2404.13040.

    The same curve as TV-CFG's, arXiv:2509.22007: mean `scale`, peak 2 scale - 1.
    """

    name: ClassVar[str] = "triangle"
    paper: ClassVar[str] = "arXiv:2404.13040"

    def shape(self, p: float) -> float:
        return 2 * (1 - abs(1 - 2 * p))


@dataclass(frozen=True, repr=False)
class PowerCosine(Schedule):
    """MDT's power-cosine: w = 1 + (scale - 1)(1 - cos(pi p^power)) / 2, from sail-sg/MDT.

    power = 4 is the repository's ImageNet setting. Its p is 1 - t/T of the raw timestep; here p is
    the fraction of steps, which is the same for an evenly spaced grid up to its end points.
    """

    name: ClassVar[str] = "power-cosine"
    paper: ClassVar[str] = "arXiv:2303.14389"

    scale: AnyScale = None
    power: Annotated[float, Range(0, slider=(0.01, 8)), "large: guide late"] = 4.0

    def __call__(self, moment: Moment) -> float:
        w = scale_at(self.scale, moment)
        return 1 + (w - 1) * (1 - math.cos(math.pi * moment.progress**self.power)) / 2


@dataclass(frozen=True, repr=False)
class BetaCurve(Schedule):
    """The time curve of beta-CFG, arXiv:2502.10574: the Beta(a, b) density over progress.

    With the paper's `base="uncond"` w = scale * B(p): both ends of the run are unconditional.
    `base="cond"` gives 1 + (scale - 1) B(p). Without the paper's norm, which is `BetaCFG`'s.
    """

    name: ClassVar[str] = "beta"
    paper: ClassVar[str] = "arXiv:2502.10574"

    scale: AnyScale = None
    a: Annotated[float, Range(1, slider=(1, 5)), "first shape parameter"] = 2.0
    b: Annotated[float, Range(1, slider=(1, 5)), "second shape parameter"] = 2.0
    base: Annotated[Literal["uncond", "cond"], "what is left where the curve is 0"] = "uncond"

    def __call__(self, moment: Moment) -> float:
        w, p = scale_at(self.scale, moment), moment.progress
        log_norm = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        density = p ** (self.a - 1) * (1 - p) ** (self.b - 1) / math.exp(log_norm)
        return w * density if self.base == "uncond" else 1 + (w - 1) * density


@dataclass(frozen=True, repr=False)
class PerStep(Schedule):
    """One scale per solver step, as many as the run has steps."""

    name: ClassVar[str] = "per-step"

    scales: Annotated[Sequence[float], Range(0), "the scale of each step"] = ()

    def __call__(self, moment: Moment) -> float:
        if len(self.scales) != moment.total:
            raise GuidanceError(
                f"PerStep holds {len(self.scales)} scales, but the run has {moment.total} steps: "
                "give one scale per step."
            )
        return float(self.scales[moment.index])


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule
    for schedule in (Constant, Interval, Linear, Cosine, Triangle, PowerCosine, BetaCurve, PerStep)
}
