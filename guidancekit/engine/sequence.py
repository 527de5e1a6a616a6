"""Where the image lies in the sequences of a network's attention, and on which grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import GuidanceError
from ..step import Branch


@dataclass(frozen=True)
class Order:
    """How a transformer whose text and image attend together lays them out.

    `image_first`, or behind the text; `packed` if its latents come as tokens.
    """

    image_first: bool = False
    packed: bool = False


ORDERS = {
    "SD3Transformer2DModel": Order(image_first=True),
    "ZImageTransformer2DModel": Order(image_first=True),
    "HunyuanVideoTransformer3DModel": Order(image_first=True),
    "AuraFlowTransformer2DModel": Order(),
    "CogVideoXTransformer3DModel": Order(),
    "CogView3PlusTransformer2DModel": Order(),
    "CogView4Transformer2DModel": Order(),
    "Lumina2Transformer2DModel": Order(),
    "ChromaTransformer2DModel": Order(packed=True),
    "Flux2Transformer2DModel": Order(packed=True),
    "FluxTransformer2DModel": Order(packed=True),
    "QwenImageTransformer2DModel": Order(packed=True),
    "LTXVideoTransformer3DModel": Order(packed=True),  # text and image attend apart
}
"""The networks that guidancekit knows, by the name of their class or of a base class."""


@dataclass
class Place:
    """Where a tapped attention call happens.

    `image` is the part of the `tokens` queries that are the image's, `stream` the same with its
    reference images; the others are text or padding. `grid` is the (height, width) or (frames,
    height, width) that the image's lie on, row by row. `branches` are those of the rows, in order.
    """

    grid: tuple[int, ...]
    image: slice
    stream: slice
    tokens: int
    branches: tuple[Branch, ...]

    @property
    def joint(self) -> bool:
        """Whether there are other tokens than the image's."""
        return self.image.stop - self.image.start < self.tokens

    def rows(self, branch: Branch, count: int) -> slice:
        """The rows of a branch among `count`; none if the branch is not being evaluated."""
        return rows_of(self.branches, branch, count)


def rows_of(branches: tuple[Branch, ...], branch: Branch, count: int) -> slice:
    """The rows of `branch` among `count` rows of `branches`; none if it is not one of them."""
    if branch not in branches:
        return slice(0, 0)
    size = count // len(branches)
    start = branches.index(branch) * size
    return slice(start, start + size)


class Sequence:
    """Finds the image among the tokens of a network's attention.

    `grid` is the latent's (height, width) or (frames, height, width), in tokens if it is packed.
    `stream`, once known, is the length of the image's stream, with that of reference images behind
    it: later layers may have all in one.
    """

    def __init__(self, network: nn.Module, grid: tuple[int, ...]) -> None:
        self.name, self.latent = type(network).__name__, grid
        known = [ORDERS[cls.__name__] for cls in type(network).__mro__ if cls.__name__ in ORDERS]
        config = getattr(network, "config", {})
        several = config.get("siglip_feat_dim") is not None  # Z-Image Omni: images between texts
        self.order = known[0] if known and not several else None
        self.grid = None if hasattr(network, "down_blocks") else self._patches(network)
        self.stream: int | None = None

    def _patches(self, network: Any) -> tuple[int, ...] | None:
        """The grid of a transformer's tokens."""
        config = getattr(network, "config", {})
        side = config.get("patch_size") or _first(config.get("all_patch_size"))
        if side is None or (self.order is not None and self.order.packed):
            return self.latent
        frames = config.get("patch_size_t") or _first(config.get("all_f_patch_size")) or 1
        sides = (frames, side, side) if isinstance(side, int) else tuple(side)
        pairs = zip(self.latent, sides[-len(self.latent) :], strict=True)
        return tuple(math.ceil(cells / side) for cells, side in pairs)

    def place(
        self, tokens: int, texts: int | None, mask: Tensor | None, branches: tuple[Branch, ...]
    ) -> Place:
        """Where the image is among `tokens`, of which `texts` are text as far as is known."""
        if self.grid is None:  # a UNet: another one in each layer
            everything = slice(0, tokens)
            return Place(grid_of(self.latent, tokens), everything, everything, tokens, branches)
        grid = self.grid
        if tokens == math.prod(grid[-2:]):  # frame by frame
            grid = grid[-2:]
        count = math.prod(grid)
        start = 0 if tokens == count else self._start(tokens, count, texts, mask)
        if not 0 <= start <= tokens - count:
            raise GuidanceError(
                f"{self.name} has {tokens} tokens in an attention layer, expected at least the "
                f"{' x '.join(map(str, grid))} of the image."
            )
        image = slice(start, start + count)
        text_behind = self.order is not None and self.order.image_first
        stream = image if text_behind else slice(start, tokens)
        return Place(grid, image, stream, tokens, branches)

    def _start(self, tokens: int, count: int, texts: int | None, mask: Tensor | None) -> int:
        """Where the `count` of the image begin in a sequence with others beside them."""
        if self.order is None:
            raise GuidanceError(
                f"{self.name} has {tokens} tokens in an attention layer, {count} of them the "
                "image's, and guidancekit does not know where they lie in this network."
            )
        if self.order.image_first:
            return 0
        if texts is not None:
            return texts
        if self.stream is None and mask is not None:
            raise GuidanceError(
                f"{self.name} puts the image behind texts of different lengths, so elsewhere in "
                "each row. Give prompts of equal length, or one at a time."
            )
        return tokens - (self.stream or count)


def grid_of(size: tuple[int, ...], tokens: int) -> tuple[int, int]:
    """The grid of `tokens` among the halvings of the latent's (..., height, width)."""
    height, width = size[-2:]
    while height * width > tokens and height * width > 1:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise GuidanceError(f"{tokens} tokens are not a halving of the {size} latent grid.")
    return height, width


def _first(values: Any) -> Any:
    return values[0] if values else None
