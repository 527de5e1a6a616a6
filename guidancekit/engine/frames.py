"""The pipeline's call that is under way, read from the call stack.

Pipelines offer no other way to tell, before and during the first step, whose run this is (two of
them may share a network), what it was asked for, and where its latents are.
"""

from __future__ import annotations

import sys
import types
from typing import Any


def scope_of(pipe: Any) -> dict[str, Any] | None:
    """The local variables of the running call of `pipe`; None if it is not running.

    Of a Modular pipeline: the state of the block that is running. Its guider asks for both
    branches, one after the other, unless it says otherwise.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            scope = frame.f_locals
            if scope.get("self") is pipe:
                return dict(scope)
            if scope.get("components") is pipe and "block_state" in scope:
                return _block(pipe, scope)
        frame = frame.f_back
    return None


def _block(pipe: Any, scope: dict[str, Any]) -> dict[str, Any]:
    guider = getattr(pipe, "guider", None)
    state = scope["block_state"]
    return {
        **(state.as_dict() if hasattr(state, "as_dict") else {}),
        "t": scope.get("t"),
        "guidance_scale": getattr(guider, "guidance_scale", None),
        "do_classifier_free_guidance": getattr(guider, "num_conditions", 1) > 1,
    }
