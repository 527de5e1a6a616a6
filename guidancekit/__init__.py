"""guidancekit: every guidance strategy on the Diffusers pipelines you already use.

>>> image = pipe(prompt, callback_on_step_end=APG(scale=12).attach(pipe)).images[0]
"""

from __future__ import annotations

import functools
from typing import Any

from . import bundled
from .errors import GuidanceError

__version__ = "0.1.0"


@functools.cache
def _exports() -> dict[str, Any]:
    """The public names. Loaded on first use: importing torch and diffusers takes seconds."""
    from .composition import COMPOSITIONS
    from .guidance import Guidance, Preset
    from .heads import InternalHead
    from .registry import methods, parse, schedules
    from .schedules import Schedule
    from .step import Moment, Prediction, Step

    strategies = (*methods().values(), *schedules().values(), *COMPOSITIONS)
    library = (Guidance, Preset, Moment, Prediction, Step, Schedule, InternalHead, parse)
    return {each.__name__: each for each in (*library, *strategies)}


__all__ = ["GuidanceError", "bundled"]  # and, on first use, what _exports holds


def __getattr__(name: str) -> Any:
    public = name[:1].isupper() or name == "parse"  # the rest are submodules, found as such
    if not public or name not in _exports():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _exports()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports()])
