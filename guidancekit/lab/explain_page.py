"""The page of `guidancekit explain`: what the figures of an `Explanation` mean, for a reader who
knows CFG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..composition import Sum
from ..guidance import Guidance
from ..listing import summary
from ..measures import Array, pixels, saturation
from ..methods.cfgpp import Renoising
from ..recipe import installed_versions
from ..registry import parse
from .explain import SHARES, Explanation, Seen
from .page import document, element, facts, image, table
from .svg import Axis, Line, legend, number, plot

PLAIN = "plain CFG"
STRENGTH, CONTENT = "How strong it is", "What it is made of"


@dataclass(frozen=True)
class Panel:
    """A plot: its words, the figures that it shows by what they are called, and its rules."""

    title: str
    words: str
    curves: dict[str, str]
    rules: tuple[tuple[float, str], ...] = ()


def panels(guidance: Guidance) -> dict[str, list[Panel]]:
    """The plots by section, for a method."""
    scale = (
        "How far along cond − uncond the prediction is moved, counted as a CFG scale: 1 is the "
        "conditional prediction, and plain CFG is flat. A move in another direction counts by its "
        "projection."
    )
    direction = (
        "Cosine of the angle between what is added to x0(cond) and cond − uncond: 1 is straight "
        "on, as plain CFG goes above w\u00a0=\u00a01; at 0 the two have nothing in common."
    )
    if isinstance(guidance, Renoising):
        scale += (
            " This method moves the latent after the scheduler's step: shown is the scale that CFG "
            "would need for the same result in a deterministic first-order step."
        )
        direction += (
            " Up to lambda = 1 the clean estimate of this method lies between the two predictions, "
            "so that the update points back; its strength comes from the unconditional noise that "
            "the latent keeps."
        )
    along = {"parallel": "along x0(cond)", "orthogonal": "across it"}
    bands = {"low": "low frequencies", "high": "high frequencies"}
    return {
        STRENGTH: [
            Panel("Effective scale", scale, {"scale": ""}, ((1, "no guidance"),)),
            Panel("Direction of the update", direction, {"cosine": ""}),
            Panel(
                "Size of the guided prediction",
                "Norm of the guided x0 over that of x0(cond). Well above 1 the clean latent is "
                "predicted larger than the model makes it by itself, which shows as contrast and "
                "saturation.",
                {"ratio": ""},
                ((1, "as x0(cond)"),),
            ),
            Panel(
                "Size of the difference",
                "Root mean square, per element of the latent, of x0(cond) − x0(uncond): what "
                "guidance has to work with. The two runs differ here only because they have come "
                "to different latents.",
                {"difference size": ""},
            ),
            Panel(
                "Size of the update",
                "Root mean square of what is really added to x0(cond). Plain CFG adds "
                "w\u00a0−\u00a01 times the difference. Where it is 0 the step is not guided.",
                {"update size": ""},
            ),
        ],
        CONTENT: [
            Panel(
                "The difference, along and across",
                "cond − uncond as APG splits it. The part along x0(cond) only enlarges what is "
                "predicted anyway (contrast, saturation); the part across changes what is "
                "predicted. Their squares add up to that of the whole.",
                {f"difference {part}": name for part, name in along.items()},
            ),
            Panel(
                "The update, along and across",
                "What is added, split likewise: along x0(cond) it only enlarges, across it "
                "changes. Plain CFG adds w\u00a0−\u00a01 times both parts of its difference; a "
                "method that treats them differently shows it here.",
                {f"update {part}": name for part, name in along.items()},
            ),
            Panel(
                "The difference, by frequency",
                "cond − uncond as FDG splits it, with a Laplacian pyramid of two levels. Low "
                "frequencies are layout and areas of colour, high ones edges and texture.",
                {f"difference {part}": name for part, name in bands.items()},
            ),
            Panel(
                "The update, by frequency",
                "What is added, split likewise, low frequencies being layout and areas of "
                "colour: which of the two the method favours, against plain CFG, which takes them "
                "as they come.",
                {f"update {part}": name for part, name in bands.items()},
            ),
        ],
    }


def page(explanation: Explanation) -> str:
    """The page, as HTML text."""
    guidance = parse(explanation.method.recipe.guidance)
    prompt = explanation.method.recipe.prompt
    names = dict(zip(explanation.runs, (name_of(guidance), PLAIN), strict=False))
    parts = [
        _head(explanation, guidance),
        element("h2", "The pictures"),
        _pictures(explanation, names),
        _glance(explanation, names),
        *_strip(explanation, names, guidance),
    ]
    for section, each in panels(guidance).items():
        plots = [text for panel in each if (text := _plot(panel, explanation, names))]
        if section == STRENGTH:
            plots.append(_evaluations(explanation, names))
        if not plots:
            continue
        parts.append(element("h2", section))
        if section == STRENGTH:
            parts.append(element("p", _HOW_TO_READ.format(seeds=_seeds(explanation)), "small"))
        parts.append(f'<div class="plots">{"".join(plots)}</div>')
    parts += [*_linear(explanation, names), _numbers(explanation.method, names["method"])]
    if explanation.notes:
        parts.append(element("h2", "Notes"))
        notes = "".join(element("li", note) for note in explanation.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    versions = ", ".join(f"{package} {found}" for package, found in installed_versions().items())
    parts.append(element("footer", f"guidancekit explain; {versions}"))
    return document(f"{names['method']}: {prompt}", *parts)


_HOW_TO_READ = (
    "Every run goes from noise, at the left, to the picture, at the right. Curves are means over "
    "{seeds}; the shade behind them reaches from the lowest to the highest. Point at a dot to read "
    "its value."
)


def name_of(guidance: Guidance) -> str:
    """A method in a few letters."""
    text = repr(guidance)
    return text.removesuffix("()") if len(text) <= 24 else _class_name(guidance)


def _class_name(guidance: Guidance) -> str:
    if isinstance(guidance, Sum):
        return " + ".join(_class_name(term) for term in guidance.terms)
    return type(guidance).__name__


def _seeds(explanation: Explanation) -> str:
    count = len(explanation.seeds)
    return f"{count} seeds" if count > 1 else "one seed"


# --- head, pictures, figures ----------------------------------------------------------------------


def _head(explanation: Explanation, guidance: Guidance) -> str:
    recipe = explanation.method.recipe
    terms = guidance.terms if isinstance(guidance, Sum) else (guidance,)
    lines = [
        element("p", "what guidance does to the prediction", "kicker"),
        element("h1", recipe.prompt, "long" if len(recipe.prompt) > 90 else ""),
    ]
    for term in terms:
        paper = term.paper
        link = (
            f' <a href="https://arxiv.org/abs/{html.escape(paper.removeprefix("arXiv:"))}">'
            f"{html.escape(paper)}</a>"
            if paper.startswith("arXiv:")
            else ""
        )
        lines.append(f"<p>{html.escape(summary(type(term)))}{link}</p>")
    seeds = explanation.seeds
    consecutive = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    shown = f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))
    lines.append(
        facts(
            {
                "method": recipe.guidance,
                "pipeline's scale": (
                    "its default" if recipe.guidance_scale is None else f"{recipe.guidance_scale:g}"
                ),
                "negative prompt": recipe.negative,
                "model": recipe.model,
                "scheduler": recipe.scheduler or "the model's own",
                "steps": str(recipe.steps),
                "seeds": shown,
            }
        )
    )
    return f"<header>{''.join(lines)}</header>"


def _pictures(explanation: Explanation, names: dict[str, str]) -> str:
    heads = [f"seed {seed}" for seed in explanation.seeds]
    rows = [
        (names[key], "", [image(picture, f"{names[key]}, {head}") for picture, head in
         zip(run.pictures, heads, strict=True)])
        for key, run in explanation.runs.items()
    ]  # fmt: skip
    return _rows([(head, "") for head in heads], rows)


def _glance(explanation: Explanation, names: dict[str, str]) -> str:
    """What the plots come to, in one number each."""

    def share(run: Seen, part: str, whole: Sequence[str]) -> str:
        total = sum(run.energy(f"update {each}") for each in whole)
        if not math.isfinite(total):
            return "–"
        return f"{100 * run.energy(f'update {part}') / total:.0f} %" if total else "no update"

    rows: dict[str, list[str]] = {}
    for run in explanation.runs.values():
        along, bands = ("parallel", "orthogonal"), ("low", "high")
        vivid = np.mean([saturation(pixels(picture)) for picture in run.pictures])
        figures = {
            "network evaluations per picture": f"{run.evaluations.sum():g}",
            "effective scale, mean over the steps": _figure(run.mean("scale")),
            "size of the guided x0 over x0(cond)": _figure(run.mean("ratio")),
            "size of the update, root mean square": _figure(math.sqrt(run.energy("update size"))),
            "share of the update along x0(cond), in energy": share(run, "parallel", along),
            "share of the update in low frequencies, in energy": share(run, "low", bands),
            "saturation of the pictures, 0 to 1": _figure(float(vivid)),
        }
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    heads = ["over the whole run", *(names[key] for key in explanation.runs)]
    return table(heads, [[name, *values] for name, values in rows.items()])


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}".replace("inf", "∞")


# --- predictions, step by step --------------------------------------------------------------------


def _strip(explanation: Explanation, names: dict[str, str], guidance: Guidance) -> list[str]:
    """The predictions of the first seed as rows of pictures."""
    run, plain = explanation.method, explanation.baseline
    if not run.strip:
        return []
    steps = sorted(run.strip)
    weak = "negative prompt" if run.recipe.negative else "unconditional"
    name, seed = names["method"], explanation.seeds[0]
    differences, gain = _differences(run, steps)
    moved = " behind the next latent" if isinstance(guidance, Renoising) else ""
    rows: list[tuple[str, str, list[str]]] = [
        ("conditional", "x0(cond)", _cells(run, "cond", steps)),
        (weak, "x0(uncond)", _cells(run, "uncond", steps)),
        ("their difference", f"times {gain:.2g}, around grey", differences),
        (name, f"the guided x0{moved}", [*_cells(run, "guided", steps), _last(run, name)]),
    ]
    if plain is not None:
        rows += [
            ("CFG in its place", "of the same two predictions", _cells(run, "cfg", steps)),
            (PLAIN, "in a run of its own", [*_cells(plain, "guided", steps), _last(plain, PLAIN)]),
        ]
    words = (
        f"What the model takes the clean picture to be at chosen steps of seed {seed}, and what "
        f"{name} makes of it. "
        + (_IN_PLACE if plain is not None and _cells(run, "cfg", steps) else "")
        + (_BESIDE if plain is not None else "")
    )
    heads = [(f"step {step + 1}", _level(run, step)) for step in steps]
    return [
        element("h2", "The prediction, step by step"),
        element("p", words),
        _rows([*heads, ("picture", "")], [row for row in rows if any(row[2])]),
    ]


_IN_PLACE = (
    "CFG in its place shows what plain CFG would have made of the same two predictions, so it "
    "differs by the rule alone. "
)
_BESIDE = "The last row is a run under plain CFG from the same noise, which has gone its own way."


def _level(run: Seen, step: int) -> str:
    axis, values = _noise(run)
    if np.isnan(run.noise).any():
        return ""
    return f"{axis.label.rpartition(' ')[2]} {number(float(f'{values[step]:.2g}'))}"


def _cells(run: Seen, name: str, steps: Sequence[int]) -> list[str]:
    shown = [run.strip.get(step, {}).get(name) for step in steps]
    if all(each is None for each in shown):
        return []
    return [
        _NONE if each is None else image(_picture(each), f"{name}, step {step + 1}")
        for step, each in zip(steps, shown, strict=True)
    ]


def _differences(run: Seen, steps: Sequence[int]) -> tuple[list[str], float]:
    """cond - uncond in pixels around grey, enlarged by one factor that nearly fills the range."""
    pairs = [(run.strip[step].get("cond"), run.strip[step].get("uncond")) for step in steps]
    found = [None if a is None or b is None else a - b for a, b in pairs]
    known = [np.abs(each).ravel() for each in found if each is not None]
    if not known:
        return [], 1.0
    gain = float(np.clip(0.5 / max(np.quantile(np.concatenate(known), 0.99), 1e-6), 0.5, 50))
    gain = float(f"{gain:.2g}")
    return [
        _NONE if each is None else image(_picture(0.5 + gain * each), f"difference, {step + 1}")
        for step, each in zip(steps, found, strict=True)
    ], gain


def _last(run: Seen, name: str) -> str:
    return image(run.pictures[0], f"{name}, the picture")


def _picture(array: Array) -> Image.Image:
    return Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8))


_NONE = '<span class="none">not<br>evaluated</span>'


def _rows(heads: Sequence[tuple[str, str]], rows: Sequence[tuple[str, str, list[str]]]) -> str:
    """A table of pictures, given as HTML; names and details are text."""

    def head(name: str, detail: str) -> str:
        below = f"<small>{html.escape(detail)}</small>" if detail else ""
        return f"<th>{html.escape(name)}{below}</th>"

    top = "".join(head(*each) for each in heads)
    body = "".join(
        f"<tr>{head(name, detail)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, detail, cells in rows
    )
    return (
        f'<div class="wide"><table class="strip"><thead><tr><th></th>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# --- plots ---------------------------------------------------------------------------------------


def _noise(run: Seen) -> tuple[Axis, Array]:
    """The axis of the plots, from noise to clean, and where each step lies on it."""
    noise = run.noise
    if np.isnan(noise).any():
        steps = np.arange(1, len(noise) + 1)
        return Axis("step", 1, max(2, len(noise))), steps
    if noise.max() > 1000 or noise.min() <= 0:  # flow models, which start with nothing but noise
        return Axis("noise level σ/(α+σ)", 1, 0), 1 - 1 / (1 + noise)
    return Axis("noise level σ/α", noise[0], noise[-1], log=True), noise


def _plot(panel: Panel, explanation: Explanation, names: dict[str, str]) -> str:
    """A plot with its words; empty where the method has none of its figures, or no parts."""
    found = explanation.method.figures
    if all(np.isnan(found[figure]).all() for figure in panel.curves):
        return ""
    if len(panel.curves) > 1 and not any(found[figure].any() for figure in panel.curves):
        return ""
    axis, x = _noise(explanation.method)
    lines = []
    for key, run in explanation.runs.items():
        for (figure, name), colour in zip(panel.curves.items(), ("one", "two"), strict=False):
            values = run.figures[figure]
            if not np.isfinite(values).any():
                continue
            plain = key != "method"
            mean, low, high = _over_seeds(values)
            lines.append(
                Line(
                    f"{name}, {names[key]}" if name else names[key],
                    x,
                    mean,
                    _colour(key) if len(panel.curves) == 1 else colour,
                    dashed=plain,
                    low=() if plain else low,
                    high=() if plain else high,
                )
            )
    ends = [*(value for value, _ in panel.rules), 0]
    return _figure_of(panel.title, panel.words, lines, axis, ends, panel.rules)


def _over_seeds(values: Array) -> tuple[Array, Array, Array]:
    """Mean, least and greatest of each step, over the seeds that have a value; else NaN."""
    known = np.ma.masked_invalid(values)
    mean, low, high = (each.filled(np.nan) for each in (known.mean(1), known.min(1), known.max(1)))
    return mean, low, high


def _colour(run: str) -> str:
    return "method" if run == "method" else "cfg"


def _figure_of(
    title: str,
    words: str,
    lines: list[Line],
    axis: Axis,
    include: Sequence[float],
    rules: Sequence[tuple[float, str]] = (),
) -> str:
    if not lines:
        return ""
    values = [value for line in lines for value in (*line.y, *line.low, *line.high)]
    y = Axis.over(title, values, include)
    return (
        f"<figure><figcaption>{element('h3', title)}{element('p', words)}</figcaption>"
        f"{legend(lines)}{plot(lines, axis, y, title, rules)}</figure>"
    )


def _evaluations(explanation: Explanation, names: dict[str, str]) -> str:
    axis, x = _noise(explanation.method)
    lines = [
        Line(names[key], x, run.evaluations, _colour(key), dashed=key != "method")
        for key, run in explanation.runs.items()
    ]
    words = (
        "Per picture in each step. One evaluation is one picture through the network once; CFG "
        "takes two, one for each branch."
    )
    return _figure_of("Network evaluations", words, lines, axis, [0, 3])


def _linear(explanation: Explanation, names: dict[str, str]) -> list[str]:
    """The linear decomposition of the difference, estimated over the seeds."""
    axis, x = _noise(explanation.method)
    count = len(explanation.seeds)
    if np.isnan(explanation.method.shares).all():
        return []
    plots = []
    for key, run in explanation.runs.items():
        if np.isfinite(run.shares).any():
            colours = zip(SHARES, ("one", "two", "three"), run.shares.T, strict=True)
            lines = [Line(name, x, share, colour) for name, colour, share in colours]
            words = f"Shares of the mean square of cond − uncond in the run of {names[key]}."
            rules = [(1 / count, f"1/{count}: chance")]
            plots.append(_figure_of(names[key], words, lines, axis, [0, 1], rules))
    words = (
        "In a linear model of diffusion (arXiv:2505.19210) the difference cond − uncond is a sum "
        "of three parts. The mean shift is the same for every picture: it pulls all of them to "
        "what is typical of the prompt. The contrastive components depend on where a picture is: "
        "the positive one enlarges what sets it apart, the negative one takes it back."
    )
    caution = (
        f"Estimated here from {count} seeds, without the covariances of the paper: the mean over "
        "the seeds is the mean shift, and what each picture has besides counts as positive or "
        "negative as a whole, by the sign of its product with the latent's own distance from the "
        "mean latent. Differences without anything in common would show a mean shift of "
        f"1/{count}. The linear picture is good at high and middle noise levels and fails at low "
        "ones."
    )
    return [
        element("h2", "What the difference consists of"),
        element("p", words),
        element("p", caution, "small"),
        f'<div class="plots">{"".join(plots)}</div>',
    ]


def _numbers(run: Seen, name: str) -> str:
    """Every figure of every step, means over the seeds."""
    names = [figure for figure, values in run.figures.items() if np.isfinite(values).any()]
    shares = SHARES if np.isfinite(run.shares).any() else ()
    means = {figure: _over_seeds(run.figures[figure])[0] for figure in names}
    rows = []
    for i, noise in enumerate(run.noise):
        values = [noise, run.evaluations[i], *(means[figure][i] for figure in names)]
        values += [*run.shares[i]] if shares else []
        rows.append([str(i + 1), *(_figure(float(value)) for value in values)])
    figures = table(["step", "noise σ/α", "evaluations", *names, *shares], rows, "")
    return f"<details>{element('summary', f'All figures of {name}')}{figures}</details>"
