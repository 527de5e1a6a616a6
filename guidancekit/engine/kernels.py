"""Seeing what the processors of Diffusers' attention layers compute.

Classic processors call PyTorch's scaled dot-product attention. Newer ones call a function of
Diffusers that chooses a backend, and are seen above that choice, whatever it is. torch.compile
follows either way with processors of its own kind only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class Attend:
    """The attention as it would have been: ``attend(q, k, v)``.

    `scale` multiplies the logits. `mask`, if any, is what they are masked with, and broadcasts to
    [rows, heads, queries, keys]: to be added, or true where a key is seen.
    """

    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    scale: float
    mask: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kernel(q, k, v, self.mask)

    def of(self, rows: slice) -> Attend:
        """The attention of some rows only."""
        each = self.mask is not None and self.mask.ndim == 4 and self.mask.shape[0] > 1
        return replace(self, mask=self.mask[rows]) if each and self.mask is not None else self


Look = Callable[[Tensor, Tensor, Tensor, Attend], Tensor]
"""``look(q, k, v, attend)`` stands in for attention, [rows, heads, tokens, width] all of them."""

Watch = Callable[[Look], AbstractContextManager[Any]]
"""A context in which a `Look` stands in for attention; nested ones see it innermost first."""


def watch_of(module: nn.Module) -> Watch:
    """The way in which the processor of an attention layer is seen."""
    for cls in type(getattr(module, "processor", None)).__mro__:
        scope = vars(sys.modules[cls.__module__])
        if _DISPATCH in scope:
            if not isinstance(scope[_DISPATCH], _Passing):
                scope[_DISPATCH] = _Passing(scope[_DISPATCH])
            return Dispatched
    return Classic


class Classic(TorchFunctionMode):
    """Hands PyTorch's scaled dot-product attention to `look`."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _show(self.look, func, args, kwargs or {}, turn=lambda heads_first: heads_first)


class Dispatched:
    """Hands Diffusers' `dispatch_attention_fn` to `look`."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.outer: Dispatched | None = None

    def __enter__(self) -> Dispatched:
        self.outer = _running.innermost
        _running.innermost = self
        return self

    def __exit__(self, *exception: object) -> None:
        _running.innermost = self.outer


_DISPATCH = "dispatch_attention_fn"


class _Running(threading.local):
    def __init__(self) -> None:  # in each thread
        self.innermost: Dispatched | None = None


_running = _Running()


class _Passing:
    """`dispatch_attention_fn`, which asks the innermost `Dispatched`, and passes on without one.

    It takes the function's place for good, in each module whose processors were once watched: for
    one that stays, compiled networks need not be compiled again.
    """

    def __init__(self, dispatch: Callable[..., Tensor]) -> None:
        self.dispatch = dispatch

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        innermost = _running.innermost
        if innermost is None:
            return self.dispatch(*args, **kwargs)
        _running.innermost = innermost.outer
        try:
            return _show(innermost.look, self, args, kwargs, turn=lambda x: x.transpose(1, 2))
        finally:
            _running.innermost = innermost


def _show(
    look: Look,
    kernel: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    turn: Callable[[Tensor], Tensor],
) -> Tensor:
    """A call of `kernel` as `look` answers it; `turn` brings the heads before the tokens, and back.

    Both kernels name their first arguments alike.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = (turn(given.pop(name)) for name in names[:3])

    mask = given.pop("attn_mask", None)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return turn(kernel(turn(q), turn(k), turn(v), attn_mask=mask, **given))

    scale = given.get("scale") or q.shape[-1] ** -0.5
    return turn(look(q, k, v, Attend(run, scale, mask)))
