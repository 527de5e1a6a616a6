"""Reaching into the network: its layers wrapped for the length of a context, attention included.

The modules themselves are wrapped, and their own processors run inside, so that IP-Adapters, LoRA,
fused projections, masks, norms and rotary embeddings keep working. Wrappers come off at the end,
exception or not.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GuidanceError
from ..step import Branch
from .kernels import Attend, Watch, watch_of
from .sequence import Place, Sequence, grid_of, rows_of

__all__ = [
    "Attend",
    "Layer",
    "Place",
    "Tap",
    "around",
    "grid_of",
    "rows_of",
    "sees_text",
    "streams_of",
    "tapped",
    "unseen",
]


class Layer:
    """The forward of a layer as it is; called like it. `module` is the layer itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        wrappers = vars(module).get(_WRAPPERS)
        self.forward: Callable[..., Any] = wrappers[-1] if wrappers else module.forward
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@contextmanager
def around(
    network: nn.Module,
    matches: Callable[[str, nn.Module], bool],
    wrapper: Callable[..., Any],
    layers: str = "",
    what: str = "",
    only: Only = lambda: None,
) -> Iterator[None]:
    """Run `wrapper(layer, *args, **kwargs)` in place of the forward of every matching module.

    `layer` is a `Layer`, called like the forward. `layers` narrows the modules down by name: "mid",
    or comma-separated names such as "blocks.1", of whole components, so that this is one block and
    not also blocks.10 to 19; "mid" is the mid block of a UNet, or the middle one of a transformer's
    blocks. Raises `GuidanceError` if none matches (`what` says what is missing), or if one of the
    names matches none. Where `only` names rows, the others are left alone.
    """
    found = _find(network, matches, layers, what)

    def run(layer: Layer, *args: Any, **kwargs: Any) -> Any:
        rows = only()
        if rows is None:
            return wrapper(layer, *args, **kwargs)
        parts = (slice(0, rows.start), rows)
        given = [_part((args, kwargs), part, rows.stop) for part in parts]
        (args, kwargs), (own_args, own_kwargs) = given
        return _whole(layer(*args, **kwargs), wrapper(layer, *own_args, **own_kwargs), rows)

    with _patched(found, lambda module: functools.partial(run, Layer(module))):
        yield


Only = Callable[[], slice | None]
"""The rows, the last ones of the running evaluation, that a perturbation is about; None: all."""


def _part(value: Any, rows: slice, count: int) -> Any:
    """Some of `count` rows of everything in a layer's arguments that has as many."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: _part(item, rows, count) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_part(item, rows, count) for item in value)
    return value


def _whole(others: Any, own: Any, rows: slice) -> Any:
    """What a layer returns for all rows, from what it returns for the others and for its own."""
    if others is None:  # SD3's last block has no further use for the text
        return None
    if isinstance(own, (list, tuple)):
        return type(own)(_whole(a, b, rows) for a, b in zip(others, own, strict=True))
    if isinstance(own, Tensor) and len(others) + len(own) == rows.stop:
        return torch.cat([others, own.to(others.dtype)])
    raise GuidanceError(
        "joined=True: this network does not keep its rows apart in the layers that the guidance "
        "perturbs. Attach without it."
    )


def _find(
    network: nn.Module, matches: Callable[[str, nn.Module], bool], layers: str, what: str = ""
) -> list[nn.Module]:
    """The matching modules of those names, see `around`."""
    network = _uncompiled(network)
    found = {name: each for name, each in network.named_modules() if name and matches(name, each)}
    if not found:
        raise GuidanceError(f"{type(network).__name__} has no {what or 'layer of that kind'}.")
    if not layers:
        return list(found.values())
    chosen: dict[str, nn.Module] = {}
    for part in filter(None, map(str.strip, layers.split(","))):
        whole = _middle(network) if part == "mid" else part
        pattern = re.compile(rf"(^|\.){re.escape(whole)}(\.|$)")
        named = {name: each for name, each in found.items() if pattern.search(name)}
        if not named:
            raise GuidanceError(
                f"{type(network).__name__} has no layer {part!r} of the kind asked for."
            )
        chosen |= named
    return list(chosen.values())


@contextmanager
def _patched(
    modules: Iterable[nn.Module], wrap: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """`wrap(module)` stands in for the forward of each module inside."""
    with ExitStack() as stack:
        for module in modules:
            wrapper = wrap(module)
            _put_on(module, wrapper)
            stack.callback(_take_off, module, wrapper)
        yield


def _put_on(module: Any, wrapper: Callable[..., Any]) -> None:
    if _WRAPPERS not in vars(module):
        setattr(module, _WRAPPERS, [vars(module).get("forward")])
        # A method, and the same for all: compiled networks need not be compiled for each wrapper.
        module.forward = types.MethodType(_outermost, module)
    vars(module)[_WRAPPERS].append(wrapper)


def _take_off(module: Any, wrapper: Callable[..., Any]) -> None:
    wrappers = vars(module)[_WRAPPERS]
    wrappers.remove(wrapper)
    if len(wrappers) > 1:
        return
    delattr(module, _WRAPPERS)
    del module.forward
    if wrappers[0] is not None:
        module.forward = wrappers[0]


def _outermost(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module._guidancekit_wrappers[-1](*args, **kwargs)


_WRAPPERS = "_guidancekit_wrappers"
"""Where a layer keeps its wrappers, the outermost last, behind the forward that it had itself."""


def _uncompiled(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's own module."""
    inner: nn.Module = getattr(network, "_orig_mod", network)
    return inner


def _middle(network: nn.Module) -> str:
    """The name of the mid block of a UNet, or of the middle one of a transformer's blocks."""
    if hasattr(network, "mid_block"):
        return "mid_block"
    attention = [name for name, each in network.named_modules() if _sees_image(name, each)]
    blocks = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in attention))
    return blocks[len(blocks) // 2] if blocks else "mid"


_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"
_STREAMS = {
    (_IMAGE,): (
        "BasicTransformerBlock",
        "WanTransformerBlock",
        "LTXVideoTransformerBlock",
        "SanaTransformerBlock",
        "HunyuanDiTBlock",
        "AuraFlowSingleTransformerBlock",
        "ChromaSingleTransformerBlock",
        "Flux2SingleTransformerBlock",
        "Lumina2TransformerBlock",
    ),
    ("x",): ("ZImageTransformerBlock",),
    (_TEXT, _IMAGE): (
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "Flux2TransformerBlock",
        "ChromaTransformerBlock",
        "QwenImageTransformerBlock",
        "AuraFlowJointTransformerBlock",
    ),
    (_IMAGE, _TEXT): (
        "CogVideoXBlock",
        "CogView3PlusTransformerBlock",
        "CogView4TransformerBlock",
        "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
        "HunyuanVideoTokenReplaceTransformerBlock",
        "HunyuanVideoTokenReplaceSingleTransformerBlock",
    ),
}


def streams_of(module: nn.Module) -> tuple[str, ...]:
    """What a transformer block returns, by the names of its arguments that it replaces.

    "hidden_states" (or "x") is the image, or image and text in one; "encoder_hidden_states" is the
    text. Nothing for modules that are no block that guidancekit knows.
    """
    name = type(module).__name__
    return next((streams for streams, blocks in _STREAMS.items() if name in blocks), ())


Tap = Callable[[Tensor, Tensor, Tensor, Attend, Place], Tensor]
"""``tap(q, k, v, attend, place)`` stands in for scaled dot-product attention.

q, k, v and its result are [rows, heads, tokens, width]; k and v may have fewer heads.
"""


@contextmanager
def tapped(
    network: nn.Module,
    grid: tuple[int, ...],
    branches: Callable[[], tuple[Branch, ...]],
    layers: str,
    tap: Tap,
    text: bool = False,
    only: Only = lambda: None,
) -> Iterator[None]:
    """Let `tap` stand in for the attention of the layers named, of all of them if `layers` is "".

    That is the self-attention of the image, alone or together with the text; with `text`, its
    cross-attention to the text, without that to the images of adapters. `grid` is the latent's
    (height, width) or (frames, height, width), in tokens where the pipeline packs it; `branches`
    tells the rows of the running evaluation; where `only` names some of them, the others attend as
    ever. Raises `GuidanceError` if no such layer exists, or if none of them was seen at work.
    """
    network = _uncompiled(network)
    sequence = Sequence(network, grid)
    seen = False

    def wrapper(layer: Layer, watch: Watch, *args: Any, **kwargs: Any) -> Any:
        own, texts = _lengths(layer, args, kwargs)
        queries = own if text else own + (texts or 0)
        keys = texts if text else queries

        def look(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
            nonlocal seen
            if (q.shape[2], k.shape[2]) != (queries, keys):
                return attend(q, k, v)  # to the image of an adapter
            seen = True
            known = None if text else texts
            rows = only()
            if rows is None:
                return tap(q, k, v, attend, sequence.place(queries, known, attend.mask, branches()))
            first = rows.start * (q.shape[0] // rows.stop)  # one for each frame
            others, rows = slice(0, first), slice(first, q.shape[0])
            apart = attend.of(rows)
            place = sequence.place(queries, known, apart.mask, branches()[-1:])
            kept = attend.of(others)(q[others], k[others], v[others])
            return torch.cat([kept, tap(q[rows], k[rows], v[rows], apart, place)])

        with watch(look):
            return layer(*args, **kwargs)

    def counting(layer: Layer, *args: Any, **kwargs: Any) -> Any:
        sequence.stream = _lengths(layer, args, kwargs)[0]
        return layer(*args, **kwargs)

    found = _find(network, sees_text if text else _sees_image, layers)
    attention = [module for name, module in network.named_modules() if _attends(name, module)]
    apart = [module for module in attention if getattr(module, "added_kv_proj_dim", None)][:1]
    with (
        _patched(apart, lambda module: functools.partial(counting, Layer(module))),
        _patched(found, lambda module: functools.partial(wrapper, Layer(module), watch_of(module))),
    ):
        yield
    if not seen:
        raise GuidanceError(unseen(type(network).__name__))


def unseen(network: str) -> str:
    """What to say when an attention layer ran without its attention being seen."""
    return (
        f"The attention of {network} was not seen at work: attention slicing, "
        "xFormers or a linear attention hide it. Switch to the default attention processors."
    )


# Attention over time alone, of the text alone, and of an adapter's image.
_ELSEWHERE = re.compile(
    r"(^|\.)(motion_modules|transformer_in|temp(oral)?_\w+|\w*text\w*|token_refiner|siglip_\w+"
    r"|encoder_hid_proj)\."
)


def _sees_image(name: str, module: nn.Module) -> bool:
    return _attends(name, module) and not getattr(module, "is_cross_attention", False)


def sees_text(name: str, module: nn.Module) -> bool:
    """Whether a module may be the image's cross-attention to the text."""
    return _attends(name, module) and getattr(module, "is_cross_attention", True)


def _attends(name: str, module: nn.Module) -> bool:
    return hasattr(module, "set_processor") and not _ELSEWHERE.search(name)


_AFTER_IMAGE = ("WanAttention", "SkyReelsV2Attention")
_TEXTS_AFTER_IMAGE = 512  # behind those of an image, as these layers' processors count on


def _lengths(
    layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, int | None]:
    """The tokens of an attention layer's own sequence, and of the text given beside it, if any."""
    given = layer.arguments(args, kwargs)
    own, other = given[_IMAGE], given.get(_TEXT)
    count = own.shape[1] if own.ndim == 3 else own.shape[2] * own.shape[3]
    if other is None or other is own:
        return count, None
    if isinstance(other, tuple):  # with the images of adapters
        other = other[0]
    if type(layer.module).__name__ in _AFTER_IMAGE:
        return count, min(other.shape[1], _TEXTS_AFTER_IMAGE)
    return count, other.shape[1]
