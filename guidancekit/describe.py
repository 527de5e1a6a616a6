"""Each method in words: what it does and costs, its parameters, its presets."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sized
from typing import Any

from .composition import SideBySide, Sum
from .guidance import Guidance
from .listing import paragraphs, summary
from .parameters import Parameter, parameters
from .registry import create, methods, schedules

WIDTH = 92  # characters
KINDS = {"scale": "number or schedule", "floats": "numbers"}


def describe(name: str) -> str:
    """A method or schedule: what it does and costs, its parameters, its presets with sources.

    Raises `GuidanceError`, with the nearest names, for an unknown one.
    """
    classes: dict[str, Any] = {**methods(), **schedules()}
    if name not in classes:
        create(name)  # raises
    cls = classes[name]
    parts = [f"{cls.name}: {cls.__name__}, {cls.paper or 'no paper'}"]
    parts += [
        textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
        for text in paragraphs(cls)
    ]
    parts.append("\n".join(["parameters:", *map(_parameter, parameters(cls))]))
    if presets := getattr(cls, "presets", {}):
        parts.append("\n".join(["presets:", *(_preset(*item) for item in presets.items())]))
    return "\n\n".join(parts)


def markdown() -> str:
    """The table of all strategies in GitHub's Markdown: `guidancekit methods --markdown`."""
    heads = (
        "name",
        "class",
        "paper",
        "what it does",
        "network evaluations per step",
        "tested against",
    )
    lines = [heads, ("---",) * len(heads)]
    for name, cls in methods().items():
        number = cls.paper.removeprefix("arXiv:")
        costs = re.sub(r" network evaluations?( per step)?", "", cost(cls), count=1)
        texts = (summary(cls), costs, oracle(cls))
        cells = [re.sub(r"([|*<])", r"\\\1", text).rstrip(".") for text in texts]
        paper = f"[{number}](https://arxiv.org/abs/{number})"
        lines.append((f"`{name}`", f"`{cls.__name__}`", paper, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost(cls: Any) -> str:
    """What a docstring says after "Cost:": the network evaluations of a step, and when fewer."""
    return _said(cls, "Cost")


def oracle(cls: Any) -> str:
    """What a docstring says after "Oracle:": the independent reference of the tests, or none."""
    return _said(cls, "Oracle")


def evaluations(guidance: Guidance, steps: int = 1) -> int:
    """The network evaluations that a sample takes in each step at most, to estimate a run's time.

    As documented: the number, with parameters in backticks, that the sentence on cost begins with.
    It is fewer where the scale is 1 and outside of windows, and in a sum, whose terms are taken to
    share nothing but the conditional prediction. What is evaluated once per run is spread over its
    `steps`. A solver with two stages takes twice as many.
    """
    if isinstance(guidance, Sum):
        return 1 + sum(evaluations(term, steps) - 1 for term in guidance.terms)
    if isinstance(guidance, SideBySide):
        return max(evaluations(term, steps) for term in guidance.terms)
    sentence = cost(type(guidance)) or "2 network evaluations"  # CFG's
    beginning = sentence.partition(" network evaluation")[0]
    further = "further" in beginning  # than the conditional one
    once = re.search(r", and ([^;]*) once", sentence)
    per_run = _count(once[1], guidance) if once else 0
    return _count(beginning, guidance) + further + math.ceil(per_run / steps)


def _count(text: str, guidance: Guidance) -> int:
    """The value of "2 + 3 `parameter`"; a parameter that is a list counts its entries."""
    total = 0
    for term in text.split(" + "):
        names, number = re.findall(r"`(\w+)`", term), re.search(r"\d+", term)
        value = int(number[0]) if number else int(bool(names))
        for parameter in (getattr(guidance, name) for name in names):
            value *= len(parameter) if isinstance(parameter, Sized) else int(parameter)
        total += value
    return total


def _said(cls: Any, subject: str) -> str:
    """What the last paragraph says on a subject; "" where it says nothing."""
    found = re.search(rf"\b{subject}: (.*?)(?: Oracle: |$)", paragraphs(cls)[-1])
    return found[1] if found else ""


def _parameter(parameter: Parameter) -> str:
    default = "required" if parameter.required else f"default {parameter.default!r}"
    limits = ", ".join(parameter.choices)
    if parameter.kind in ("float", "int", "floats", "scale"):
        limits = str(parameter.range)
    facts = [KINDS.get(parameter.kind, parameter.kind), limits, default]
    return f"  {parameter.name} ({'; '.join(filter(None, facts))})\n      {parameter.doc}"


def _preset(name: str, preset: Any) -> str:
    values = ", ".join(f"{key}={value}" for key, value in preset.values.items())
    return f"  {name}: {values}\n      {preset.source}"
