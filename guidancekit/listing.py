"""The list of all methods, from their source text: importing them means torch, and seconds."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_HERE = Path(__file__).parent


def overview() -> str:
    """One line per strategy and schedule: name, class, paper, summary."""
    strategies = [cls for path in (_HERE / "methods").glob("*.py") for cls in _classes(path)]
    groups = {
        "strategies": sorted(strategies, key=lambda cls: cls.name),
        "schedules": _classes(_HERE / "schedules.py"),
    }
    lines = []
    for heading, group in groups.items():
        rows = [(cls.name, cls.__name__, cls.paper, summary(cls)) for cls in group]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0  # nothing stands to the right of the summaries
        lines.append(f"{heading}:")
        lines += ["  " + "  ".join(map(str.ljust, row, widths)) for row in rows]
        lines.append("")
    return "\n".join([*lines, "guidancekit methods NAME shows parameters, presets and cost."])


def paragraphs(cls: Any) -> list[str]:
    """The paragraphs of a docstring, each in one line; the first is the summary."""
    text = textwrap.dedent("    " + (cls.__doc__ or "").strip())
    return [" ".join(part.split()) for part in text.split("\n\n")]


def summary(cls: Any) -> str:
    """The first paragraph without the paper at its end, which has a column of its own."""
    paper = rf",( after| from)? {re.escape(cls.paper)}( (Eq|Alg|Sec|Fig)[^:;]*)?\.?$"
    text = paragraphs(cls)[0]
    return re.sub(paper, ".", text) if cls.paper else text


def _classes(path: Path) -> list[Any]:
    """Stand-ins for the classes of a file that have a `name`: that, the paper and the docstring."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            values = {"name": "", "paper": ""}
            for each in node.body:
                match each:
                    case ast.Assign([ast.Name(key)], ast.Constant(str(value))):
                        values[key] = value
                    case ast.AnnAssign(ast.Name(key), _, ast.Constant(str(value))):
                        values[key] = value
            if values["name"]:
                names = {"__name__": node.name, "__doc__": ast.get_docstring(node)}
                found.append(SimpleNamespace(**values, **names))
    return found
