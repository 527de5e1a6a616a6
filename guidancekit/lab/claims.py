"""What the papers say of their methods, tested: a table of claims, and verdicts with intervals.

A claim says in which direction a figure differs between two settings. Both answer the same captions
from the same noise, so the difference is taken caption by caption. The verdict follows from its
95 % interval alone: the claim holds if the whole interval lies on the claimed side, it does not
hold if the whole interval lies on the other, and is inconclusive here otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import GuidanceError
from ..files import written_whole
from ..measures import distance
from ..recipe import Recipe, installed_versions
from ..series import Process
from .bench import Bench, Result, Tell
from .experiment import Arm, Call, Questions, arm
from .metrics import Figure, figure, mean
from .report import interval, markdown

Direction = Literal["higher", "lower", "same"]
Asked = Literal["captions", "nothing", "unwanted", "inverted"]
NEGATIVE = "a large shape"
UNWANTED = tuple(
    f"a {colour} {shape}"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "star", "heart", "cross")
)
"""Prompts that leave the size open, about which the negative prompt has a word to say."""


@dataclass(frozen=True)
class Setting:
    """A method at a scale, on the number of steps of the run times `steps`."""

    method: str
    scale: float | None = None
    steps: float = 1.0

    def __str__(self) -> str:
        text = self.method if self.scale is None else f"{self.method} at {self.scale:g}"
        return text if self.steps == 1 else f"{text}, {self.steps:.0%} of the steps"


@dataclass(frozen=True)
class Claim:
    """`figure` of `ours` is higher or lower than that of `theirs`, or the same within `margin`.

    Where there are two settings on a side, their difference is meant: first minus second. The
    figure "distance" is that of the pictures to the ones of `reference`. `asked`: "captions",
    "nothing" (the empty prompt), "unwanted" (with a negative prompt) or "inverted" (from the noise
    behind true pictures).
    """

    paper: str
    words: str
    ours: tuple[Setting, ...]
    theirs: tuple[Setting, ...]
    figure: str
    direction: Direction
    margin: float = 0.0
    asked: Asked = "captions"
    reference: Setting | None = None


def _claim(paper: str, words: str, ours: Any, theirs: Any, *rest: Any, **options: Any) -> Claim:
    first, second = (each if isinstance(each, tuple) else (each,) for each in (ours, theirs))
    return Claim(paper, words, first, second, *rest, **options)


HIGH, USUAL, LOW = 10.0, 4.0, 2.0
CFG_HIGH, CFG_USUAL, PLAIN = Setting("cfg", HIGH), Setting("cfg", USUAL), Setting("cfg", 1.0)

CLAIMS: tuple[Claim, ...] = (
    _claim("2410.02416", "APG saturates less than CFG at a high scale",
           Setting("apg", HIGH), CFG_HIGH, "saturation", "lower"),
    _claim("2410.02416", "APG has a higher recall than CFG at a high scale",
           Setting("apg", HIGH), CFG_HIGH, "recall", "higher"),
    _claim("2410.02416", "APG is nearer to the truth than CFG at a high scale",
           Setting("apg", HIGH), CFG_HIGH, "frechet", "lower"),
    _claim("2506.19713", "FDG is nearer to the truth than CFG at a low scale",
           Setting("fdg", LOW), Setting("cfg", LOW), "frechet", "lower"),
    _claim("2506.19713", "FDG keeps the diversity of CFG at a low scale",
           Setting("fdg", LOW), Setting("cfg", LOW), "diversity", "same", margin=0.05),
    _claim("2404.07724", "An interval is nearer to the truth than guidance in all steps",
           Setting("interval", HIGH), CFG_HIGH, "frechet", "lower"),
    _claim("2404.07724", "An interval has a higher recall than guidance in all steps",
           Setting("interval", HIGH), CFG_HIGH, "recall", "higher"),
    _claim("2406.08070", "CFG++ at lambda 0.6 keeps more diversity than CFG at 7.5",
           Setting("cfg++", 0.6), Setting("cfg", 7.5), "diversity", "higher"),
    _claim("2406.08070", "CFG++ at lambda 0.6 is nearer to the truth than CFG at 7.5",
           Setting("cfg++", 0.6), Setting("cfg", 7.5), "frechet", "lower"),
    _claim("2406.08070", "CFG++ at lambda 0.6 inverts pictures better than CFG at 7.5",
           Setting("cfg++", 0.6), Setting("cfg", 7.5), "reconstruction", "lower",
           asked="inverted"),
    _claim("2312.12487", "AG keeps CFG's picture better than as many fewer steps",
           Setting("adaptive", USUAL), Setting("cfg", USUAL, 0.75), "distance", "lower",
           reference=CFG_USUAL),
    _claim("2312.12487", "LinearAG keeps CFG's picture better than as many fewer steps",
           Setting("linear-ag", USUAL), Setting("cfg", USUAL, 0.6), "distance", "lower",
           reference=CFG_USUAL),
    _claim("2502.10574", "beta-CFG is nearer to the truth than CFG at a usual scale",
           Setting("beta-cfg", USUAL), CFG_USUAL, "frechet", "lower"),
    _claim("2506.24108", "The annealed scale is nearer to the truth than CFG",
           Setting("annealing"), CFG_USUAL, "frechet", "lower"),
    _claim("2506.24108", "The annealed scale follows the prompt as well as CFG",
           Setting("annealing"), CFG_USUAL, "adherence", "same", margin=0.05),
    _claim("2210.00939", "SAG improves unconditional pictures",
           Setting("sag"), PLAIN, "frechet", "lower", asked="nothing"),
    _claim("2403.17377", "PAG improves unconditional pictures",
           Setting("pag"), PLAIN, "frechet", "lower", asked="nothing"),
    _claim("2408.00760", "SEG improves unconditional pictures",
           Setting("seg"), PLAIN, "frechet", "lower", asked="nothing"),
    _claim("2407.02687", "ICG is as near to the truth as CFG",
           Setting("icg", USUAL), CFG_USUAL, "frechet", "same", margin=0.02),
    _claim("2407.02687", "ICG follows the prompt as well as CFG",
           Setting("icg", USUAL), CFG_USUAL, "adherence", "same", margin=0.05),
    _claim("2407.02687", "TSG improves unconditional pictures",
           Setting("tsg"), PLAIN, "frechet", "lower", asked="nothing"),
    _claim("2503.18886", "CFG-Zero* is nearer to the truth than CFG",
           Setting("cfg-zero*", USUAL), CFG_USUAL, "frechet", "lower"),
    _claim("2503.18886", "CFG-Zero* follows the prompt better than CFG",
           Setting("cfg-zero*", USUAL), CFG_USUAL, "adherence", "higher"),
    _claim("2601.21892", "CFG-MP loses less than CFG when the scale rises",
           (Setting("cfg-mp", HIGH), Setting("cfg-mp", USUAL)), (CFG_HIGH, CFG_USUAL),
           "frechet", "lower"),
    _claim("2510.07631", "Rectified-CFG++ is nearer to the truth than CFG",
           Setting("rectified-cfg++", USUAL), CFG_USUAL, "frechet", "lower"),
    _claim("2505.21179", "NAG makes the negative prompt count where CFG is off, in few steps",
           Setting("nag", steps=0.27), Setting("cfg", 1.0, 0.27), "negative_shown", "lower",
           asked="unwanted"),
    _claim("2406.02507", "AutoGuidance keeps more diversity than CFG",
           Setting("autoguidance"), CFG_USUAL, "diversity", "higher"),
    _claim("2406.02507", "AutoGuidance is nearer to the truth than CFG",
           Setting("autoguidance"), CFG_USUAL, "frechet", "lower"),
    _claim("2310.17347", "CADS has more diversity than CFG at a high scale",
           Setting("cads", HIGH), CFG_HIGH, "diversity", "higher"),
    _claim("2305.08891", "Rescaled CFG clips less than CFG at a high scale",
           Setting("rescaled-cfg", HIGH), CFG_HIGH, "clipping", "lower"),
    _claim("2205.11487", "Dynamic thresholding saturates less than CFG at a high scale",
           Setting("dynamic-thresholding", HIGH), CFG_HIGH, "saturation", "lower"),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """How a claim came out on a model: the figures of both sides and their difference."""

    claim: Claim
    model: str
    ours: Figure | None = None
    theirs: Figure | None = None
    refused: str | None = None

    @property
    def difference(self) -> Figure | None:
        return None if self.ours is None or self.theirs is None else self.ours - self.theirs

    def __str__(self) -> str:
        """holds, does not hold, inconclusive here, or not tested."""
        if self.difference is None:
            return "not tested"
        low, high = self.difference.interval
        margin = self.claim.margin
        if self.claim.direction == "same":
            inside, outside = -margin < low and high < margin, low > margin or high < -margin
        elif self.claim.direction == "lower":
            inside, outside = high < 0, low > 0
        else:
            inside, outside = low > 0, high < 0
        return "holds" if inside else "does not hold" if outside else "inconclusive here"


def about(methods: Sequence[str]) -> list[Claim]:
    """The claims about some methods, or all; raises `GuidanceError` where there is none of one."""
    names = {setting.method for claim in CLAIMS for setting in claim.ours}
    if missing := [method for method in methods if method not in names]:
        raise GuidanceError(
            f"there is no claim about {', '.join(missing)}. There are some about: "
            f"{', '.join(sorted(names))}."
        )
    return [claim for claim in CLAIMS if not methods or claim.ours[0].method in methods]


def questions_of(kind: str, questions: Questions) -> Questions:
    """What a claim asks: as many pictures as `questions` has, of other prompts."""
    if kind == "nothing":
        return replace(questions, prompts=("",) * len(questions.prompts), negative="")
    if kind == "unwanted":
        return replace(questions, prompts=UNWANTED, negative=NEGATIVE)
    if kind == "inverted":
        return replace(questions, inverted=True)
    return questions


class Trial:
    """Claims on the models of `bases`, with the answers in the folder `out`.

    The settings of all claims are run once each, whichever claims share them.
    """

    def __init__(
        self,
        bases: Sequence[Recipe],
        questions: Questions,
        out: Path,
        process: Process,
        claims: Sequence[Claim] = CLAIMS,
    ) -> None:
        kinds = dict.fromkeys(claim.asked for claim in claims)
        self._benches = {kind: Bench(out, questions_of(kind, questions), process) for kind in kinds}
        self._plans = [(base, claim) for base in bases for claim in claims]
        self._arms: dict[_Key, Arm] = {}
        for base, claim in self._plans:
            for setting in _settings(claim):
                if (made := _arm(base, setting)) is not None:
                    self._arms.setdefault(_key(claim, made), made)

    @property
    def calls(self) -> list[Call]:
        """The calls of the pipeline that all settings take."""
        return [
            call for kind in self._benches for call in self._benches[kind].calls(self._of(kind))
        ]

    def _of(self, kind: Asked) -> list[Arm]:
        return [each for key, each in self._arms.items() if key.asked == kind]

    def run(self, tell: Tell = lambda call: None) -> None:
        """Make this process's share of the pictures that are not there yet."""
        for kind, bench in self._benches.items():
            bench.run(self._of(kind), tell)

    def verdicts(self) -> list[Verdict] | None:
        """One per claim and model; None while other processes are at work."""
        found: dict[_Key, Result] = {}
        for key, each in self._arms.items():
            result = self._benches[key.asked].result(each)
            if result is None:
                return None
            found[key] = result
        return [
            _verdict(base, claim, self._benches[claim.asked], found) for base, claim in self._plans
        ]


class _Key(NamedTuple):
    """What pictures are the same: what was asked, and how they were made."""

    asked: Asked
    recipe: str


def _key(claim: Claim, each: Arm) -> _Key:
    return _Key(claim.asked, each.recipe.to_json())


def _settings(claim: Claim) -> list[Setting]:
    return [*claim.ours, *claim.theirs, *([claim.reference] if claim.reference else [])]


def _arm(base: Recipe, setting: Setting) -> Arm | None:
    """The setting on a model; None where the method cannot be made for it."""
    recipe = replace(base, steps=max(1, round(base.steps * setting.steps)))
    try:
        return arm(recipe, setting.method, setting.scale)
    except GuidanceError:
        return None


def _verdict(base: Recipe, claim: Claim, bench: Bench, found: Mapping[_Key, Result]) -> Verdict:
    made = {setting: _arm(base, setting) for setting in _settings(claim)}
    for setting, each in made.items():
        result = None if each is None else found[_key(claim, each)]
        if result is None or result.measured is None:
            why = "needs further settings" if result is None else result.refused
            return Verdict(claim, base.model, refused=f"{setting}: {why}")

    def value(setting: Setting) -> Figure | None:
        each = made[setting]
        assert each is not None
        if claim.figure == "distance":
            assert claim.reference is not None
            other = made[claim.reference]
            assert other is not None
            return _distance(bench, each, other)
        measured = found[_key(claim, each)].measured
        assert measured is not None
        return measured.figures.get(claim.figure)

    sides = []
    for side in (claim.ours, claim.theirs):
        figures = [value(setting) for setting in side]
        if any(each is None for each in figures):
            return Verdict(claim, base.model, refused=f"there is no {claim.figure}")
        first, *rest = [each for each in figures if each is not None]
        sides.append(first - rest[0] if rest else first)
    return Verdict(claim, base.model, sides[0], sides[1])


def _distance(bench: Bench, ours: Arm, reference: Arm) -> Figure:
    """Root mean square distance of pictures from those of the reference, from the same noise."""
    a, b = bench.sample(ours), bench.sample(reference)
    assert a is not None and b is not None
    pairs = [each.pictures.astype(np.float32) / 255 for each in (a, b)]
    return figure(mean(distance(*pairs), a.number), len(bench.questions.prompts))


Intervals = Mapping[tuple[str, str], tuple[float, float]]
"""The 95 % intervals of differences, by model and claim."""


def read_intervals(path: Path) -> Intervals:
    """Those of a claims.json that was written before."""
    try:
        rows = json.loads(path.read_text())["claims"]
        return {
            (row["model"], row["claim"]): tuple(row["interval"]) for row in rows if row["interval"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuidanceError(
            f"--against: found {path}, expected a claims.json ({error})."
        ) from error


def summary(verdicts: Sequence[Verdict]) -> str:
    """Markdown: a row per claim, a column of verdicts per model, and how many of each there are."""
    models = list(dict.fromkeys(each.model for each in verdicts))
    found: dict[str, dict[str, str]] = {}
    for each in verdicts:
        found.setdefault(each.claim.words, {})[each.model] = str(each)
    lines = [["claim", *models], ["---"] * (1 + len(models))]
    for words, by_model in found.items():
        lines.append([words, *(by_model.get(model, "") for model in models)])
    counts = [Counter(str(each) for each in verdicts if each.model == model) for model in models]
    lines += [["", *(", ".join(f"{k}: {n}" for k, n in c.most_common()) for c in counts)]]
    return markdown(lines)


def table(verdicts: Sequence[Verdict], earlier: Intervals | None = None) -> str:
    """Markdown: a row per claim and model; with `earlier`, whether a repetition agrees."""
    heads = ["claim", "paper", "model", "figure", "ours", "theirs", "difference", "verdict"]
    heads += ["earlier interval", "inside"] if earlier is not None else []
    lines = [heads, ["---"] * len(heads)]
    for each in verdicts:
        claim = each.claim
        link = f"[{claim.paper}](https://arxiv.org/abs/{claim.paper})"
        sides = " - ".join(map(str, claim.ours)), " - ".join(map(str, claim.theirs))
        start = [claim.words, link, each.model, claim.figure.replace("_", " ")]
        if each.difference is None or each.ours is None or each.theirs is None:
            line = [*start, sides[0], sides[1], "", f"not tested: {each.refused}"]
            lines.append(line + [""] * (len(heads) - len(line)))
            continue
        digits = 4 if claim.figure in ("frechet", "colour_error", "distance") else 3
        line = [
            *start,
            f"{sides[0]}: {interval(each.ours, digits)}",
            f"{sides[1]}: {interval(each.theirs, digits)}",
            interval(each.difference, digits),
            f"**{each}**",
        ]
        if earlier is not None:
            known = earlier.get((each.model, claim.words))
            line += ["", ""] if known is None else _agreement(each.difference, known, digits)
        lines.append(line)
    return markdown(lines)


def _agreement(difference: Figure, earlier: tuple[float, float], digits: int) -> list[str]:
    low, high = earlier
    inside = low <= difference.value <= high
    return [f"{low:.{digits}f} to {high:.{digits}f}", "yes" if inside else "no"]


def write(
    out: Path,
    verdicts: Sequence[Verdict],
    facts: Mapping[str, Any],
    earlier: Intervals | None = None,
) -> list[Path]:
    """claims.md and claims.json in the folder `out`; `earlier` as in `table`."""
    head = "\n".join(f"* {name}: {value}" for name, value in facts.items())
    assert __doc__ is not None
    method = __doc__.partition("\n\n")[2].strip()
    tables = f"{summary(verdicts)}\n\n{table(verdicts, earlier)}"
    text = f"# Claims\n\n{method}\n\n{head}\n\n{tables}\n"
    content = {
        "versions": installed_versions(),
        **facts,
        "claims": [
            {
                "paper": each.claim.paper,
                "claim": each.claim.words,
                "model": each.model,
                "figure": each.claim.figure,
                "ours": each.ours and each.ours.value,
                "theirs": each.theirs and each.theirs.value,
                "difference": each.difference and each.difference.value,
                "interval": each.difference and each.difference.interval,
                "verdict": str(each),
                "refused": each.refused,
            }
            for each in verdicts
        ],
    }
    paths = [out / "claims.md", out / "claims.json"]
    for path, body in zip(paths, (text, json.dumps(content, indent=1) + "\n"), strict=True):
        with written_whole(path) as file:
            file.write(body.encode())
    return paths
