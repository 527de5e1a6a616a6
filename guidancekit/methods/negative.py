"""What NAG and NASA share: the image's attention to the text, for a negative prompt as well."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..engine.layers import Attend, Layer, Place, sees_text, streams_of
from ..errors import GuidanceError
from ..guidance import Guidance, State
from ..step import COND, Branch, Moment, Prediction, Step
from ..uncompiled import first_at

NegativePrompt = Annotated[
    str | None, "what to steer away from; None: the pipeline's negative prompt, or an empty one"
]
IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


class NegativeAttention(Guidance):
    """Attention to a negative prompt in the layers where the image sees the text, combined.

    For the conditional rows these layers run once more, with the negative prompt's text: the
    cross-attention, or the whole block where text and image attend together. What enters as the
    image is the same, so the network is not evaluated again. Subclasses say in `combine` what is
    made of both outputs, and in `joint` whether that is known for joint attention.
    """

    negative_prompt: str | None
    joint = True

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Attention outputs [rows, heads, tokens, width] under both texts, float32, to one."""
        raise NotImplementedError

    def guide(self, step: Step, state: State) -> Prediction:
        return step.cond

    @contextmanager
    def during(self, step: Step, state: State) -> Iterator[None]:
        if not self.acts(step, state):
            yield
            return
        block, negative = first_block(step, self._evaluation(step))
        if not hasattr(state, "checked"):  # once: reading it waits for the device
            state.checked = True
            text, *_ = pytree.tree_leaves(negative[TEXT])  # an adapter's images stand behind it
            if not text.any():
                step.warn(
                    f"{self!r}: the negative text is all zeros, as SDXL's empty one is, and says "
                    "nothing to steer away from. Give a negative prompt."
                )
        joint = len(streams_of(block)) == 2
        if joint and not self.joint:
            raise GuidanceError(
                f"{type(self).__name__} is published for cross-attention; what it is where text "
                f"and image attend together, as in {type(block).__name__}, is not known. Use NAG."
            )
        twice = (JointTwice if joint else CrossTwice)(step, negative, self.combine)
        with (
            step.attention("", twice.tap, text=not joint),
            step.around(twice.matches, twice.run),
        ):
            yield

    def _evaluation(self, step: Step) -> Callable[[], Prediction]:
        """An evaluation of the network under the negative prompt."""
        if self.negative_prompt is None:
            try:
                step.conditions("uncond")
                return functools.partial(step.evaluate, "uncond")
            except GuidanceError:
                pass
        batch = step.x.shape[0]
        conditions = {
            name: value.expand(batch, *value.shape[1:])
            for name, value in step.encode(self.negative_prompt or "").items()
        }
        return functools.partial(step.evaluate, "cond", conditions=conditions)


def first_block(
    step: Step, evaluation: Callable[[], Prediction]
) -> tuple[nn.Module, dict[str, Any]]:
    """The first block that is given a text, and all that it is given: the network stops there.

    So the text arrives as the network's own layers see it, with its masks and positions.
    """

    def read(layer: Layer, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]] | None:
        given = layer.arguments(args, kwargs)
        return None if given.get(TEXT) is None else (layer.module, given)

    what = "block that is given a text"
    found: tuple[nn.Module, dict[str, Any]] | None
    found = first_at(step, is_given_text, evaluation, read, what)
    if found is None:
        raise GuidanceError(
            "A negative prompt cannot act: no block of the network was given a text."
        )
    return found


def is_given_text(name: str, module: nn.Module) -> bool:
    cls = type(module)
    return "Block" in cls.__name__ and TEXT in inspect.signature(cls.forward).parameters


class Twice:
    """Layers that run under the negative text, and then as they are, their attention combined.

    `negative` is what the first block is given under the negative text.
    """

    joint: bool

    def __init__(
        self, step: Step, negative: dict[str, Any], combine: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.step, self.negative, self.combine = step, negative, combine
        self.phase = ""
        self.kept: Tensor | None = None

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether a module is such a layer."""
        raise NotImplementedError

    def run_negative(self, layer: Layer, given: dict[str, Any]) -> None:
        """Run a layer under the negative text; `given` are the conditional rows' arguments."""
        raise NotImplementedError

    def run(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        given = layer.arguments(args, kwargs)
        count = given[IMAGE].shape[0]
        rows = self.step.rows("cond", count)
        if rows.stop == rows.start or (not self.joint and given.get(TEXT) is None):
            return layer(**given)
        try:
            self.phase = "negative"
            self.run_negative(layer, of_rows(given, rows, count))
            self.phase = "positive"
            return layer(**given)
        finally:
            self.phase, self.kept = "", None

    def tap(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, place: Place) -> Tensor:
        out = attend(q, k, v)
        if place.joint != self.joint:  # the image alone
            return out
        if self.phase == "negative":
            self.kept = out[:, :, place.stream].float()
        elif self.phase == "positive":
            assert self.kept is not None
            rows = place.rows("cond", out.shape[0])
            guided = self.combine(out[rows, :, place.stream].float(), self.kept)
            out = out.clone()
            out[rows, :, place.stream] = guided.to(out.dtype)
        return out


class CrossTwice(Twice):
    """Cross-attention to the text."""

    joint = False

    def matches(self, name: str, module: nn.Module) -> bool:
        return sees_text(name, module)

    def run_negative(self, layer: Layer, given: dict[str, Any]) -> None:
        mask = self.negative.get("encoder_attention_mask")
        layer(**{**given, TEXT: self.negative[TEXT], "attention_mask": mask})


class JointTwice(Twice):
    """Blocks where text and image attend together, in two streams or in one, the text in front.

    The negative text runs through the blocks beside the image; all but texts, masks and positions
    (pooled text too) is the positive prompt's.
    """

    joint = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.blocks: dict[nn.Module, int] = {}
        self.at = -1
        self.text: Tensor | None = None
        self.positive_length = 0

    def matches(self, name: str, module: nn.Module) -> bool:
        if not streams_of(module):
            return False
        self.blocks[module] = len(self.blocks)
        return True

    def run_negative(self, layer: Layer, given: dict[str, Any]) -> None:
        at, streams = self.blocks[layer.module], streams_of(layer.module)
        if self.text is None or at <= self.at:  # an evaluation begins
            self.text = self.negative[TEXT]
        self.at = at
        own = {name: self.negative[name] for name in given if _beside_text(name, self.negative)}
        if TEXT in streams:
            self.positive_length = given[TEXT].shape[1]
            self._check_positions(given)
            out = layer(**{**given, **own, TEXT: self.text})
            self.text = out[streams.index(TEXT)]
        else:
            image = given[IMAGE][:, self.positive_length :]
            out = layer(**{**given, **own, IMAGE: torch.cat([self.text, image], dim=1)})
            self.text = out[:, : self.text.shape[1]]

    def _check_positions(self, given: dict[str, Any]) -> None:
        """Some networks are given the positions of text and image, for one length of text."""
        assert self.text is not None
        own, length = self.text.shape[1], given[TEXT].shape[1]
        both = length + given[IMAGE].shape[1]
        positions = pytree.tree_leaves(given.get("image_rotary_emb"))
        fixed = any(isinstance(each, Tensor) and each.shape[0] == both for each in positions)
        if fixed and own != length:
            raise GuidanceError(
                f"The negative prompt has {own} tokens and the prompt {length}, for which the "
                "pipeline gives the positions: encode both to the same length."
            )


def _beside_text(name: str, given: dict[str, Any]) -> bool:
    """Whether an argument goes with the length of the text: masks and rotary positions."""
    return name in given and ("mask" in name or "rotary" in name)


def of_rows(given: dict[str, Any], rows: slice, count: int) -> dict[str, Any]:
    """Arguments with `count` rows, however nested, cut to `rows`."""
    if rows == slice(0, count):
        return given

    def cut(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == count
        return value[rows] if is_batch else value

    result: dict[str, Any] = pytree.tree_map(cut, given)
    return result
