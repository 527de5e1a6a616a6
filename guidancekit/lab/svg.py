"""Line plots as SVG text: small, sharp, and coloured by the page that they stand in.

Colours are names of CSS variables (``var(--method)``), so that a page decides about light and dark.
All texts are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

Numbers = Sequence[float] | np.ndarray
Place = Callable[[float], float]

WIDTH, HEIGHT = 520, 270  # user units
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 44


@dataclass(frozen=True)
class Line:
    """A curve through points; NaN interrupts it. `low` and `high` are the edges of a band."""

    name: str
    x: Numbers
    y: Numbers
    colour: str
    dashed: bool = False
    low: Numbers = ()
    high: Numbers = ()


@dataclass(frozen=True)
class Axis:
    """From `start`, at the left or the bottom, to `end`, which may be less."""

    label: str
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, label: str, values: Sequence[float], include: Sequence[float] = ()) -> Axis:
        """A linear axis over the finite `values` and those to include, ending at round numbers."""
        finite = [value for value in (*values, *include) if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = min(low, 0.0), max(high, low + 1.0, 0.0)
        unit = _round_step((high - low) / 5)
        start, end = math.floor(low / unit + 1e-6), math.ceil(high / unit - 1e-6)
        return cls(label, start * unit, end * unit)

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the start, 1 at the end."""
        start, end, here = self.start, self.end, value
        if self.log:
            start, end, here = math.log(start), math.log(end), math.log(here)
        return (here - start) / (end - start) if end != start else 0.5

    @property
    def ticks(self) -> list[float]:
        """Round numbers from end to end."""
        low, high = sorted((self.start, self.end))
        if not self.log:
            unit = _round_step((high - low) / 5) if high > low else 1.0
            first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
            return [round(i * unit, 12) for i in range(first, last + 1)]
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        spread = math.log10(high / low)
        digits = (1, 2, 5) if spread < 4 else (1, 3) if spread < 6 else (1,)
        every = (digit * 10.0**decade for decade in decades for digit in digits)
        return [tick for tick in every if low * 0.999 <= tick <= high * 1.001]


def plot(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    title: str,
    rules: Sequence[tuple[float, str]] = (),
) -> str:
    """An ``<svg>`` of `lines`, each point with a tooltip; `rules` are values of y to compare with.

    `title` is read out in its place. Values beyond the axis of y are drawn at its edge.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(value: float) -> float:
        return LEFT + (right - LEFT) * x.at(value)

    def up(value: float) -> float:
        return bottom - (bottom - TOP) * min(max(y.at(value), 0.0), 1.0)

    marks: list[str] = []
    for tick in y.ticks:
        marks.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{right}"/>')
        marks.append(_text(LEFT - 8, up(tick) + 4, number(tick), "end"))
    for tick in x.ticks:
        marks.append(f'<path class="grid" d="M{across(tick):.1f} {bottom}v5"/>')
        marks.append(_text(across(tick), bottom + 18, number(tick), "middle"))
    marks.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    marks.append(_text(right, HEIGHT - 6, x.label, "end", "label"))
    for value, name in rules:
        marks.append(f'<path class="rule" d="M{LEFT} {up(value):.1f}H{right}"/>')
        marks.append(_text(right - 2, up(value) + 14, name, "end", "label"))
    for line in lines:
        marks += _bands(line, across, up)
    for line in lines:
        marks += _curve(line, across, up, x.label)
    name = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(marks)}</svg>'
    )


def legend(lines: Sequence[Line]) -> str:
    """What the curves are, as an HTML list; one line for all of a name."""
    items = [
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><path class="{_class(line)}" '
        f'style="stroke:var(--{line.colour})" d="M1 5H25"/></svg>{html.escape(line.name)}</li>'
        for line in lines
    ]
    return f'<ul class="legend">{"".join(dict.fromkeys(items))}</ul>'


def number(value: float) -> str:
    """A figure in at most four significant digits."""
    return f"{value:.4g}".replace("-", "−").replace("e−0", "e−").replace("e+0", "e")


def _curve(line: Line, across: Place, up: Place, axis: str) -> Iterator[str]:
    style = f'style="stroke:var(--{line.colour})"'
    for points in _stretches(line.x, line.y):
        path = "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in points)
        if len(points) > 1:
            yield f'<path class="{_class(line)}" {style} d="M{path}"/>'
        for a, b in points:
            told = html.escape(f"{line.name}: {number(b)} at {axis} {number(a)}")
            yield (
                f'<circle class="{"ring" if line.dashed else "dot"}" cx="{across(a):.1f}" '
                f'cy="{up(b):.1f}" r="2.2" style="--own:var(--{line.colour})">'
                f"<title>{told}</title></circle>"
            )


def _bands(line: Line, across: Place, up: Place) -> Iterator[str]:
    lows = _stretches(line.x, line.low) if len(line.low) else []
    highs = _stretches(line.x, line.high) if len(line.high) else []
    for low, high in zip(lows, highs, strict=True):
        edge = "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in (*low, *reversed(high)))
        yield f'<path class="band" style="fill:var(--{line.colour})" d="M{edge}Z"/>'


def _stretches(x: Numbers, y: Numbers) -> list[list[tuple[float, float]]]:
    """The runs of points between the gaps."""
    pairs = zip(x, y, strict=True)
    runs = groupby(pairs, key=lambda pair: math.isfinite(pair[0]) and math.isfinite(pair[1]))
    return [list(run) for is_there, run in runs if is_there]


def _class(line: Line) -> str:
    return "curve dashed" if line.dashed else "curve"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _round_step(step: float) -> float:
    """The first of 1, 2, 2.5, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= step * (1 - 1e-9))
