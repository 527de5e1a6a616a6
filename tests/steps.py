"""Steps made by hand, so that a method's mathematics can be tested without a pipeline."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import torch

from guidancekit import Prediction, Step
from guidancekit.guidance import State
from guidancekit.step import Kind, Level

KINDS: tuple[Kind, ...] = ("epsilon", "v_prediction", "flow", "sample")


def level_of(kind: Kind, nsr: float) -> Level:
    """The noise level nsr in the coordinates of a model kind."""
    if kind == "flow":
        return Level(1 / (1 + nsr), nsr / (1 + nsr))
    scale = math.sqrt(1 + nsr**2)
    return Level(1 / scale, nsr / scale)


def from_x0(x0: torch.Tensor, x: torch.Tensor, level: Level, kind: Kind) -> Prediction:
    """A prediction that says `x0` at `x`, whatever the model kind."""
    return Prediction.from_x0(x0, x, level, kind)


def make_step(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    x: torch.Tensor,
    kind: Kind = "epsilon",
    nsr: float = 1.0,
    index: int = 1,
    total: int = 4,
    guidance_scale: float | None = 5.0,
    stage: int = 0,
) -> Step:
    """A step whose clean predictions are `cond` and `uncond` at latent `x`, all [B, ...]."""
    level = level_of(kind, nsr)
    clean = {"cond": cond, "uncond": uncond}

    perturbed = []

    def evaluate(
        branch, x=x, timestep=None, level=level, conditions=None, network=None, within=None
    ):
        """The same clean prediction wherever it is asked for; `uncond` if anything is altered."""
        with within or nullcontext():
            altered = conditions is not None or network is not None or perturbed
            return from_x0(clean["uncond" if altered else branch], x, level, kind)

    @contextmanager
    def around(*_, **__):
        """Perturbs the evaluations inside."""
        perturbed.append(True)
        yield
        perturbed.pop()

    embeddings = {"encoder_hidden_states": torch.linspace(-1, 1, 12).view(1, 3, 4)}
    grid = (*(nsr * 2.0 ** (index - i) for i in range(total)), 0.0)
    return Step(
        index=index,
        total=total,
        grid=grid,
        guidance_scale=guidance_scale,
        time=500.0,
        stage=stage,
        timestep=torch.tensor(500),
        next_timestep=torch.tensor(250),
        flow_timestep=lambda sigma: torch.tensor(1000 * sigma),
        x=x,
        level=level,
        next_level=level_of(kind, grid[index + 1]),
        kind=kind,
        evaluate=evaluate,
        gather=lambda wanted: {branch: evaluate(branch).out for branch in wanted},
        conditions=lambda branch: {k: v.repeat(len(x), 1, 1) for k, v in embeddings.items()},
        encode=lambda prompt: embeddings,
        decode=lambda x0: (x0[:, :3] / 2 + 0.5).clamp(0, 1),
        attention=around,
        around=around,
        rows=None,  # type: ignore[arg-type]
        warn=lambda message: None,
        needed=("uncond", "cond"),
        evaluated={"cond": evaluate("cond"), "uncond": evaluate("uncond")},
    )


def random_triple(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random cond, uncond and x; the two predictions are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    cond, other, x = (torch.randn(*shape, generator=generator) for _ in range(3))
    return cond, cond + 0.5 * other, x


def guide(guidance, step: Step, state: State | None = None) -> Prediction:
    """One evaluation of a strategy, with a state of its own unless one is given."""
    return guidance.guide(step, State() if state is None else state)
