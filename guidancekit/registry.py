"""Strategies by name, and from text: what the command line, the app and files use."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from typing import Any

from .composition import COMPOSITIONS
from .errors import GuidanceError
from .guidance import Guidance
from .parameters import parameters
from .schedules import SCHEDULES, Schedule

_LONGEST = 2000  # characters; text may come from a stranger's file
_STRING = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""")


@functools.cache
def methods() -> dict[str, type[Guidance]]:
    """Every strategy by its registry name: the `Guidance` classes of the files in ``methods/``."""
    from . import methods as package

    found: dict[str, type[Guidance]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            defined_here = inspect.isclass(value) and value.__module__ == module.__name__
            if defined_here and issubclass(value, Guidance) and value.name:
                found[value.name] = value
    return dict(sorted(found.items()))


def schedules() -> dict[str, type[Schedule]]:
    """Every schedule by its registry name."""
    return dict(SCHEDULES)


def find(name: str) -> type[Guidance] | type[Schedule]:
    """The strategy or schedule class of a registry or class name, in any case."""
    known: dict[str, type[Guidance] | type[Schedule]] = {**methods(), **SCHEDULES}
    by_class = {cls.__name__.lower(): cls for cls in (*known.values(), *COMPOSITIONS)}
    cls = known.get(name.lower()) or by_class.get(name.lower())
    if cls is None:
        raise GuidanceError(
            f"there is no method {name!r}{_nearest(name, list(known))}. "
            f"There are: {', '.join(known)}."
        )
    return cls


def create(name: str, family: str | None = None, /, **values: Any) -> Guidance:
    """Make a strategy by name; a schedule's name makes CFG under that schedule.

    Where it has a preset for the model `family`, what `values` leave open is taken from there.
    Raises `GuidanceError` for an unknown name or parameter, with the nearest ones.
    """
    return _scheduled(_make(name, values, family))


def parse(text: str, family: str | None = None) -> Guidance:
    """Read a strategy from text such as ``"apg(scale=12, eta=0.5)"`` or ``"CFG(5) + APG()"``.

    Names are registry or class names. ``parse(repr(guidance))`` rebuilds any guidance. Only names,
    calls, numbers, strings, lists and ``+`` are read; nothing is executed. `family` as in `create`.
    """
    expected = GuidanceError(
        f"found {text[:80]!r}, expected a method such as apg, apg(scale=12) or cfg(5) + apg."
    )
    if len(text) > _LONGEST:
        raise expected
    source = _with_class_names(text.strip().replace("\0", "?"))
    try:
        value = _scheduled(_evaluate(ast.parse(source, mode="eval").body, text, family))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise expected from error
    if not isinstance(value, Guidance):
        raise expected
    return value


def quoted(text: str) -> list[str]:
    """The strings in the text of a guidance, such as the names of files."""
    return [part[1:-1] for part in _STRING.split(text)[1::2]]


def _scheduled(value: Any) -> Any:
    """CFG under a schedule, where a schedule stands alone."""
    cfg: Any = methods()["cfg"]
    return cfg(scale=value) if isinstance(value, Schedule) else value


def _with_class_names(source: str) -> str:
    """`source` with class names where a registry name is no Python name; strings stay."""
    known = sorted({**methods(), **SCHEDULES}.items(), key=lambda item: -len(item[0]))
    parts = _STRING.split(source)
    for i in range(0, len(parts), 2):  # strings are at the odd places
        for name, cls in known:
            if not name.isidentifier():
                parts[i] = parts[i].replace(name, cls.__name__)
    return "".join(parts)


def _evaluate(node: ast.expr, text: str, family: str | None) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(item, text, family) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name):
            return _make(name, {}, family)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            names = [parameter.name for parameter in parameters(find(name))]
            if len(args) > len(names):
                raise GuidanceError(f"{name} takes {len(names)} values, found {len(args)}.")
            given = dict(zip(names, args, strict=False))
            given |= {str(keyword.arg): keyword.value for keyword in keywords}
            values = {key: _evaluate(value, text, family) for key, value in given.items()}
            return _make(name, values, family)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            terms = [_evaluate(each, text, family) for each in (left, right)]
            if all(isinstance(term, Guidance) for term in terms):
                return terms[0] + terms[1]
    raise GuidanceError(f"cannot read {ast.unparse(node)!r} in {text!r}: not a method or a value.")


def _make(name: str, values: dict[str, Any], family: str | None) -> Any:
    cls: Any = find(name)
    known = [parameter.name for parameter in parameters(cls)]
    for key in values:
        if key not in known:
            raise GuidanceError(
                f"{name} has no parameter {key!r}{_nearest(key, known)}. "
                f"It has: {', '.join(known)}."
            )
    preset = cls.presets.get(family)
    return cls(**{**(preset.values if preset else {}), **values})


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
