"""Fitting what `LinearAG` needs to know of a model, from runs of that model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import GuidanceError
from .files import written_whole
from .generate import arguments, refusals
from .guidance import State
from .methods.cfg import CFG
from .methods.linear_ag import LinearAG, Table
from .recipe import Recipe
from .step import BOTH, Branch, Moment, Prediction, Step

RIDGE = 1e-6


def fit_linear_ag(
    pipe: Any,
    prompts: Iterable[str | Mapping[str, Any]],
    steps: int,
    scale: float,
    *,
    guided: int | None = None,
    ridge: float = RIDGE,
    seed: int = 0,
    **call: Any,
) -> LinearAG:
    """A `LinearAG` for one model, fitted on runs of plain CFG; the paper takes 200 prompts.

    `prompts` are texts, or arguments of the pipeline by name. Of the first `guided` steps (default:
    half) every second one is estimated; the others are conditional. `ridge` is relative to the mean
    square of the regressors. Keep the result with `save_config`. It depends on the number of steps,
    the scheduler, the scale and the negative prompt: use them as they were here.
    """
    sums = Products(steps, scale, guided)
    for i, prompt in enumerate(prompts):
        sums.add(
            pipe,
            **(prompt if isinstance(prompt, Mapping) else {"prompt": prompt}),
            num_inference_steps=steps,
            guidance_scale=max(scale, 1.5),  # the pipeline's own: both branches must exist
            generator=torch.Generator().manual_seed(seed + i),
            **call,
        )
    return LinearAG(scale, sums.table(ridge))


@dataclass(frozen=True)
class Fitted:
    """A file of LinearAG tables: how many of the runs asked for are in it, and how good it is.

    `errors` are, by number of steps, the root mean square errors of the estimated unconditional
    predictions, relative to these predictions, one for each estimated step.
    """

    path: Path
    runs: int
    of: int
    errors: dict[int, list[float]]


def fit_linear_ag_file(
    pipe: Any,
    base: Recipe,
    prompts: Sequence[str],
    out: Path,
    *,
    scale: float,
    steps: Sequence[int] = (30,),
    seeds: Sequence[int] = (0,),
    minutes: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit tables to all `prompts` at all `seeds`, one for each number of `steps`, into a JSON file.

    `base` says which model, scheduler, negative prompt and size `pipe` was loaded for; prompt i of
    seed s starts from the noise of s + i. The file is complete after every run, so that an
    interrupted fit can be used, and goes on when it is started again. Calls `advance` for each run.
    Raises `GuidanceError` if the file belongs to another fit.
    """
    asked = {
        "model": base.model,
        "scheduler": base.scheduler,
        "negative": base.negative,
        "size": list(base.size) if base.size else None,
        "scale": scale,
        "steps": list(steps),
        "seeds": list(seeds),
        "prompts": list(prompts),
    }
    runs = [
        replace(base, prompt=prompt, steps=number, seed=seed + i, guidance_scale=max(scale, 1.5))
        for seed in seeds
        for i, prompt in enumerate(prompts)
        for number in steps
    ]
    done, sums = 0, {number: Products(number, scale) for number in steps}
    if out.exists():
        done, found = _read(out, asked)
        for number, products in found.items():
            sums[number].gram = products
    for _ in range(done):
        advance()
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for run in runs[done:]:
        if end is not None and time.monotonic() > end:
            break
        with refusals(pipe):
            sums[run.steps].add(pipe, **arguments(pipe, run))
        done += 1
        _write(out, asked, done, sums)
        advance()
    return Fitted(out, done, len(runs), {n: each.errors() for n, each in sums.items() if each.runs})


class Products:
    """What the least-squares rows are solved from: sums over runs of products of predictions.

    `gram` is the Gram matrix of [1, cond_0.., uncond_0..] over the first `guided` steps, float64.
    """

    def __init__(self, steps: int, scale: float, guided: int | None = None) -> None:
        self.steps, self.scale = steps, scale
        self.guided = steps // 2 if guided is None else guided
        if not 1 < self.guided <= steps:
            raise GuidanceError(
                f"LinearAG: found {self.guided} guided steps of {steps}, expected at least 2, and "
                "no more than there are: half of the steps, unless you say otherwise."
            )
        self.gram: Tensor | None = None

    @property
    def runs(self) -> bool:
        """Whether there is anything to solve from."""
        return self.gram is not None

    def add(self, pipe: Any, **call: Any) -> None:
        """One run of plain CFG, up to the last guided step."""
        recorder = _Recorder(self.scale, self.guided)

        def stop(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if recorder.gram is not None:
                pipe._interrupt = True  # diffusers' own way to leave out the other steps
            return values

        with recorder.attach(pipe):
            pipe(**call, output_type="latent", callback_on_step_end=stop)
        assert recorder.gram is not None
        self.gram = recorder.gram if self.gram is None else self.gram + recorder.gram

    def table(self, ridge: float = RIDGE) -> Table:
        if self.gram is None:
            raise GuidanceError(
                "fit_linear_ag: found no prompts, expected some: the paper takes 200."
            )
        return table(self.gram, self.guided, self.steps, ridge)

    def errors(self, ridge: float = RIDGE) -> list[float]:
        """The relative root mean square error of each estimate, on the runs it was fitted to."""
        assert self.gram is not None
        found = []
        for k, row in enumerate(self.table(ridge)):
            if row:
                target, columns = 1 + self.guided + k, _columns(k, self.guided)
                b = torch.tensor(row, dtype=torch.float64)
                square = self.gram[target, target] - 2 * b @ self.gram[columns, target]
                square = square + b @ self.gram[columns][:, columns] @ b
                found.append(float((square / self.gram[target, target]).clamp_min(0).sqrt()))
        return found


def table(gram: Tensor, guided: int, steps: int, ridge: float) -> Table:
    """Least-squares rows from the Gram matrix of [1, cond_0.., uncond_0..] over `guided` steps."""
    rows: Table = []
    for k in range(guided):
        if k % 2 == 0:
            rows.append([])
            continue
        columns = _columns(k, guided)
        among = gram[columns][:, columns]
        damping = ridge * among.diagonal().mean() * torch.eye(len(columns), dtype=gram.dtype)
        solution = torch.linalg.solve(among + damping, gram[columns, 1 + guided + k])
        rows.append([float(f"{value:.7g}") for value in solution.tolist()])
    return [*rows, *[None] * (steps - guided)]


def _columns(k: int, guided: int) -> list[int]:
    """Where [1, cond_0..cond_k, uncond_0..uncond_(k-1)] are in the Gram matrix."""
    return [0, *range(1, k + 2), *range(1 + guided, 1 + guided + k)]


def _write(out: Path, asked: Mapping[str, Any], done: int, sums: Mapping[int, Products]) -> None:
    """The tables, and what the fit goes on from."""
    solved = {number: each for number, each in sums.items() if each.gram is not None}
    products = {n: each.gram.tolist() for n, each in solved.items() if each.gram is not None}
    content = {
        "table": {number: each.table() for number, each in solved.items()},
        "relative_error": {number: each.errors() for number, each in solved.items()},
        "fit": {"asked": asked, "runs": done, "products": products},
    }
    with written_whole(out) as file:
        file.write(json.dumps(content).encode())


def _read(out: Path, asked: Mapping[str, Any]) -> tuple[int, dict[int, Tensor]]:
    """The number of runs in a file, and their products by number of steps."""
    try:
        fit = json.loads(out.read_text(encoding="utf-8"))["fit"]
        before, runs = dict(fit["asked"]), int(fit["runs"])
        products = {
            int(number): torch.tensor(rows, dtype=torch.float64)
            for number, rows in fit["products"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuidanceError(
            f"{out} exists, and is not what `guidancekit fit linear-ag` wrote: give another --out."
        ) from error
    check_same_fit(out, before, asked)
    return runs, products


def check_same_fit(out: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `GuidanceError` unless an interrupted fit was asked for the same things."""
    other = [name for name in asked if before.get(name) != asked[name]]
    if other:
        raise GuidanceError(
            f"{out} belongs to a fit with other {', '.join(other)}: delete it, or give another "
            "--out."
        )


class _Recorder(CFG):
    """CFG that sums up the products of all predictions of its first steps, in float64."""

    def __init__(self, scale: float, guided: int) -> None:
        self.scale: Any = scale
        self.rescale = 0.0
        self.guided = guided
        self.gram: Tensor | None = None

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return BOTH

    def guide(self, step: Step, state: State) -> Prediction:
        if step.stage == 0 and step.index < self.guided:
            if step.index == 0:
                state.cond, state.uncond = [], []
            state.cond.append(step.cond.out.flatten().double().cpu())
            state.uncond.append(step.uncond.out.flatten().double().cpu())
            if step.index == self.guided - 1:
                columns = torch.stack([torch.ones_like(state.cond[0]), *state.cond, *state.uncond])
                self.gram = columns @ columns.T
        return step.cfg(self.scale)
