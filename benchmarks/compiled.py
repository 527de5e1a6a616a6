"""torch.compile on the denoiser: how many graphs a method makes, and when.

The network is compiled in place with a backend that counts graphs and runs them as they are, so no
C++ compiler is needed. After the second step of a run nothing may be compiled any more, but
where a method needs another number of rows for the first time: adaptive guidance when it stops,
GFCG when it leaves off being CFG.
On a GPU the architectures are shrunk, because only their layers count here and not their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from guidancekit import Guidance, GuidanceError

from .models import Subject
from .report import refused, table


def graphs(subject: Subject, guidance: Guidance | None, steps: int) -> list[int]:
    """How many graphs have been compiled by the end of each step."""
    counted: list[int] = []
    made = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal made
        made += 1
        return graph.forward

    def end_of_step(pipe: Any, index: int, timestep: Any, given: Any) -> Any:
        counted.append(made)
        return given

    network = subject.network
    torch.compiler.reset()
    network.compile(backend=backend)
    try:
        if guidance is None:
            subject.draw(steps, callback_on_step_end=end_of_step)
        else:
            with guidance.attach(subject.pipe):
                subject.draw(steps, callback_on_step_end=end_of_step)
    finally:
        network._compiled_call_impl = None
        torch.compiler.reset()
    return counted


def section(subject: Subject, methods: Mapping[str, Guidance], steps: int) -> str:
    """A row per method."""
    named: dict[str, Guidance | None] = {"none": None, **methods}
    lines = []
    for name, guidance in named.items():
        try:
            found = graphs(subject, guidance, steps)
        except GuidanceError as error:
            lines.append([name, refused(error), "", ""])
            continue
        lines.append([name, str(found[0]), str(found[1]), str(found[-1] - found[1])])
    head = ("method", "graphs after step 1", "after step 2", "compiled later")
    return f"{subject.name}, {steps} steps:\n\n{table(head, lines)}"
