"""What the custom pipelines in ``pipelines/`` share: a `guidance` argument of the call."""

from __future__ import annotations

from typing import Any

from .guidance import Guidance
from .registry import parse


class GuidedPipelineMixin:
    """Adds ``guidance=`` to a Diffusers pipeline's call.

    `guidance` is a `Guidance`, text that `parse` reads (``"apg(scale=12)"``), or None for the
    pipeline as it is. It acts in this call only. Raises `GuidanceError` before the first step if
    the strategy cannot work with the other arguments.
    """

    def __call__(self, *args: Any, guidance: Guidance | str | None = None, **kwargs: Any) -> Any:
        call: Any = super().__call__  # type: ignore[misc]
        if guidance is None:
            return call(*args, **kwargs)
        if isinstance(guidance, str):
            guidance = parse(guidance)
        with guidance.attach(self):
            return call(*args, **kwargs)
