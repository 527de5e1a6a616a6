"""The engine: plugs any strategy into a pipeline, at the denoiser and at the scheduler.

`attachment.py` connects the two and takes them apart again; `run.py` follows one run of the
pipeline, which `frames.py` finds on the call stack; `shapes.py` tells how a pipeline asks for its
branches, `call.py` splits its network calls into them, and `arguments.py` knows the rows in their
arguments; `noise.py` knows the schedulers; `layers.py` reaches into the network's layers, with
`kernels.py`, which sees what attention computes, and `sequence.py`, which knows where the image
lies in it; `report.py` counts.
"""

from .attachment import Attachment
from .report import Report
from .run import Watch

__all__ = ["Attachment", "Report", "Watch"]
