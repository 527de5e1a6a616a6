"""What there is, in words: the list of methods, and each with its parameters and presets."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from .parameters import Parameter, parameters
from .registry import create, methods, schedules

WIDTH = 92  # characters
KINDS = {"scale": "number or schedule", "floats": "numbers"}


def overview() -> str:
    """One line per strategy and schedule: name, class, paper, summary."""
    lines = []
    groups: dict[str, dict[str, Any]] = {"strategies": methods(), "schedules": schedules()}
    for heading, group in groups.items():
        rows = [(n, cls.__name__, cls.paper, _summary(cls)) for n, cls in group.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0  # nothing stands to the right of the summaries
        lines.append(f"{heading}:")
        lines += ["  " + "  ".join(map(str.ljust, row, widths)) for row in rows]
        lines.append("")
    return "\n".join([*lines, "guidancekit methods NAME shows parameters, presets and cost."])


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


def paragraphs(cls: Any) -> list[str]:
    """The paragraphs of a docstring, each in one line; the first is the summary."""
    text = textwrap.dedent("    " + (cls.__doc__ or "").strip())
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _summary(cls: Any) -> str:
    """The first paragraph without the paper at its end, which has a column of its own."""
    paper = rf",( after| from)? {re.escape(cls.paper)}( (Eq|Alg|Sec|Fig)[^:;]*)?\.?$"
    text = paragraphs(cls)[0]
    return re.sub(paper, ".", text) if cls.paper else text


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
