"""Reaching into the network: its layers wrapped for the length of a context, attention included.

The modules themselves are wrapped, and their own processors run inside, so that IP-Adapters, LoRA,
fused projections, masks and norms keep working. Nothing is left behind, exception or not.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import GuidanceError
from ..step import Branch


@dataclass
class Place:
    """Where a tapped attention call happens.

    `grid` is the (height, width) of the image tokens, which are the first `image` ones of the
    sequence (joint attention appends text); `branches` are the branches of the rows, in order;
    `call` counts the tapped calls of this evaluation.
    """

    grid: tuple[int, int]
    image: int
    branches: tuple[Branch, ...]
    call: int

    def rows(self, branch: Branch, count: int) -> slice:
        """The rows of a branch among `count`; none if the branch is not being evaluated."""
        return rows_of(self.branches, branch, count)


Tap = Callable[[Tensor, Tensor, Tensor, Callable[..., Tensor], Place], Tensor]
"""``tap(q, k, v, attend, place)`` stands in for scaled dot-product attention.

q, k, v are [rows, heads, tokens, width]; `attend(q, k, v, mask=None)` is the attention as it would
have been, with an additive mask on top if one is given.
"""


def rows_of(branches: tuple[Branch, ...], branch: Branch, count: int) -> slice:
    """The rows of `branch` among `count` rows of `branches`; none if it is not one of them."""
    if branch not in branches:
        return slice(0, 0)
    size = count // len(branches)
    start = branches.index(branch) * size
    return slice(start, start + size)


@contextmanager
def around(
    network: nn.Module,
    matches: Callable[[str, nn.Module], bool],
    wrapper: Callable[..., Any],
    layers: str = "",
    what: str = "",
) -> Iterator[None]:
    """Run `wrapper(forward, *args, **kwargs)` in place of the forward of every matching module.

    `layers` narrows the modules down by name, see `named`. Raises `GuidanceError` if none is left,
    calling them `what`.
    """
    is_named = named(network, layers) if layers else lambda name: True
    found = [
        module
        for name, module in network.named_modules()
        if is_named(name) and matches(name, module)
    ]
    if not found:
        what = what or f"layer {layers!r} of the kind asked for"
        raise GuidanceError(f"{type(network).__name__} has no {what}.")
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for module in found:
            patched.append((module, vars(module).get("forward")))
            module.forward = functools.partial(wrapper, module.forward)
        yield
    finally:
        for module, forward in reversed(patched):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def named(network: nn.Module, layers: str) -> Callable[[str], bool]:
    """A test of module names: `layers` is "mid", or comma-separated names such as "blocks.1".

    A name matches whole components: "blocks.1" is one block, not also blocks.10 to 19. "mid" is the
    mid block of a UNet, or the middle one of a transformer's blocks.
    """
    wanted = [part.strip() for part in layers.split(",") if part.strip()]
    if "mid" in wanted and not hasattr(network, "mid_block"):
        blocks = [name for name, _ in network.named_modules() if re.fullmatch(r"\w+\.\d+", name)]
        wanted[wanted.index("mid")] = blocks[len(blocks) // 2]
    elif "mid" in wanted:
        wanted[wanted.index("mid")] = "mid_block"
    pattern = "|".join(re.escape(part) for part in wanted)
    return lambda name: re.search(rf"(^|\.)({pattern})(\.|$)", name) is not None


@contextmanager
def tapped(
    network: nn.Module,
    size: tuple[int, int],
    branches: Callable[[], tuple[Branch, ...]],
    layers: str,
    tap: Tap,
) -> Iterator[None]:
    """Let `tap` stand in for the attention of the self- and joint-attention layers named.

    `size` is the latent's (height, width), `branches` tells the rows of the running evaluation.
    Raises `GuidanceError` if no such layer exists, or if none of them was seen at work.
    """
    calls = 0

    def wrapper(
        forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal calls
        tokens = hidden_states.shape[1]
        place = Place(grid_of(size, tokens), tokens, branches(), calls)
        with Intercept(lambda q, k, v, attend: tap(q, k, v, attend, place)) as intercept:
            result = forward(hidden_states, *args, **kwargs)
        calls += intercept.calls
        return result

    def matches(name: str, module: nn.Module) -> bool:
        return isinstance(module, Attention) and not module.is_cross_attention

    with around(network, matches, wrapper, layers):
        yield
    if not calls:
        raise GuidanceError(unseen(type(network).__name__))


def unseen(network: str) -> str:
    """What to say when an attention layer ran without its attention being seen."""
    return (
        f"The attention of {network} was not seen at work: attention slicing, "
        "xFormers or a linear attention hide it. Switch to the default attention processors."
    )


class Intercept(TorchFunctionMode):
    """Hands scaled dot-product attention to a tap, and counts the calls."""

    def __init__(self, tap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.tap, self.calls = tap, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        kwargs |= dict(zip(names, args, strict=False))
        given = kwargs.pop("attn_mask", None)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            both = [each for each in (given, mask) if each is not None]
            total = sum(both[1:], both[0]) if both else None
            return func(query=q, key=k, value=v, attn_mask=total, **kwargs)

        return self.tap(kwargs.pop("query"), kwargs.pop("key"), kwargs.pop("value"), attend)


def grid_of(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The grid of `tokens` among the halvings of the latent's size."""
    height, width = size
    while height * width > tokens and height * width > 1:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise GuidanceError(f"{tokens} tokens are not a halving of the {size} latent grid.")
    return height, width
