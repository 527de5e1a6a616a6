"""Eight methods in one call, against eight calls.

One picture by each method: `SideBySide` draws them as one batch, whose rows are guided each in its
own way; the other side calls the pipeline once per method. The target on a GPU is 1.5 times as fast
at the size of SD 1.5.
"""

from __future__ import annotations

from guidancekit import (
    APG,
    CFG,
    FDG,
    TCFG,
    CFGPlusPlus,
    DynamicThresholding,
    Guidance,
    RescaledCFG,
    SideBySide,
)

from .models import Subject
from .report import table
from .timing import Effort, interleaved


def methods() -> list[Guidance]:
    """Eight, of two evaluations per step each."""
    return [
        CFG(4.0),
        APG(8.0),
        FDG(2.0, 6.0),
        TCFG(4.0),
        RescaledCFG(6.0),
        CFG(6.0, rescale=0.5),
        DynamicThresholding(6.0, data_range=3.0),
        CFGPlusPlus(0.6),
    ]


def section(subjects: list[Subject], steps: int, effort: Effort) -> str:
    """A row per subject."""
    lines = []
    for subject in subjects:
        each = methods()
        if "FlowMatch" in type(subject.pipe.scheduler).__name__:
            each[-1] = CFG(3.0)
        together = SideBySide(each)

        def once(subject: Subject = subject, together: Guidance = together) -> None:
            with together.attach(subject.pipe):
                subject.draw(steps, batch=8)

        def apart(subject: Subject = subject, each: list[Guidance] = each) -> None:
            for guidance in each:
                with guidance.attach(subject.pipe):
                    subject.draw(steps, batch=1)

        times = interleaved({"once": once, "apart": apart}, effort, subject.device)
        seconds = [f"{times[name].median:.3f}" for name in ("once", "apart")]
        lines.append([subject.name, *seconds, str(times["apart"].over(times["once"]))])
    head = ("model", "one call, s", "eight calls, s", "times as fast")
    return table(head, lines)
