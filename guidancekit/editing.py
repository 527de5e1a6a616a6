"""Changing one setting of a guidance: what sliders, axes and menus do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .composition import Sum
from .errors import GuidanceError
from .guidance import Guidance, live
from .parameters import parameters
from .registry import find
from .schedules import Schedule


def terms_of(guidance: Guidance) -> tuple[Guidance, ...]:
    """The terms of a sum; any other guidance is its own only term."""
    return guidance.terms if isinstance(guidance, Sum) else (guidance,)


def settings(value: Guidance | Schedule) -> dict[str, Any]:
    """The parameters of a guidance or schedule as they were given, by name."""
    names = [each.name for each in parameters(type(value))]
    if isinstance(value, Schedule):
        return {name: getattr(value, name) for name in names}
    return {name: live(value.config[name]) for name in names}


def changed(guidance: Guidance, path: Sequence[int | str], value: Any) -> Guidance:
    """`guidance` with one parameter set to `value`.

    `path` is the number of the term, the name of its parameter and, where schedules stand for
    scales, the names of theirs: ``(0, "scale", "low")``. Raises `GuidanceError` for a path that
    leads nowhere and for an unfit value.
    """
    terms = list(terms_of(guidance))
    term, *names = path
    if not isinstance(term, int) or not 0 <= term < len(terms):
        raise GuidanceError(f"found term {term!r}, but {guidance!r} has {len(terms)}.")
    terms[term] = _changed(terms[term], names, value)
    return joined(terms)


def joined(terms: Sequence[Guidance]) -> Guidance:
    """The sum of strategies; one alone is itself."""
    return terms[0] if len(terms) == 1 else Sum(list(terms))


def with_schedule(scale: Any, name: str | None, family: str | None = None) -> Any:
    """A scale under the schedule `name`, or the plain scale inside of one where that is None.

    The schedule's other parameters are those of its preset for the model `family`, or defaults.
    """
    while isinstance(scale, Schedule):
        scale = getattr(scale, "scale", None)
    if name is None:
        return scale
    cls: Any = find(name)
    preset = cls.presets.get(family)
    values = dict(preset.values) if preset else {}
    if any(parameter.name == "scale" for parameter in parameters(cls)):
        values["scale"] = scale
    return cls(**values)


def _changed(owner: Any, names: Sequence[int | str], value: Any) -> Any:
    values = settings(owner) if isinstance(owner, (Guidance, Schedule)) else {}
    if not names or names[0] not in values:
        known = ", ".join(values) or "none"
        raise GuidanceError(f"{owner!r} has no parameter {names[:1]}. It has: {known}.")
    name, *rest = names
    values[str(name)] = _changed(values[str(name)], rest, value) if rest else value
    return type(owner)(**values)
