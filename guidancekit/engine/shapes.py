"""The CFG shapes: how a pipeline asks its network for its branches, read from its first call.

Whatever their architecture, Diffusers' pipelines do so in few ways:

- one batched call on [uncond, cond]: Stable Diffusion, SDXL, SD3, PixArt, Sana, AuraFlow, LTX, ...;
- two calls, first cond, then uncond: Flux, Qwen-Image, Wan, CogView4, Lumina 2, HunyuanVideo, ...;
- one batched call on [cond, uncond]: DiT, with learned sigma; Z-Image, whose batch is a list;
- one call on cond: distilled models, and runs without guidance.

A shape also says where the latents lie in the network's tensors (some read more channels or tokens
than they predict), whether they are packed into tokens, and how the network counts time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..step import BOTH, COND, Branch
from .arguments import Arguments, Rows


@dataclass(frozen=True)
class Packing:
    """Latents [B, C, h, w] (or [B, C, frames, h, w]) as tokens [B, N, C * patch^2], and back."""

    grid: tuple[int, ...]
    patch: int = 1

    def unpack(self, tokens: Tensor) -> Tensor:
        spatial = tokens.transpose(1, 2).unflatten(2, self.grid)
        p = self.patch
        if p == 1:
            return spatial
        x = spatial.unflatten(1, (-1, p, p))  # [B, C, p, p, h, w]
        return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)

    def pack(self, x: Tensor) -> Tensor:
        p = self.patch
        if p > 1:
            x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, h, p, w, p]
            x = x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        return x.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class FramesFirst:
    """Latents [B, C, frames, h, w] that the pipeline keeps as [B, frames, C, h, w] (CogVideoX)."""

    grid: tuple[int, ...]

    def unpack(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@dataclass(frozen=True)
class Layout:
    """Between the tensors of network and scheduler and the latents that strategies see.

    `shape` is a row of the latents as the pipeline keeps them. `sign` is -1 for networks that
    predict the opposite of what the scheduler reads.
    """

    shape: tuple[int, ...]
    packing: Packing | FramesFirst | None = None
    sign: int = 1

    def cut(self, rows: Rows) -> Tensor:
        """The latents' part of the network's rows, [rows, *shape]: they come first."""
        if isinstance(rows, list):
            rows = torch.stack(rows)
        if rows.ndim != len(self.shape) + 1:  # Z-Image adds a dimension for frames
            return rows.reshape(-1, *self.shape)
        box = (slice(None), *(slice(0, n) for n in self.shape))
        return rows[box]

    def paste(self, latents: Tensor, rows: Rows) -> Rows:
        """The network's rows with other latents [rows, *shape], in their dtype."""
        if isinstance(rows, list):
            return [
                each.to(row.dtype).reshape(row.shape)
                for row, each in zip(rows, latents, strict=True)
            ]
        if rows.shape[1:] == self.shape:
            return latents.to(rows.dtype)
        rows = rows.clone()
        self.cut(rows).copy_(latents)
        return rows

    def unpack(self, latents: Tensor) -> Tensor:
        """What strategies see of latents [rows, *shape]."""
        return self.packing.unpack(latents) if self.packing else latents

    def pack(self, x: Tensor) -> Tensor:
        """Latents [rows, *shape] of what strategies see."""
        return self.packing.pack(x) if self.packing else x

    @property
    def grid(self) -> tuple[int, ...]:
        """The latents' cells, or the tokens where they are packed: (h, w) or (frames, h, w)."""
        return self.packing.grid if self.packing else self.shape[1:]


@dataclass(frozen=True)
class Clock:
    """From the scheduler's time to the network's: ``rate * t``, or ``1 - rate * t``.

    Networks that count from noise to data also predict the velocity of that direction, the opposite
    of the scheduler's.
    """

    rate: float = 1.0
    reversed: bool = False

    @classmethod
    def read(cls, scheduled: float, given: float, steps: int) -> Clock:
        """From one pair of times; `steps` is the scheduler's number of training steps."""
        if abs(given - scheduled) <= 0.01 * abs(scheduled):
            return cls()
        share = scheduled / steps
        if abs(given - share) > 0.01 and abs(given - (1 - share)) < 0.01:
            return cls(1 / steps, reversed=True)
        if scheduled <= 0:
            return cls()
        rate = given / scheduled
        for usual in (1.0, 1 / steps):  # half precision rounds times
            if abs(rate / usual - 1) < 0.01:
                rate = usual
        return cls(rate)

    def __call__(self, scheduled: Tensor | float) -> Tensor:
        time = torch.as_tensor(scheduled)
        if self.reversed:
            return 1 - self.rate * time
        return time if self.rate == 1 else self.rate * time


@dataclass(frozen=True)
class Shape:
    """How a pipeline asks for its branches, in runs of `batch` samples.

    `branches` are those of a run, in the order of their rows, or of their calls where `sequential`.
    `offset` is what the pipeline's own guidance scale lacks to w.
    """

    branches: tuple[Branch, ...]
    sequential: bool
    batch: int
    layout: Layout
    clock: Clock
    offset: float = 0.0

    @classmethod
    def read(cls, pipe: Any, network: Any, scope: Mapping[str, Any], given: Arguments) -> Shape:
        """From the first call of a run, and the local variables of the pipeline's call.

        Raises `GuidanceError` where the batch is neither one nor two rows per sample.
        """
        latents = scope.get("latents")
        if not isinstance(latents, Tensor) or not latents.ndim:
            raise GuidanceError(
                f"{type(pipe).__name__} keeps no latents that guidancekit can find: it does not "
                "support this pipeline."
            )
        batch, count = latents.shape[0], len(given.sample)
        now, steps = scope.get("t"), int(pipe.scheduler.config.get("num_train_timesteps", 1000))
        told = float(torch.as_tensor(given.time).flatten()[0])
        clock = Clock() if now is None else Clock.read(float(now), told, steps)
        packing = _packing(pipe, network, latents, scope, given.values)
        layout = Layout(tuple(latents.shape[1:]), packing, sign=-1 if clock.reversed else 1)
        if count == 2 * batch:
            listed = isinstance(given.sample, list)
            labels = given.values.get("class_labels") is not None
            only_labels = labels and given.values.get("encoder_hidden_states") is None
            branches = BOTH[::-1] if listed or only_labels else BOTH
            return cls(branches, False, batch, layout, clock, offset=float(listed))
        sequential = guided(pipe, scope)
        shape = cls(BOTH[::-1] if sequential else COND, sequential, batch, layout, clock)
        shape.branches_of(given, 0)
        return shape

    def branches_of(self, given: Arguments, earlier: int) -> tuple[Branch, ...]:
        """The branches in a call, which is not the first of its step if there were `earlier` ones.

        Some pipelines leave out the unconditional branch in some steps (cfg_truncation).
        """
        rows, joint = len(given.sample), not self.sequential
        if joint and rows == len(self.branches) * self.batch:
            return self.branches
        if rows == self.batch:
            return COND if joint else self.branches[earlier:][:1]
        raise GuidanceError(
            f"The pipeline called its network on {rows} rows for {self.batch} samples, expected "
            "one or two for each: it batches its branches in a way that guidancekit does not know."
        )


def guided(pipe: Any, scope: Mapping[str, Any]) -> bool:
    """Whether the pipeline makes an unconditional prediction in this run, as it says itself."""
    for name in ("do_true_cfg", "do_classifier_free_guidance"):
        if isinstance(scope.get(name), bool):
            return bool(scope[name])
    return bool(getattr(pipe, "do_classifier_free_guidance", False))


def _packing(
    pipe: Any,
    network: Any,
    latents: Tensor,
    scope: Mapping[str, Any],
    values: Mapping[str, Any],
) -> Packing | FramesFirst | None:
    """How latents make up a picture; None if they are one as they are, or nothing tells."""
    if latents.ndim == 5:
        frames, channels, *sides = latents.shape[1:]
        predicted = getattr(network, "config", {}).get("out_channels")
        return FramesFirst((frames, *sides)) if channels == predicted != frames else None
    if latents.ndim != 3:
        return None
    tokens, width = latents.shape[1:]
    grid = _grid(tokens, values)
    if grid is None or math.prod(grid) != tokens:
        return None
    name = "num_channels_latents"  # before packing
    channels = scope.get(name) or getattr(pipe, name, None) or width
    return Packing(grid, patch=math.isqrt(width // channels))


def _grid(tokens: int, values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The grid that tokens are told to lie on: by positions, shapes or sizes."""
    positions, shapes = values.get("img_ids"), values.get("img_shapes")
    if isinstance(positions, Tensor):  # (frame, row, column, ...) of each token
        last = positions.reshape(-1, positions.shape[-1])[:tokens].amax(dim=0).tolist()
        return int(last[1]) + 1, int(last[2]) + 1
    if shapes is not None:  # (frames, rows, columns) of the first picture of each sample
        first = shapes[0][0] if isinstance(shapes[0], (list, tuple)) else shapes[0]
        if len(first) == 3:
            frames, height, width = (int(n) for n in first)
            return (height, width) if frames == 1 else (frames, height, width)
    if {"num_frames", "height", "width"} <= values.keys():
        return int(values["num_frames"]), int(values["height"]), int(values["width"])
    return None
