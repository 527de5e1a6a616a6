"""What a network is called with: its arguments by name, and the rows of its batch among them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GuidanceError

Rows = Tensor | list[Tensor]
"""A network's batch: one tensor [rows, ...], or a list with one tensor per row (Z-Image)."""

_SAMPLE = ("sample", "hidden_states", "x")
_TIME = ("timestep", "t")
_TEXT = "encoder_hidden_states"
_SHARED = ("image_rotary_emb", "img_ids", "txt_ids")
"""Positions of tokens: of all rows, where they have no third dimension."""


class Arguments:
    """Arguments by name; those that the pipeline gave by position are passed on by position.

    Every batch-sized tensor in them, however nested, belongs to the rows.
    """

    def __init__(self, values: dict[str, Any], positional: int) -> None:
        self.values, self.positional = values, positional

    @classmethod
    def of(cls, network: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Of a call. Containers are copied: pipelines and networks change them on the way."""
        kind: Any = type(getattr(network, "_orig_mod", network))  # inside torch.compile's module
        names = _names(kind)
        names += tuple(f"argument {i}" for i in range(len(names), len(args)))
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        return cls(_copied(values), len(args))

    def pass_to(self, network: Callable[..., Any]) -> Any:
        """What the network returns for these arguments."""
        values = _copied(self.values)
        first = [values.pop(name) for name in list(values)[: self.positional]]
        return network(*first, **values)

    @property
    def sample(self) -> Rows:
        """The noisy input of all rows."""
        rows: Rows = self.values[self._find(_SAMPLE, "latents")]
        return rows

    @property
    def time(self) -> Any:
        """The timestep of all rows: a scalar, or one value (or more) per row."""
        return self.values[self._find(_TIME, "timestep")]

    def with_sample(self, rows: Rows) -> Arguments:
        return self._replace(self._find(_SAMPLE, "latents"), rows)

    def with_time(self, time: Any, rows: int) -> Arguments:
        """At another time, in the form in which the network takes it: a scalar, or per row."""
        like = self.time
        if isinstance(time, Tensor) and not time.ndim and getattr(like, "ndim", 0) > 0:
            time = time.to(like.device, like.dtype, non_blocking=True)
            time = time.expand(rows, *like.shape[1:])
        return self._replace(self._find(_TIME, "timestep"), time)

    @property
    def batches(self) -> dict[str, Rows]:
        """Tensors, and lists of them, by their own name, however nested."""
        return _batches(self.values)

    def renewed(self, names: set[str], renew: Callable[[str, Rows], Rows]) -> Arguments:
        """With other values for the batches of those names, however nested."""

        def change(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: change(key, item) for key, item in value.items()}
            return renew(name, value) if name in names and value is not None else value

        return Arguments(change("", self.values), self.positional)

    def take(self, rows: Sequence[int]) -> Arguments:
        """The arguments of some rows only."""
        return Arguments(self.rows_of(self.values, rows), self.positional)

    def rows_of(self, value: Any, rows: Sequence[int], name: str = "") -> Any:
        """Some rows of a value, if it is a batch or holds batches."""
        count = len(self.sample)
        if isinstance(value, Tensor):
            if not value.ndim or _shared(name, value):
                return value
            frames, rest = divmod(value.shape[0], count)
            if name == _TEXT and frames > 1 and not rest:  # AnimateDiff repeats it for each frame
                return picked(value.unflatten(0, (count, frames)), rows).flatten(0, 1)
            return picked(value, rows) if value.shape[0] == count else value
        if isinstance(value, Mapping):
            return {key: self.rows_of(item, rows, key) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            listed = isinstance(self.sample, list) and all(isinstance(i, Tensor) for i in value)
            if listed and len(value) == count:
                return [value[i] for i in rows]
            return type(value)(self.rows_of(item, rows, name) for item in value)
        return value

    def _find(self, names: tuple[str, ...], what: str) -> str:
        for name in names:
            if name in self.values:
                return name
        raise GuidanceError(
            f"guidancekit does not find the {what} among the arguments of the network, "
            f"{', '.join(self.values)}: expected one of {', '.join(names)}."
        )

    def _replace(self, name: str, value: Any) -> Arguments:
        return Arguments({**self.values, name: value}, self.positional)


def joined(parts: Sequence[Rows], like: Rows) -> Rows:
    """Batches after one another, in the form and dtype of `like`."""
    dtype = like[0].dtype
    if isinstance(like, list):
        return [row.to(dtype) for part in parts for row in part]
    return torch.cat([part.to(dtype) for part in parts if isinstance(part, Tensor)])


@functools.cache
def _names(network: Any) -> tuple[str, ...]:
    """The arguments that a network's forward takes by position."""
    found = inspect.signature(network.forward).parameters.values()
    return tuple(each.name for each in found if each.kind is each.POSITIONAL_OR_KEYWORD)[1:]


def _copied(value: Any) -> Any:
    """Nested containers anew, with the same tensors in them."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _batches(values: Mapping[str, Any]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _batches(value)
        elif isinstance(value, Tensor):
            if value.ndim:
                found[name] = value
        elif isinstance(value, list) and value and all(isinstance(row, Tensor) for row in value):
            found[name] = value
    return found


def _shared(name: str, value: Tensor) -> bool:
    """Whether an argument is the same for all rows, whatever its size."""
    return name in _SHARED and value.ndim < 3


def picked(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor; without a copy where they are evenly spaced.

    Not by an index tensor, which would have to be brought to the device.
    """
    parts = [tensor[part] for part in _slices(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _slices(rows: Sequence[int]) -> list[slice]:
    """Rows as slices, each as long as they go on evenly."""
    found, start = [], 0
    while start < len(rows):
        first, end, space = rows[start], start + 1, 1
        if end < len(rows) and rows[end] > first:
            space = rows[end] - first
            while end < len(rows) and rows[end] - rows[end - 1] == space:
                end += 1
        found.append(slice(first, rows[end - 1] + 1, space))
        start = end
    return found
