"""guidancekit: every guidance strategy on the Diffusers pipelines you already use.

>>> image = pipe(prompt, callback_on_step_end=APG(scale=12).attach(pipe)).images[0]
"""

from __future__ import annotations

from . import bundled
from .errors import GuidanceError
from .guidance import Guidance, Preset, Sum
from .registry import methods as _methods
from .registry import parse
from .schedules import SCHEDULES, Schedule
from .step import Moment, Prediction, Step

__version__ = "0.1.0"

_strategies = {cls.__name__: cls for cls in (*_methods().values(), *SCHEDULES.values())}
globals().update(_strategies)

__all__ = [
    "Guidance",
    "GuidanceError",
    "Moment",
    "Prediction",
    "Preset",
    "Schedule",
    "Step",
    "Sum",
    "bundled",
    "parse",
    *_strategies,
]
