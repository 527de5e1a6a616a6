"""Times that may be compared: contestants take turns, and only medians and ratios are reported.

A machine has slow minutes. Contestants of the same round share them, so a ratio is the median over
rounds of time / time within the round; "±" is half the distance between the quartiles of these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

_SHORTEST = 2e-3  # seconds in one sample of a short contestant


@dataclass(frozen=True)
class Effort:
    """How many rounds to measure, or as many as begin within `seconds`; two at least, or one."""

    rounds: int
    seconds: float = math.inf

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for i in range(self.rounds):
            if i < 2 or time.perf_counter() - start < self.seconds:
                yield i


@dataclass
class Times:
    """Seconds per call of one contestant, one entry per round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def over(self, other: Times) -> Ratio:
        """The ratio to another contestant of the same rounds."""
        return Ratio.of([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and half the distance between their quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: list[float]) -> Ratio:
        if len(values) < 2:
            return cls(values[0], 0.0)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), (high - low) / 2)

    def __str__(self) -> str:
        return f"{self.median:.3f} ± {self.spread:.3f}"


def interleaved(
    contestants: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device
) -> dict[str, Times]:
    """Time each contestant once per round, after two calls that are not counted.

    Every round starts with another contestant. Short ones are called often enough for a sample of
    two milliseconds. On a GPU the clock waits for the work to be done.
    """
    often = {}
    for name, call in contestants.items():
        call()
        often[name] = max(1, round(_SHORTEST / max(_seconds(call, 1, device), 1e-7)))
    times = {name: Times() for name in contestants}
    order = [*contestants]
    for _ in effort:
        for name in order:
            times[name].rounds.append(_seconds(contestants[name], often[name], device))
        order = [*order[1:], order[0]]
    return times


def _seconds(call: Callable[[], object], often: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(often):
        call()
    _wait(device)
    return (time.perf_counter() - start) / often


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
