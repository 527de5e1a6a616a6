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
ROUNDS = 6  # 32 to the power of 2^-6: the scale is found up to 6 %


@dataclass(frozen=True)
class Match:
    """The scale found, the figure there, and the one that was wanted."""

    scale: float
    value: float
    target: float
    reached: bool
    """Whether the wanted one lies between figures that were seen, or within a tenth of one."""


def match(value: Callable[[float], float], target: float, falling: bool = False) -> Match:
    """Bisect the logarithm of the scale until `value(scale)` is about `target`.

    `falling` says that the figure falls with the scale, as diversity does. Of the scales tried, the
    one whose figure is nearest is returned.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    seen: dict[float, float] = {}
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        scale = round(math.exp(middle), 3)
        seen[scale] = value(scale)
        if (seen[scale] < target) != falling:
            low = middle
        else:
            high = middle
    scale = min(seen, key=lambda each: abs(seen[each] - target))
    between = min(seen.values()) <= target <= max(seen.values())
    return Match(scale, seen[scale], target, between or abs(seen[scale] - target) < 0.1 * target)
