"""How results look: status lines, figures, plots and files. All text of others is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipe import save_picture
from ..studio import Glimpse, Result
from ..trace import TracePoint

PLOTS = {
    "scale": "effective scale",
    "difference": "size of cond − uncond",
    "cosine": "cosine of the update with it",
}
COLOURS = {"A": "#6366f1", "B": "#f97316", "CFG": "#64748b"}


def status(message: str, *, busy: bool = False, alert: bool = False) -> str:
    """A line about what is going on."""
    role = "alert" if alert else "status"
    bar = "<progress></progress>" if busy else ""
    return f'<div class="status" role="{role}">{bar}<span>{html.escape(message)}</span></div>'


def progress(glimpse: Glimpse) -> str:
    """A bar over all steps of a run."""
    done = glimpse.number * glimpse.steps + glimpse.step
    where = f"picture {glimpse.number + 1} of {glimpse.of}, step {glimpse.step} of {glimpse.steps}"
    bar = f'<progress max="{glimpse.of * glimpse.steps}" value="{done}"></progress>'
    return f'<div class="status" role="status">{bar}<span>{where}</span></div>'


def figures(results: Sequence[Result]) -> str:
    """A Markdown table of what the pictures cost and what became of them."""
    titles = [f"{each.label}: {each.picture.recipe.guidance}" for each in results]
    rows = {
        "network evaluations": [f"{each.picture.evaluations:,}" for each in results],
        "seconds": [f"{each.picture.seconds:.2f}" for each in results],
        "effective scale, mean": [f"{each.scale:.2f}" for each in results],
        "saturation": [f"{each.saturation:.3f}" for each in results],
        "distance to A": [
            "" if each.distance is None else f"{each.distance:.3f}" for each in results
        ],
    }
    lines = [["", *map(escaped, titles)], ["---"] * (len(results) + 1)]
    lines += [[name, *values] for name, values in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    warnings = [
        f"* {each.label}: {escaped(text)}" for each in results for text in each.picture.warnings
    ]
    return "\n".join([table, "", *warnings])


def curves(results: Sequence[Result], name: str) -> Any:
    """The data of one plot: the scale or a figure of `TracePoint` over the steps, by picture."""
    import pandas

    def value(result: Result, point: TracePoint) -> float:
        if name == "scale":
            return result.scales[point.index]
        figure: float = getattr(point, name)
        return figure

    rows = [
        (point.index + 1, round(value(result, point), 4), result.label)
        for result in results
        for point in result.points
    ]
    return pandas.DataFrame(rows, columns=["step", name, "method"]).dropna()


def saved(result: Result, folder: Path) -> str:
    """The path of the picture as a PNG with its recipe, under a name that says what it is."""
    recipe = result.picture.recipe
    method = re.sub(r"[^a-z0-9]+", "-", recipe.guidance.lower()).strip("-")[:60]
    path = folder / f"{result.label.lower()}-{method}-seed{recipe.seed}.png"
    if not path.exists():
        save_picture(result.picture.image, recipe, path)
    return str(path)


def escaped(text: str) -> str:
    """Text as it is, in Markdown."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#|$~" else c for c in text)
