"""What a guided step costs beyond the network.

The loop over the steps is timed, and within it every call of a network, in the same run: the ratio
is what the pipeline's loop, its scheduler and the guidance add to the evaluations themselves. The
line "none" is the pipeline alone, whose guidance Diffusers does. The first step is left out,
because there a run is checked; a further network, such as AutoGuidance's, counts as one. On a GPU
times are those of its own clock. The target there is 1.01 at most.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from guidancekit import Guidance, GuidanceError

from .models import Subject
from .report import refused, table
from .timing import Effort, Ratio


class Clock:
    """When a network started and ended, and when a step did."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[tuple[Any, Any]] = []
        self.steps: list[tuple[Any, int]] = []  # with the number of calls so far

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) / 1e3

    def end_of_step(self, pipe: Any, index: int, timestep: Any, given: Any) -> Any:
        self.steps.append((self.now(), len(self.calls)))
        return given

    @contextmanager
    def watching(self, network: torch.nn.Module) -> Iterator[None]:
        """Every network of this class."""
        kind: Any = type(network)
        forward = kind.forward

        @functools.wraps(forward)
        def timed(module: Any, *args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = forward(module, *args, **kwargs)
            self.calls.append((start, self.now()))
            return result

        kind.forward = timed
        try:
            yield
        finally:
            kind.forward = forward

    @property
    def overhead(self) -> float:
        """Loop over network, from the end of the first step to that of the last."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        (start, first), (end, _) = self.steps[0], self.steps[-1]
        inside = sum(self.seconds(*call) for call in self.calls[first:])
        return self.seconds(start, end) / inside


def measure(
    subject: Subject, methods: Mapping[str, Guidance | None], steps: int, effort: Effort
) -> dict[str, tuple[str, str]]:
    """Loop over network, and network rows per step, of each method; all take turns."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    rows = dict.fromkeys(methods, "")
    why: dict[str, str] = {}

    def once(name: str) -> None:
        clock, guidance = Clock(subject.device), methods[name]
        with clock.watching(subject.network), attached(guidance, subject):
            subject.draw(steps, callback_on_step_end=clock.end_of_step)
            found[name].append(clock.overhead)
            counts = guidance.report().rows_per_step[1:] if guidance else []
        rows[name] = f"{statistics.mean(counts):.1f}" if counts else ""

    for name in methods:
        try:
            once(name)
        except GuidanceError as error:
            why[name] = refused(error)
        found[name].clear()  # that was to warm up
    for _ in effort:
        for name in methods.keys() - why.keys():
            once(name)
    return {name: (why.get(name) or str(Ratio.of(found[name])), rows[name]) for name in methods}


def attached(guidance: Guidance | None, subject: Subject) -> AbstractContextManager[Any]:
    return guidance.attach(subject.pipe) if guidance else nullcontext()


def section(
    subjects: list[Subject], methods: Mapping[str, Guidance], steps: int, effort: Effort
) -> str:
    """A row per method; a column per subject, and the rows of the first."""
    named: dict[str, Guidance | None] = {"none": None, **methods}
    results = [measure(subject, named, steps, effort) for subject in subjects]
    lines = [
        [name, results[0][name][1], *(result[name][0] for result in results)] for name in named
    ]
    head = ["method", "rows per step", *(f"{each.name}: step / network" for each in subjects)]
    return table(head, lines)
