"""Constructor parameters, declared once in the signature: checked, listed and shown from there.

A parameter is an annotated argument::

    eta: Annotated[float, Range(0, 1), "share of the parallel component that is kept"] = 0.0

The constructor validates against it, and the command line and the app build their options from it.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import GuidanceError


@dataclass(frozen=True)
class Range:
    """Closed interval of valid values; `slider` is the part worth exploring by hand."""

    low: float = -math.inf
    high: float = math.inf
    slider: tuple[float, float] | None = None

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Preset:
    """Published settings of a method for one model family, and where they were published."""

    values: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Parameter:
    """One constructor argument.

    `kind` is "float", "int", "bool", "str", "floats" (a sequence of numbers), "choice", "scale"
    (a number or a `Schedule`) or "object" (anything else).
    """

    name: str
    kind: str
    default: Any
    doc: str
    range: Range
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def low(self) -> float:
        return self.range.low

    @property
    def high(self) -> float:
        return self.range.high

    @property
    def slider(self) -> tuple[float, float] | None:
        return self.range.slider

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def check(self, value: Any, owner: str) -> None:
        """Raise `GuidanceError` unless `value` is of the declared type and range."""
        from .schedules import Schedule

        where = f"{owner}({self.name}=...)"
        if (value is None and self.optional) or self.kind == "object":
            return
        if self.kind == "scale" and isinstance(value, (Schedule, dict)):
            return
        if self.kind == "choice":
            if value not in self.choices:
                options = ", ".join(repr(choice) for choice in self.choices)
                raise GuidanceError(f"{where}: found {value!r:.80}, expected one of {options}.")
            return
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise GuidanceError(f"{where}: found {value!r:.80}, expected True or False.")
            return
        if self.kind == "str":
            if not isinstance(value, str):
                raise GuidanceError(f"{where}: found {value!r:.80}, expected text.")
            return
        if self.kind == "floats":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise GuidanceError(f"{where}: found {value!r:.80}, expected a list of numbers.")
            for item in value:
                self._check_number(item, where)
            return
        self._check_number(value, where)

    def _check_number(self, value: Any, where: str) -> None:
        expected = "a whole number" if self.kind == "int" else "a number"
        if self.kind == "scale":
            expected += " or a schedule"
        if self.optional:
            expected += " or None"
        types_ = (int,) if self.kind == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, types_):
            raise GuidanceError(f"{where}: found {value!r:.80}, expected {expected}.")
        if not abs(value) < 1e12 or value not in self.range:
            raise GuidanceError(f"{where}: found {value!r:.80}, expected {expected}, {self.range}.")


def parameters(cls: type) -> list[Parameter]:
    """The constructor arguments of `cls`, in order, read from its annotated signature."""
    constructor: Any = cls.__init__  # type: ignore[misc]
    hints = get_type_hints(constructor, include_extras=True)
    arguments = list(inspect.signature(constructor).parameters.items())[1:]
    return [
        _parameter(name, hints.get(name, Any), argument.default) for name, argument in arguments
    ]


def value_of(text: str) -> Any:
    """A value as it is typed: a number, True, False, None or auto, a list; else text."""
    if text.lower() in ("auto", "none"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?(nan|inf|infinity)", text.lower()):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(cls: type, values: dict[str, Any]) -> None:
    """Validate constructor `values` of `cls` against its signature; raises `GuidanceError`."""
    for parameter in parameters(cls):
        if parameter.name in values:
            parameter.check(values[parameter.name], cls.__name__)


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    extras: tuple[Any, ...] = ()
    if get_origin(hint) is typing.Annotated:
        hint, *rest = get_args(hint)
        extras = tuple(rest)
    found = next((extra for extra in extras if isinstance(extra, Range)), Range())
    doc = next((extra for extra in extras if isinstance(extra, str)), "")
    members = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in members
    members = tuple(member for member in members if member is not type(None))
    choices = get_args(members[0]) if get_origin(members[0]) is Literal else ()
    return Parameter(name, _kind(members), default, doc, found, choices, optional)


def _kind(members: tuple[Any, ...]) -> str:
    from .schedules import Schedule

    if Schedule in members:
        return "scale"
    if get_origin(members[0]) is Literal:
        return "choice"
    if get_origin(members[0]) is Sequence and get_args(members[0]) == (float,):
        return "floats"
    return {float: "float", int: "int", bool: "bool", str: "str"}.get(members[0], "object")
