"""One denoiser call of a pipeline, split into the rows of its branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..errors import GuidanceError
from ..step import Branch
from .layers import rows_of

_CONDITIONS = ("encoder_hidden_states", "text_embeds", "pooled_projections", "class_labels")
_SAMPLE_NAMES = ("sample", "hidden_states")


class Call:
    """The arguments of one denoiser call whose batch is the concatenation of `branches`.

    Diffusers' batched pipelines call the network once on ``[uncond, cond]`` (or on the condition
    alone). Every batch-sized tensor in the arguments, however nested, belongs to the rows.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        branches: tuple[Branch, ...],
    ) -> None:
        self.forward, self.args, self.kwargs, self.branches = forward, args, kwargs, branches
        self.rows = self.sample.shape[0]
        if self.rows % len(branches):
            raise GuidanceError(
                f"The network was called on {self.rows} rows, expected a multiple of "
                f"{len(branches)} ({', '.join(branches)}): this pipeline batches its branches in a "
                "way that guidancekit does not know."
            )
        self.batch = self.rows // len(branches)
        self.reply: Any = None
        self.moved = False

    @property
    def sample(self) -> Tensor:
        """The noisy input of all branches, [rows, C', ...]."""
        if self.args:
            return self.args[0]
        name = next(name for name in _SAMPLE_NAMES if name in self.kwargs)
        return self.kwargs[name]

    @property
    def timestep(self) -> Tensor:
        """The timestep argument: a scalar, or one value per sample."""
        return _take(self._timestep, slice(-self.batch, None), self.rows)

    @property
    def _timestep(self) -> Any:
        """The timestep argument of all rows."""
        return self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]

    def x(self, channels: int) -> Tensor:
        """The noisy latent [B, channels, ...]; inpainting networks read more channels after it."""
        return self.sample[-self.batch :, :channels]

    def conditions(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors [B, ...] that a branch is conditioned on, by argument name."""
        return {
            name: tensor[self._rows(branch)]
            for name, tensor in _named_tensors(self.kwargs).items()
            if name in _CONDITIONS and tensor.shape[0] == self.rows
        }

    def with_conditions(self, changed: dict[Branch, dict[str, Tensor]]) -> Call:
        """The same call, its branches conditioned on other tensors."""
        each = [changed.get(branch) or self.conditions(branch) for branch in self.branches]
        joined = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        return self._copy(kwargs=_with_named(self.kwargs, joined))

    def with_latent(self, x: Tensor) -> Call:
        """The same call at another latent [B, channels, ...]."""
        sample = self.sample.clone()
        sample[:, : x.shape[1]] = x.repeat(len(self.branches), *[1] * (x.ndim - 1))
        moved = self._copy(*_replace(self.args, self.kwargs, 0, _SAMPLE_NAMES, sample))
        moved.moved = True
        return moved

    def evaluate(
        self,
        branch: Branch | None = None,
        x: Tensor | None = None,
        timestep: Any = None,
        conditions: dict[str, Tensor] | None = None,
        network: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Network output for one branch, [B, C, ...], or for all where `branch` is None.

        Optionally at another (x, t), under other conditions, or through another network that takes
        the same arguments.
        """
        args, kwargs, rows = self.args, self.kwargs, slice(0, self.rows)
        if branch is not None:
            rows = self._rows(branch)
            args, kwargs = (_take(value, rows, self.rows) for value in (args, kwargs))
        if x is not None:
            sample = self.sample[rows].clone()
            sample[:, : x.shape[1]] = x
            args, kwargs = _replace(args, kwargs, 0, _SAMPLE_NAMES, sample)
        if timestep is not None:
            timestep = _per_row(timestep, like=self._timestep, rows=rows.stop - rows.start)
            args, kwargs = _replace(args, kwargs, 1, ("timestep",), timestep)
        if conditions is not None:
            kwargs = _with_named(kwargs, conditions)
        self.reply = (network or self.forward)(*args, **kwargs)
        return self.reply[0]

    def answer(self, **values: Tensor) -> Any:
        """What the network would have returned, had it predicted `values` for each branch.

        Where all branches are the guided prediction, the pipeline's own u + s (c - u) is that
        prediction, exactly and whatever s.
        """
        rows = torch.cat([values[branch] for branch in self.branches])
        if self.reply is None:  # nothing was evaluated
            wants_tuple = self.kwargs.get("return_dict") is False
            return (rows,) if wants_tuple else Transformer2DModelOutput(sample=rows)
        if isinstance(self.reply, tuple):
            return (rows, *self.reply[1:])
        return type(self.reply)(sample=rows)

    def _rows(self, branch: Branch) -> slice:
        if branch not in self.branches:
            raise GuidanceError(
                f"The {branch} prediction is needed, but the pipeline was called without it: give "
                "a guidance_scale above 1."
            )
        return rows_of(self.branches, branch, self.rows)

    def _copy(self, args: Any = None, kwargs: Any = None) -> Call:
        copied = Call(
            self.forward,
            self.args if args is None else args,
            self.kwargs if kwargs is None else kwargs,
            self.branches,
        )
        copied.moved = self.moved
        return copied


def _named_tensors(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of nested keyword arguments by their own name."""
    found: dict[str, Tensor] = {}
    for name, value in kwargs.items():
        if isinstance(value, Mapping):
            found |= _named_tensors(value)
        elif isinstance(value, Tensor) and value.ndim:
            found[name] = value
    return found


def _with_named(kwargs: Mapping[str, Any], values: dict[str, Tensor]) -> dict[str, Any]:
    """Nested keyword arguments with the tensors of those names replaced, in their own dtype."""
    return {
        name: _with_named(value, values)
        if isinstance(value, Mapping)
        else values[name].to(value.dtype)
        if name in values
        else value
        for name, value in kwargs.items()
    }


def _take(value: Any, rows: slice, count: int) -> Any:
    """Keep `rows` of every tensor with `count` rows inside nested arguments."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: _take(item, rows, count) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_take(item, rows, count) for item in value)
    return value


def _per_row(timestep: Any, like: Any, rows: int) -> Any:
    """A timestep in the form in which the network takes it: a scalar, or one value per row."""
    if not isinstance(timestep, Tensor) or timestep.ndim or getattr(like, "ndim", 0) == 0:
        return timestep
    return timestep.expand(rows)


def _replace(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int, names: tuple[str, ...], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace one argument, given by position or by name."""
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), kwargs
    name = next(name for name in names if name in kwargs)
    return args, {**kwargs, name: value}
