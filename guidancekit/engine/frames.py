"""The pipeline's call that is under way, read from the call stack.

Pipelines offer no other way to tell, before and during the first step, whose run this is (two of
them may share a network), what it was asked for, and where its latents are.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any


def scope_of(pipe: Any) -> dict[str, Any] | None:
    """The local variables of the running call of `pipe`; None if it is not running.

    Of a Modular pipeline: the state of the block that is running. Its guider asks for both
    branches, one after the other, unless it says otherwise.
    """
    for scope in _calls():
        if scope.get("self") is pipe:
            return dict(scope)
        if scope.get("components") is pipe and "block_state" in scope:
            return _block(pipe, scope)
    return None


def pipeline_of(guider: Any) -> Any:
    """The Modular pipeline that is running with this guider; None if there is none."""
    running = (scope.get("components") for scope in _calls())
    return next((pipe for pipe in running if getattr(pipe, "guider", None) is guider), None)


def _calls() -> Iterator[dict[str, Any]]:
    """The local variables of each ``__call__`` on the stack, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            yield frame.f_locals
        frame = frame.f_back


def _block(pipe: Any, scope: dict[str, Any]) -> dict[str, Any]:
    guider = getattr(pipe, "guider", None)
    state = scope["block_state"]
    return {
        **(state.as_dict() if hasattr(state, "as_dict") else {}),
        "t": scope.get("t"),
        "guidance_scale": getattr(guider, "guidance_scale", None),
        "do_classifier_free_guidance": getattr(guider, "num_conditions", 1) > 1,
    }
