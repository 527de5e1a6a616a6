"""The engine: plugs any strategy into a pipeline, at the denoiser and at the scheduler.

`attachment.py` connects the two and follows the run; `call.py` knows how a pipeline lays out its
branches in one network call; `noise.py` knows the schedulers; `report.py` counts.
"""

from .attachment import Attachment
from .report import Report

__all__ = ["Attachment", "Report"]
