"""`guidancekit bench`: methods times scales times prompts times seeds, and their figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .. import bundled
from ..errors import GuidanceError
from ..files import written_whole
from ..generate import follows_pipeline, with_scale
from ..recipe import Recipe
from ..registry import methods, parse
from ..scoring import CLIPScore
from ..series import Process
from .experiment import Arm, Call, Questions, Sample, arm, calls, read, refusal, run
from .matching import LOWEST, STRENGTHS, Match, match
from .measuring import Laboratory, Measured
from .scenes import Judge

Tell = Callable[[Call], None]


@dataclass(frozen=True)
class Result:
    """An arm with its figures, or why it has none; `match` where its scale was searched for."""

    arm: Arm
    measured: Measured | None = None
    refused: str | None = None
    match: Match | None = None


@dataclass
class Bench:
    """Arms that answer the same questions, with their files in the folder `out`."""

    out: Path
    questions: Questions
    process: Process = field(default_factory=lambda: Process("cpu"))
    clip: CLIPScore | None = None

    def __post_init__(self) -> None:
        self._laboratories: dict[bool, Laboratory] = {}
        self._measured: dict[str, Measured] = {}

    def laboratory(self, model: str) -> Laboratory:
        """What measures the pictures of a model: the embedded ones draw scenes."""
        scenes = model in bundled.MODELS
        if scenes not in self._laboratories:
            judge = Judge() if scenes else None
            found = Laboratory(self.questions, judge, self.clip, self.process.device)
            self._laboratories[scenes] = found
        return self._laboratories[scenes]

    def calls(self, arms: Sequence[Arm]) -> list[Call]:
        """The calls of the pipeline that arms take."""
        return calls(self.out, arms, self.questions)

    def run(self, arms: Sequence[Arm], tell: Tell = lambda call: None) -> None:
        """Make this process's share of the pictures that are not there yet."""
        run(self.calls(arms), self.process, tell)

    def sample(self, each: Arm) -> Sample | None:
        """The pictures of an arm; None where some are missing."""
        return read(self.calls([each]))

    def export(self, each: Arm) -> Path:
        """Write the pictures of an arm as PNGs for other programs; the folder they are in."""
        sample = self.sample(each)
        assert sample is not None
        model = each.recipe.model.rpartition("/")[2]
        folder = self.out / "pictures" / model / re.sub(r"[^a-z0-9.+*]+", "-", each.label.lower())
        for ask, picture in zip(self.questions.asks, sample.pictures, strict=True):
            with written_whole(folder / f"{ask.number:05d}-{ask.seed}.png") as file:
                Image.fromarray(picture).save(file, format="PNG")
        return folder

    def result(self, each: Arm) -> Result | None:
        """The figures of an arm, or its refusal; None while other processes are at work on it."""
        known = each.recipe.to_json()
        if known not in self._measured:
            sample = self.sample(each)
            if sample is None:
                refused = refusal(self.calls([each]))
                return Result(each, refused=refused) if refused else None
            self._measured[known] = self.laboratory(each.recipe.model).measure(sample)
        return Result(each, self._measured[known])

    def results(self, arms: Sequence[Arm]) -> list[Result] | None:
        """Those of all arms; None while other processes are at work."""
        found = [self.result(each) for each in arms]
        return [each for each in found if each] if all(found) else None

    def matched(
        self, baseline: Arm, names: Sequence[str], kind: str, tell: Tell = lambda call: None
    ) -> list[Result] | None:
        """The baseline, and each method at the scale at which its figure `kind` is the same.

        `kind` is a name of `STRENGTHS`. Processes share the methods; None while others are at work.
        """
        name = STRENGTHS[kind]
        run(self.calls([baseline]), Process(self.process.device), tell)
        first = self.result(baseline)
        assert first is not None
        if first.measured is None or name not in first.measured.figures:
            raise GuidanceError(
                f"--match {kind}: {baseline.label} on {baseline.recipe.model} has no such figure"
                + (f": {first.refused}" if first.refused else ", which only scenes have.")
            )
        target = first.measured.figures[name].value
        for method in names[self.process.index :: self.process.count]:
            self._matched(baseline, method, name, target, tell)
        found = [self._matched(baseline, method, name, target) for method in names]
        return [first, *(each for each in found if each)] if all(found) else None

    def _matched(
        self, baseline: Arm, method: str, name: str, target: float, tell: Tell | None = None
    ) -> Result | None:
        """The method at its scale; without `tell` by what is there, None if that is too little."""
        results: dict[float, Result] = {}

        def value(scale: float) -> float:
            each = arm(baseline.recipe, method, scale)
            if tell is not None:
                run(self.calls([each]), Process(self.process.device), tell)
            found = self.result(each)
            if found is None or found.measured is None or name not in found.measured.figures:
                raise _Stop(found)
            results[scale] = found
            return found.measured.figures[name].value

        try:
            start = baseline.scale or baseline.recipe.guidance_scale or LOWEST
            best = match(value, target, start, falling=name == "diversity")
        except _Stop as stop:
            return stop.result
        found = results[best.scale]
        return Result(found.arm, found.measured, match=best)


class _Stop(Exception):  # noqa: N818 - it stops a search, nothing is wrong
    """There is no figure to bisect on: a refusal, or None where another process is at work."""

    def __init__(self, result: Result | None) -> None:
        if result is not None and result.refused is None:
            result = Result(result.arm, refused="has no figure of this kind")
        self.result = result


def make_arms(base: Recipe, names: Sequence[str], scales: Sequence[float]) -> list[Arm]:
    """Methods times scales on the model of `base`; "all" are all that need no further settings.

    A method whose scale is not that of CFG (SAG, NAG...), or that names it, stands there once.
    Raises `GuidanceError` for an unknown method or an unfit value.
    """
    family = bundled.family(base.model)
    rest = [name for name in methods() if "all" in names and name not in names]
    arms = []
    for name in dict.fromkeys([*(name for name in names if name != "all"), *rest]):
        try:
            guidance, _ = with_scale(name, None, family=family)
        except GuidanceError:
            if name not in rest:
                raise
            continue
        free = scales and follows_pipeline(parse(guidance))
        arms += [arm(base, name, scale) for scale in (scales if free else (None,))]
    if not arms:
        raise GuidanceError("there is no method to measure: give names, for example cfg,apg.")
    return arms
