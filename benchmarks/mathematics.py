"""The mathematics alone, without a network: our methods against Diffusers' guiders.

Timed on both sides is what stands between the network's outputs and the guided prediction, from
the same float32 tensors in memory:

- ours: `Guidance.evaluate` and `Guidance.guide`, as a run calls them, on a `Step` whose network
  passes return stored tensors. That includes the `Prediction`s, and the way to x0 and back of
  methods that work there;
- theirs: `guider.forward`. Their guiders never leave the space of the network's output, so they
  have that way for free, also where the paper works on x0 (APG).

CFG-Zero* and MAMBO-G are defined on the velocity: they are always given latents of a flow model,
whose network puts that out.

The target is to be faster in every case. Sums of strategies miss it on the smallest latents, by
some 4 µs: the six operations on tensors are as many as theirs, and so small there that asking each
term in Python for its part is what counts. On larger latents the sums are faster too.

The number of bytes is computed, not measured: what all operations on the tensors read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import diffusers.guiders as theirs
import torch
from diffusers.hooks import LayerSkipConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from guidancekit import APG, CFG, FDG, PAG, SEG, SLG, TCFG, AutoGuidance, CFGZeroStar, Guidance
from guidancekit.guidance import State
from guidancekit.methods.mambo import MAMBOG
from guidancekit.step import Branch, Kind, Prediction, Step
from tests.steps import make_step, random_triple

from .report import table
from .timing import Effort, interleaved

SHAPES: dict[tuple[int, ...], Kind] = {
    (4, 64, 64): "epsilon",
    (4, 128, 128): "epsilon",
    (16, 128, 128): "flow",
    (16, 21, 60, 104): "flow",
}
"""Latents of SD 1.5, SDXL, SD3 and Wan, and what their networks predict."""

_SKIP = LayerSkipConfig(indices=[0])
_PERTURBED = {"perturbed_guidance_layers": [0], "perturbed_guidance_start": 0.0}


@dataclass(frozen=True)
class Case:
    """A method and Diffusers' guider of the same mathematics.

    `third`: with a perturbed pass. `kind`: the only one for which the mathematics are the same.
    """

    ours: Guidance
    guider: Callable[[], Any]
    third: bool = False
    kind: Kind | None = None


CASES = {
    "CFG": Case(CFG(7.5), lambda: theirs.ClassifierFreeGuidance(7.5)),
    "CFG, rescaled": Case(
        CFG(7.5, rescale=0.7), lambda: theirs.ClassifierFreeGuidance(7.5, guidance_rescale=0.7)
    ),
    "APG": Case(
        APG(7.5, norm_threshold=15.0),
        lambda: theirs.AdaptiveProjectedGuidance(
            7.5,
            adaptive_projected_guidance_momentum=-0.5,
            adaptive_projected_guidance_rescale=15.0,
            eta=0.0,
        ),
    ),
    "FDG": Case(FDG(5.0, 10.0), lambda: theirs.FrequencyDecoupledGuidance([10.0, 5.0])),
    "FDG, projected": Case(
        FDG(5.0, 10.0, parallel_weights=[0.5, 0.5]),
        lambda: theirs.FrequencyDecoupledGuidance([10.0, 5.0], parallel_weights=[0.5, 0.5]),
    ),
    "CFG-Zero*": Case(
        CFGZeroStar(7.5, zero_init=0),
        lambda: theirs.ClassifierFreeZeroStarGuidance(7.5, zero_init_steps=0),
        kind="flow",
    ),
    "TCFG": Case(TCFG(7.5), lambda: theirs.TangentialClassifierFreeGuidance(7.5)),
    "MAMBO-G": Case(MAMBOG(7.5), lambda: theirs.MagnitudeAwareGuidance(7.5), kind="flow"),
    "AutoGuidance": Case(
        AutoGuidance(2.0, network="a folder"),
        lambda: theirs.AutoGuidance(2.0, auto_guidance_config=[_SKIP], dropout=1.0),
    ),
    "CFG + PAG": Case(
        CFG(7.5) + PAG(3.0),
        lambda: theirs.PerturbedAttentionGuidance(7.5, 3.0, **_PERTURBED),
        third=True,
    ),
    "CFG + SEG": Case(
        CFG(7.5) + SEG(3.0),
        lambda: theirs.SmoothedEnergyGuidance(
            7.5, 3.0, seg_guidance_layers=[0], seg_guidance_start=0.0
        ),
        third=True,
    ),
    "CFG + SLG": Case(
        CFG(7.5) + SLG(2.5, start=0.0, end=1.0),
        lambda: theirs.SkipLayerGuidance(
            7.5, 2.5, skip_layer_guidance_layers=[0], skip_layer_guidance_start=0.0
        ),
        third=True,
    ),
}


def section(device: torch.device, effort: Effort) -> str:
    """The tables, one per shape of latents."""
    assert device.type == "cpu"
    parts = []
    for shape, kind in SHAPES.items():
        rows = [_row(name, case, shape, kind, effort) for name, case in CASES.items()]
        head = ("method", "ours, µs", "Diffusers', µs", "ours / theirs", "ours, MB", "theirs, MB")
        parts.append(f"**{' x '.join(map(str, shape))}**, {kind}:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _row(name: str, case: Case, shape: tuple[int, ...], kind: Kind, effort: Effort) -> list[str]:
    clean = random_triple(1, *shape)
    step = make_step(*clean, case.kind or kind)
    outputs = {branch: step.evaluated[branch].out for branch in ("cond", "uncond")}
    ours = of_ours(case.ours, step, outputs)
    cells = [name]
    try:
        their = of_theirs(case, outputs)
        their()
    except Exception as error:  # which kinds of latents a guider takes is part of the answer
        times = interleaved({"ours": ours}, effort, torch.device("cpu"))
        reason = f"{type(error).__name__}: not for {len(shape)} dimensions"
        return [*cells, f"{1e6 * times['ours'].median:.0f}", reason, "", megabytes(ours), ""]
    times = interleaved({"ours": ours, "theirs": their}, effort, torch.device("cpu"))
    cells += [f"{1e6 * times[side].median:.0f}" for side in ("ours", "theirs")]
    return [*cells, str(times["ours"].over(times["theirs"])), megabytes(ours), megabytes(their)]


def of_ours(guidance: Guidance, step: Step, outputs: dict[Branch, Tensor]) -> Callable[[], Tensor]:
    """A step of a run, whose network passes return `outputs` (a further one: the unconditional)."""
    weaker = outputs["uncond"]
    step = replace(
        step,
        gather=lambda wanted: {branch: outputs[branch] for branch in wanted},
        evaluate=lambda branch, **_: Prediction(weaker, step.x, step.level, step.kind),
        attention=lambda *_, **__: nullcontext(),
        around=lambda *_, **__: nullcontext(),
    )
    state = State()
    step.needed = guidance.needs(step, state)

    def call() -> Tensor:
        step.evaluated = {}
        guidance.evaluate(step, state)
        return guidance.guide(step, state).out

    return call


def of_theirs(case: Case, outputs: dict[Branch, Tensor]) -> Callable[[], Tensor]:
    """Diffusers' guider in the middle of a run."""
    guider = case.guider()
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(500))
    if hasattr(guider, "momentum_buffer"):  # which it makes at its step 0
        momentum = guider.adaptive_projected_guidance_momentum
        guider.momentum_buffer = theirs.adaptive_projected_guidance.MomentumBuffer(momentum)
    third = {"pred_cond_skip": outputs["uncond"]} if case.third else {}
    if case.third and "pred_cond_seg" in guider.forward.__code__.co_varnames:
        third = {"pred_cond_seg": outputs["uncond"]}
    return lambda: guider.forward(outputs["cond"], outputs["uncond"], **third).pred


class Bytes(TorchDispatchMode):
    """Counts what the operations inside read and write; views cost nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            every = tree_leaves((args, kwargs, result))
            self.total += sum(each.nbytes for each in every if isinstance(each, Tensor))
        return result


def megabytes(call: Callable[[], object]) -> str:
    """What a call moves in memory, computed."""
    with Bytes() as moved:
        call()
    return f"{moved.total / 1e6:.2f}"
