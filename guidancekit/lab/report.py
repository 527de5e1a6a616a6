"""What a bench found: a table, CSV and JSON of every figure, and plots of the frontiers."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
    ("clip_score", 4),
    ("clip_diversity", 4),
    ("negative_shown", 3),
)
JUDGED = {  # figures of which one side is better: whether more is
    "adherence": True,
    "diversity": True,
    "recall": True,
    "precision": True,
    "frechet": False,
    "colour_error": False,
    "clip_score": True,
    "clip_diversity": True,
}
STEPS = ("scale", "difference", "cosine")  # of `Sample.steps`, after the noise level
FRONTIERS = (  # figures against each other
    ("adherence", "diversity"),
    ("saturation", "frechet"),
    ("effective_scale", "saturation"),
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
        lines.append([_label(each), *cells(each.measured)])
    return markdown(lines)


def differences(baseline: Result, results: Sequence[Result]) -> str:
    """Markdown: what each arm gains and loses against the baseline, and what it costs of it.

    Only what is certain stands there: differences, taken caption by caption, whose 95 % interval
    does not hold 0.
    """
    heads = ["method", "gains", "loses", "rows", "seconds"]
    lines = [heads, ["---"] * len(heads)]
    first = baseline.measured
    assert first is not None
    for each in results:
        if each.measured is None:
            lines.append([each.arm.label, f"refused: {each.refused}", "", "", ""])
            continue
        sides: dict[bool, list[str]] = {True: [], False: []}
        for name, change in changes(each.measured, first).items():
            low, high = change.interval
            if low > 0 or high < 0:
                digits = dict(SHOWN)[name]
                text = f"{name.replace('_', ' ')} {'+' * (change.value > 0)}"
                sides[(change.value > 0) == JUDGED[name]].append(text + interval(change, digits))
        costs = each.measured.rows / first.rows, each.measured.seconds / first.seconds
        lines.append(
            [
                _label(each),
                *(", ".join(sides[side]) or "nothing certain" for side in (True, False)),
                *(f"{cost:.2f}" for cost in costs),
            ]
        )
    return markdown(lines)


def changes(ours: Measured, theirs: Measured) -> dict[str, Figure]:
    """The differences of the figures that have a better side."""
    shared = [name for name in JUDGED if name in ours.figures and name in theirs.figures]
    return {name: ours.figures[name] - theirs.figures[name] for name in shared}


def _label(each: Result) -> str:
    missed = each.match is not None and not each.match.reached
    return each.arm.label + " (not reached)" * missed


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
                "steps": {} if each.measured is None else _steps(each.measured),
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


def _steps(found: Measured) -> dict[str, list[float | None]]:
    """Noise level and what the method did, a value per step; see `Sample.steps`."""
    columns = zip(("noise", *STEPS), found.steps.T, strict=True)
    return {name: [_plain(float(value)) for value in column] for name, column in columns}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def write(
    out: Path,
    results: Sequence[Result],
    truth: Mapping[str, Mapping[str, Measured]],
    facts: Mapping[str, Any],
    plots: bool = True,
    name: str = "report",
) -> list[Path]:
    """The report of a bench in the folder `out`: NAME.md, .json and .csv, and plots.

    `truth` has the rows of the truth by model; `facts` are said at the top of the report. Where
    methods were matched, the first result of a model is the baseline that they were matched to.
    """
    models = list(dict.fromkeys(each.arm.recipe.model for each in results))
    parts = ["# Bench", "\n".join(f"* {fact}: {value}" for fact, value in facts.items())]
    paths = []
    for model in models:
        own = [each for each in results if each.arm.recipe.model == model]
        rows = truth.get(model, {})
        parts += [f"## {model}", table(own, rows)]
        matched = any(each.match for each in own)
        if matched:
            parts += [f"Against {own[0].arm.label}:", differences(own[0], own[1:])]
        for title, draw in (_compared(own) if matched else _over_scale(own, rows)).items():
            path = out / f"{name}-{model.rpartition('/')[2]}-{title}.png".replace(" ", "-")
            if plots and draw(path):
                parts.append(f"![{title}]({path.name})")
                paths.append(path)
    parts += ["## Columns", glossary()]
    every = {f"{m}: {row}": found for m in truth for row, found in truth[m].items()}
    texts = {
        f"{name}.md": "\n\n".join(parts) + "\n",
        f"{name}.json": as_json(results, every, dict(facts)),
        f"{name}.csv": as_csv(results),
    }
    for file_name, text in texts.items():
        with written_whole(out / file_name) as file:
            file.write(text.encode())
    return [out / file_name for file_name in texts] + paths


# --- plots ----------------------------------------------------------------------------------------

COLOURS = (
    "#1a1d21", "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d",
    "#65a30d", "#92400e", "#6b7280", "#4338ca",
)  # fmt: skip


Draw = Callable[[Path], bool]
"""Draws a plot into a file; False, and no file, where there is too little to draw."""


def _over_scale(results: Sequence[Result], truth: Mapping[str, Measured]) -> dict[str, Draw]:
    """The plots of methods at several scales, by title."""
    plots: dict[str, Draw] = {
        f"{y} against {x}".replace("_", " "): partial(frontier, results, truth, x, y)
        for x, y in FRONTIERS
    }
    return {**plots, "steps": partial(over_steps, results)}


def _compared(results: Sequence[Result]) -> dict[str, Draw]:
    """The plots of methods matched to the first, by title."""
    return {"differences": partial(forest, results), "steps": partial(over_steps, results)}


def frontier(
    results: Sequence[Result],
    truth: Mapping[str, Measured],
    x: str,
    y: str,
    path: Path,
) -> bool:
    """One figure against another, a curve over the scale per method.

    All settings answer the same captions, some of which are hard for all. Intervals are therefore
    those of a setting's difference from the mean of all: what tells settings apart.
    """
    known = [
        (each, each.measured.figures[x], each.measured.figures[y])
        for each in results
        if each.measured and {x, y} <= each.measured.figures.keys()
    ]
    if len(known) < 2:
        return False
    errors = zip(
        _own_errors([a for _, a, _ in known]), _own_errors([b for *_, b in known]), strict=True
    )
    curves: dict[str, list[tuple[Result, Figure, Figure, tuple[float, float]]]] = {}
    for (each, a, b), error in zip(known, errors, strict=True):
        curves.setdefault(each.arm.method, []).append((each, a, b, error))
    with _canvas(path, (8.5, 5.6)) as canvas:
        axes = canvas.subplots()
        for (method, points), style in zip(curves.items(), _styles(), strict=False):
            axes.errorbar(
                [a.value for _, a, _, _ in points],
                [b.value for _, _, b, _ in points],
                xerr=[1.96 * error[0] for *_, error in points],
                yerr=[1.96 * error[1] for *_, error in points],
                ecolor=style["color"] + "38",
                label=method,
                linewidth=1.6,
                **style,
            )
            for each, a, b, _ in points:
                if each.arm.scale is not None and len(points) > 1:
                    axes.annotate(
                        f"{each.arm.scale:g}",
                        (a.value, b.value),
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=7,
                        color=style["color"],
                    )
        for name, found in truth.items():
            if x in found.figures and y in found.figures:
                point = found.figures[x].value, found.figures[y].value
                axes.plot(*point, "k*", markersize=13, label=name)
                break
        axes.set_xlabel(_axis(x))
        axes.set_ylabel(_axis(y))
        axes.set_title(f"{y} against {x} over the scale".replace("_", " "), loc="left")
        _plain_axes(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return True


def _own_errors(figures: Sequence[Figure]) -> list[float]:
    """The standard error of each one's difference from the mean of all."""
    value = float(np.mean([each.value for each in figures]))
    mean = Figure(value, np.mean([each.without for each in figures], axis=0))
    return [(each - mean).error for each in figures]


def _axis(name: str) -> str:
    """What a figure is called on an axis, and which side of it is better."""
    return name.replace("_", " ") + (ARROWS[JUDGED[name]] if name in JUDGED else "")


def forest(results: Sequence[Result], path: Path) -> bool:
    """Differences from the first result with 95 % intervals: a panel per figure, a line each.

    Those that are certain are filled, and coloured by whether they are gains.
    """
    first, *others = [each for each in results if each.measured]
    found = [(each, changes(each.measured, first.measured)) for each in others]  # type: ignore[arg-type]
    names = [name for name in JUDGED if any(name in each for _, each in found)]
    if not names:
        return False
    with _canvas(path, (2.1 * len(names) + 1.6, 0.34 * len(found) + 1.4)) as canvas:
        panels = canvas.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            axes.axvline(0, color="#1a1d21", linewidth=1)
            for row, (_, change) in enumerate(found):
                if name not in change:
                    continue
                low, high = change[name].interval
                certain = low > 0 or high < 0
                gain = (change[name].value > 0) == JUDGED[name]
                colour = (GAIN if gain else LOSS) if certain else UNSURE
                axes.plot([low, high], [row, row], color=colour, linewidth=2)
                face = colour if certain else "white"
                axes.plot(change[name].value, row, "o", color=colour, markerfacecolor=face)
            axes.set_xlabel(_axis(name), fontsize=9)
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=4)
            _plain_axes(axes)
        panels[0].set_yticks(range(len(found)), [_label(each) for each, _ in found])
        panels[0].invert_yaxis()
        canvas.suptitle(
            f"difference from {first.arm.label}: gains, losses, and what is not certain",
            x=0.01,
            ha="left",
            fontsize=11,
        )
    return True


def over_steps(results: Sequence[Result], path: Path) -> bool:
    """What methods did at each step, the arm in the middle of each one's: a panel per figure.

    Steps without an effective scale, which are too short to have one, are left out.
    """
    arms: dict[str, list[Result]] = {}
    for each in results:
        if each.measured is not None and len(each.measured.steps):
            arms.setdefault(each.arm.method, []).append(each)
    chosen = [own[len(own) // 2] for own in arms.values()]
    if not chosen:
        return False
    titles = {
        "scale": "scale along cond \N{MINUS SIGN} uncond",
        "difference": "rms of cond \N{MINUS SIGN} uncond, clean latents",
        "cosine": "cosine of the update with it",
    }
    with _canvas(path, (12.5, 4.2)) as canvas:
        panels = canvas.subplots(1, len(STEPS))
        for axes, name in zip(panels, STEPS, strict=True):
            for each, style in zip(chosen, _styles(), strict=False):
                assert each.measured is not None
                found = each.measured.steps
                values = np.where(np.isnan(found[:, 1]), np.nan, found[:, 1 + STEPS.index(name)])
                steps = range(1, 1 + len(values))
                axes.plot(steps, values, label=each.arm.label, markersize=3, linewidth=1.4, **style)
            axes.set_title(titles[name], loc="left", fontsize=10)
            axes.set_xlabel("step")
            _plain_axes(axes)
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return True


ARROWS = {True: " \N{RIGHTWARDS ARROW} better", False: " \N{LEFTWARDS ARROW} better"}
GAIN, LOSS, UNSURE = "#059669", "#dc2626", "#9aa1ab"


def _styles() -> Iterator[dict[str, str]]:
    """Colours and markers that tell curves apart, also of more methods than there are colours."""
    for marker in itertools.cycle("osD^vP*X"):
        for colour in COLOURS:
            yield {"color": colour, "marker": marker}


def _plain_axes(axes: Any) -> None:
    axes.grid(color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def _canvas(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of matplotlib, which is written to `path` in the end."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise GuidanceError(
            "plots need matplotlib: pip install 'guidancekit[lab]', or say --no-plots."
        ) from error
    canvas = Canvas(figsize=size, layout="constrained")
    yield canvas
    save_figure(canvas, path)


def save_figure(canvas: Any, path: Path) -> Path:
    """Write a figure of matplotlib as a PNG."""
    with written_whole(path) as file:
        canvas.savefig(file, format="png", dpi=110)
    return path
