"""What a bench found: a table, CSV and JSON of every figure, and plots of the frontiers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import GuidanceError
from ..files import written_whole
from ..recipe import installed_versions
from .bench import Result
from .measuring import WORDS, Measured
from .metrics import Figure

SHOWN = (  # in the table, and how many digits
    ("effective_scale", 2),
    ("adherence", 3),
    ("diversity", 3),
    ("recall", 3),
    ("precision", 3),
    ("frechet", 4),
    ("colour_error", 4),
    ("saturation", 3),
    ("clipping", 3),
    ("sharpness", 4),
    ("pixel_diversity", 3),
    ("negative_shown", 3),
)
FRONTIERS = (  # figures against each other: x, y, whether more is better
    ("adherence", "diversity", (True, True)),
    ("saturation", "frechet", (False, False)),
    ("effective_scale", "saturation", (True, False)),
)


def interval(figure: Figure, digits: int) -> str:
    """A value with its 95 % interval: "0.912 ±0.021"."""
    text = f"{figure.value:.{digits}f}"
    return text if math.isnan(figure.error) else f"{text} ±{1.96 * figure.error:.{digits}f}"


def table(results: Sequence[Result], truth: Mapping[str, Measured]) -> str:
    """Markdown: one row per arm, after the rows of the truth; ± is half of a 95 % interval."""
    measured = [*truth.values(), *(each.measured for each in results if each.measured)]
    shown = [(name, digits) for name, digits in SHOWN if any(name in m.figures for m in measured)]
    heads = ["method", *(name.replace("_", " ") for name, _ in shown), "rows", "seconds"]
    lines = [heads, ["---"] * len(heads)]

    def cells(found: Measured) -> list[str]:
        own = [interval(found.figures[n], d) if n in found.figures else "" for n, d in shown]
        costs = ["" if math.isnan(found.rows) else f"{found.rows:.4g}", f"{found.seconds:.3f}"]
        return [*own, *(costs if costs[0] else ["", ""])]

    for name, found in truth.items():
        lines.append([f"*{name}*", *cells(found)])
    for each in results:
        if each.measured is None:
            lines.append([each.arm.label, f"refused: {each.refused}"] + [""] * (len(heads) - 2))
            continue
        missed = "" if each.match is None or each.match.reached else " (not reached)"
        lines.append([each.arm.label + missed, *cells(each.measured)])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    rows = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {row} |" for row in rows)


def glossary() -> str:
    """What the columns are."""
    return "\n".join(f"* {name.replace('_', ' ')}: {words}" for name, words in WORDS.items())


def as_json(results: Sequence[Result], truth: Mapping[str, Measured], facts: Any) -> str:
    """Every figure of every arm with its standard error, recipes, costs and versions."""
    content = {
        "versions": installed_versions(),
        **facts,
        "truth": {name: _figures(found) for name, found in truth.items()},
        "arms": [
            {
                "method": each.arm.method,
                "scale": each.arm.scale,
                "recipe": asdict(each.arm.recipe),
                "refused": each.refused,
                "match": None if each.match is None else asdict(each.match),
                "rows": each.measured and each.measured.rows,
                "seconds": each.measured and each.measured.seconds,
                "memory": each.measured and _plain(each.measured.memory),
                "figures": {} if each.measured is None else _figures(each.measured),
            }
            for each in results
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def as_csv(results: Sequence[Result]) -> str:
    """One line per arm and figure: model, method, scale, guidance, figure, value, error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "method", "scale", "guidance", "figure", "value", "error"])
    for each in results:
        recipe, found = each.arm.recipe, each.measured
        start = [recipe.model, each.arm.method, each.arm.scale, recipe.guidance]
        for name, one in found.figures.items() if found else ():
            writer.writerow([*start, name, f"{one.value:.6g}", f"{one.error:.6g}"])
        if found:
            writer.writerow([*start, "rows", f"{found.rows:.6g}", ""])
            writer.writerow([*start, "seconds", f"{found.seconds:.6g}", ""])
    return text.getvalue()


def _figures(found: Measured) -> dict[str, dict[str, float | None]]:
    return {
        name: {"value": _plain(one.value), "error": _plain(one.error)}
        for name, one in found.figures.items()
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def write(
    out: Path,
    results: Sequence[Result],
    truth: Mapping[str, Mapping[str, Measured]],
    facts: Mapping[str, Any],
    plots: bool = True,
) -> list[Path]:
    """The report of a bench in the folder `out`: report.md, results.json and .csv, and plots.

    `truth` has the rows of the truth by model; `facts` are said at the top of the report.
    """
    models = list(dict.fromkeys(each.arm.recipe.model for each in results))
    parts = ["# Bench", "\n".join(f"* {name}: {value}" for name, value in facts.items())]
    paths = []
    for model in models:
        own = [each for each in results if each.arm.recipe.model == model]
        parts += [f"## {model}", table(own, truth.get(model, {}))]
        for x, y, better in FRONTIERS:
            path = out / f"{model.rpartition('/')[2]}-{x}-{y}.png".replace("_", "-")
            if plots and frontier(own, truth.get(model, {}), x, y, better, path):
                parts.append(f"![{y} against {x}]({path.name})")
                paths.append(path)
    parts += ["## Columns", glossary()]
    every = {f"{m}: {name}": found for m in truth for name, found in truth[m].items()}
    texts = {
        "report.md": "\n\n".join(parts) + "\n",
        "results.json": as_json(results, every, dict(facts)),
        "results.csv": as_csv(results),
    }
    for name, text in texts.items():
        with written_whole(out / name) as file:
            file.write(text.encode())
    return [out / name for name in texts] + paths


# --- plots ----------------------------------------------------------------------------------------

COLOURS = (
    "#1a1d21", "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d",
    "#65a30d", "#92400e", "#6b7280", "#4338ca",
)  # fmt: skip


def frontier(
    results: Sequence[Result],
    truth: Mapping[str, Measured],
    x: str,
    y: str,
    better: tuple[bool, bool],
    path: Path,
) -> bool:
    """One figure against another, a curve over the scale per method, with 95 % intervals.

    False, and no file, where fewer than two arms have both figures.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise GuidanceError(
            "plots need matplotlib: pip install 'guidancekit[lab]', or say --no-plots."
        ) from error
    curves: dict[str, list[tuple[Result, Figure, Figure]]] = {}
    for each in results:
        figures = each.measured.figures if each.measured else {}
        if x in figures and y in figures:
            curves.setdefault(each.arm.method, []).append((each, figures[x], figures[y]))
    if sum(map(len, curves.values())) < 2:
        return False
    canvas = Canvas(figsize=(8.5, 5.6), layout="constrained")
    axes = canvas.subplots()
    for number, (method, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker = "osD^vP*X"[number // len(COLOURS) % 8]
        axes.errorbar(
            [a.value for _, a, _ in points],
            [b.value for _, _, b in points],
            xerr=[1.96 * a.error for _, a, _ in points],
            yerr=[1.96 * b.error for _, _, b in points],
            color=colour,
            ecolor=colour + "40",
            marker=marker,
            label=method,
            linewidth=1.6,
        )
        for each, a, b in points:
            if each.arm.scale is not None and len(points) > 1:
                axes.annotate(
                    f"{each.arm.scale:g}",
                    (a.value, b.value),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
    for name, found in truth.items():
        if x in found.figures and y in found.figures:
            point = found.figures[x].value, found.figures[y].value
            axes.plot(*point, "k*", markersize=13, label=name)
            break
    arrows = [" \N{RIGHTWARDS ARROW} better", " \N{LEFTWARDS ARROW} better"]
    axes.set_xlabel(x.replace("_", " ") + arrows[not better[0]])
    axes.set_ylabel(y.replace("_", " ") + arrows[not better[1]])
    axes.set_title(f"{y} against {x} over the scale".replace("_", " "), loc="left")
    axes.grid(color="#e3e6ea")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(canvas, path)
    return True


def save_figure(canvas: Any, path: Path) -> Path:
    """Write a figure of matplotlib as a PNG."""
    with written_whole(path) as file:
        canvas.savefig(file, format="png", dpi=110)
    return path
