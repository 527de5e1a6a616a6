"""Fitting what a method needs to know of a model, from runs of that model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import GuidanceError
from .guidance import State
from .methods.cfg import CFG
from .methods.linear_ag import LinearAG
from .step import BOTH, Branch, Moment, Prediction, Step


def fit_linear_ag(
    pipe: Any,
    prompts: Iterable[str | Mapping[str, Any]],
    steps: int,
    scale: float,
    *,
    guided: int | None = None,
    ridge: float = 1e-6,
    seed: int = 0,
    **call: Any,
) -> LinearAG:
    """A `LinearAG` for one model, fitted on runs of plain CFG; the paper takes 200 prompts.

    `prompts` are texts, or arguments of the pipeline by name. Of the first `guided` steps (default:
    half) every second one is estimated; the others are conditional. `ridge` is relative to the mean
    square of the regressors. Keep the result with `save_config`. It depends on the number of steps,
    the scheduler, the scale and the negative prompt: use them as they were here.
    """
    recorder = _Recorder(scale, steps // 2 if guided is None else guided)
    with recorder.attach(pipe):
        for i, prompt in enumerate(prompts):
            pipe(
                **(prompt if isinstance(prompt, Mapping) else {"prompt": prompt}),
                num_inference_steps=steps,
                guidance_scale=max(scale, 1.5),  # the pipeline's own: both branches must exist
                generator=torch.Generator().manual_seed(seed + i),
                output_type="latent",
                **call,
            )
    if recorder.gram is None:
        raise GuidanceError("fit_linear_ag: found no prompts, expected some: the paper takes 200.")
    return LinearAG(scale, table(recorder.gram, recorder.guided, steps, ridge))


def table(gram: Tensor, guided: int, steps: int, ridge: float) -> list[list[float] | None]:
    """Least-squares rows from the Gram matrix of [1, cond_0.., uncond_0..] over `guided` steps."""
    rows: list[list[float] | None] = []
    for k in range(guided):
        if k % 2 == 0:
            rows.append([])
            continue
        columns = [0, *range(1, k + 2), *range(1 + guided, 1 + guided + k)]
        among = gram[columns][:, columns]
        damping = ridge * among.diagonal().mean() * torch.eye(len(columns), dtype=gram.dtype)
        solution = torch.linalg.solve(among + damping, gram[columns, 1 + guided + k])
        rows.append([float(f"{value:.7g}") for value in solution.tolist()])
    return [*rows, *[None] * (steps - guided)]


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
                products = columns @ columns.T
                self.gram = products if self.gram is None else self.gram + products
        return step.cfg(self.scale)
