"""The engine: plugs any strategy into a pipeline, at the denoiser and at the scheduler.

`attachment.py` connects the two and takes them apart again; `run.py` follows one run of the
pipeline; `call.py` knows how a pipeline lays out its branches in one network call; `noise.py` knows
the schedulers; `layers.py` reaches into the network's layers, with `kernels.py`, which sees what
attention computes, and `sequence.py`, which knows where the image lies in it; `report.py` counts.
"""

from .attachment import Attachment
from .report import Report

__all__ = ["Attachment", "Report"]
