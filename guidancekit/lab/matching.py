"""Methods at matched strength: the scale at which one is as strong as classifier-free guidance.

Two methods at the same scale are not equally strong, and most figures reward strength
(arXiv:2602.22570), so what is compared there is the scale. Here the scale of each method is
chosen such that one figure equals that of the baseline, and the others are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STRENGTHS = {
    "effective-scale": "effective_scale",
    "diversity": "diversity",
    "adherence": "adherence",
}
"""What can be matched, and the figure that says it."""

LOWEST, HIGHEST = 1.0, 32.0
ROUNDS = 7
NEAR = 0.02  # of the target: near enough


@dataclass(frozen=True)
class Match:
    """The scale found, the figure there, and the one that was wanted."""

    scale: float
    value: float
    target: float
    reached: bool
    """Whether the wanted one lies between figures that were seen, or within a tenth of one."""


def match(
    value: Callable[[float], float], target: float, start: float, falling: bool = False
) -> Match:
    """Search for the scale at which `value(scale)` is `target`, from the scale `start`.

    `falling` says that the figure falls with the scale, as diversity does. Logarithms of the scale
    and the figure are taken to lie on a line through the two latest scales (at first: to be
    proportional). Where that leads out of the interval that must hold the answer, or has not
    halved it, it is bisected. Of the scales tried, the one whose figure is nearest is returned.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    slope = -1.0 if falling else 1.0
    seen: dict[float, float] = {}
    at, before = math.log(start), None
    for tries in range(ROUNDS):
        scale = round(math.exp(at), 3)
        found = seen[scale] = value(scale)
        if abs(found - target) <= NEAR * abs(target):
            break
        width = high - low
        low, high = (at, high) if (found < target) != falling else (low, at)
        guess = low
        if min(found, target) > 0:
            point = at, math.log(found)
            if before is not None and point[0] != before[0] and point[1] != before[1]:
                slope = (point[1] - before[1]) / (point[0] - before[0])
            before, guess = point, at + (math.log(target) - point[1]) / slope
        stuck = tries > 1 and high - low > width / 2
        at = guess if low < guess < high and not stuck else (low + high) / 2
    scale = min(seen, key=lambda each: abs(seen[each] - target))
    between = min(seen.values()) <= target <= max(seen.values())
    return Match(scale, seen[scale], target, between or abs(seen[scale] - target) < 0.1 * target)
