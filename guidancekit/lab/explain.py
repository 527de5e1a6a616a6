"""What a method does to the prediction over a run, measured beside plain CFG from the same noise.

`guidancekit explain` draws a page of it, which `guidancekit.lab.explain_page` writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..composition import Sum
from ..errors import GuidanceError
from ..generate import arguments, refusals
from ..guidance import Guidance
from ..measures import Array
from ..methods.cfgpp import Renoising
from ..methods.fdg import images, pyramid, up
from ..recipe import Recipe
from ..registry import parse
from ..step import Prediction, Step
from ..studio import spread
from ..tensors import TINY, dot, norm, parallel

BASELINE = "CFG()"  # at the scale that the pipeline is called with
FRAMES = 8  # steps of which pictures are shown

PARTS = ("size", "parallel", "orthogonal", "low", "high")
FIGURES = (
    "scale",
    "ratio",
    "cosine",
    *(f"{change} {part}" for change in ("difference", "update") for part in PARTS),
)
"""What is measured at every step, per sample; see `Watcher`."""
SHARES = ("mean shift", "positive", "negative")


# --- the figures of one step --------------------------------------------------------------------


def rms(a: Tensor) -> Tensor:
    """Root mean square of each sample, [B]."""
    return norm(a).flatten() / a[0].numel() ** 0.5


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the angle between samples, [B]; NaN where one of them is zero."""
    return (dot(a, b) / (norm(a) * norm(b))).flatten()


def split(d: Tensor, cond: Tensor) -> dict[str, Tensor]:
    """A change `d` of the clean latent and what it splits into, all [B, ...].

    `parallel` and `orthogonal` to the conditional clean latent, as APG splits it; `low` and `high`
    spatial frequencies, as FDG does with two levels, which latents without a grid of at least 3 x 3
    do not have. Each pair adds up to `d`; the squares of the first do too.
    """
    along = parallel(d, onto=cond)
    found = {"size": d, "parallel": along, "orthogonal": d - along}
    try:
        high, low = pyramid(images(d), 2)
    except GuidanceError:
        return found
    bands = {"low": up(low, high.shape[-2:]), "high": high}
    return found | {name: band.reshape(d.shape) for name, band in bands.items()}


def shares(d: Tensor, x: Tensor) -> Tensor:
    """What the differences `d` of a batch of one prompt consist of in the linear picture, [3].

    Of the mean ||d||^2: the share of the mean over the batch (mean shift), and of the deviations
    from it (contrastive components) that enlarge the sample's own deviation of the latent `x` from
    the mean latent (positive) or reduce it (negative). They sum to 1; NaN for a batch of one.
    The diagnostic is ours; the decomposition is that of arXiv:2505.19210, whose covariances it does
    without: one sign for the whole of a deviation.
    """
    if len(d) < 2:
        return d.new_full((3,), float("nan"))
    shift = d.mean(0, keepdim=True)
    rest = d - shift
    energy = dot(rest, rest).flatten()
    enlarges = (dot(rest, x - x.mean(0, keepdim=True)) > 0).flatten()
    terms = [len(d) * dot(shift, shift).sum(), energy[enlarges].sum(), energy[~enlarges].sum()]
    return torch.stack(terms) / dot(d, d).sum().clamp_min(TINY)


def clean_estimate(guidance: Guidance, step: Step, guided: Prediction) -> Tensor:
    """The clean latent that a step heads for: the guided x0, or what a later move makes of it."""
    if isinstance(guidance, Renoising):  # moves the clean estimate after the scheduler's step
        move = guidance.strength_at(step) * (step.cond.x0 - step.uncond.x0)
        return guided.x0 + move
    return guided.x0


# --- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A run under one guidance: `steps` solver steps of a batch of `seeds` samples.

    `figures` has arrays [steps, seeds] by the names of `FIGURES`, NaN where a step has none:
    `scale` is the effective scale (of no step that is `brief`), `ratio` the norm of the clean
    estimate over the conditional one's; ``difference ...`` are root mean squares of
    x0_cond - x0_uncond and its parts (`split`), ``update ...`` those of the clean estimate minus
    x0_cond, and `cosine` is that of the angle between the two. `shares` is [steps, 3]: `SHARES`.
    `noise` and `evaluations`, network evaluations per sample, have one value per step; noise is NaN
    where the scheduler's levels are unknown. `strip` holds decoded predictions [H, W, 3] of the
    first sample by step and name; `notes` are warnings, and what is left out and why.
    """

    recipe: Recipe
    noise: Array
    figures: dict[str, Array]
    shares: Array
    evaluations: Array
    strip: dict[int, dict[str, Array]]
    pictures: list[Image.Image]
    notes: list[str]

    def energy(self, name: str) -> float:
        """Mean square of a figure over steps and samples; NaN if no step has it."""
        squares = np.square(self.figures[name])
        return float(np.nanmean(squares)) if np.isfinite(squares).any() else float("nan")

    def mean(self, name: str) -> float:
        """Mean of a figure over the steps and samples that have it; NaN if none has."""
        values = self.figures[name]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass
class Watcher:
    """Looks at every solver step of a run of `guidance`; figures stay on the device meanwhile."""

    guidance: Guidance
    frames: int
    advance: Callable[[], None]
    noise: list[float] = field(default_factory=list)
    figures: list[dict[str, Tensor]] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)
    strip: dict[int, dict[str, Array]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, step: Step, guided: Prediction) -> None:
        if step.stage != 0:
            return
        self.noise.append(step.nsr if step.grid else float("nan"))
        self.figures.append({})
        self.shares.append(step.x.new_full((3,), float("nan"), dtype=torch.float32))
        try:
            clean = clean_estimate(self.guidance, step, guided)
        except GuidanceError as error:  # an unknown scheduler
            self._leave_out(f"all that needs clean latents. {error}")
        else:
            self._measure(step, clean)
            if step.index in spread(step.total, self.frames):
                self._show(step, clean)
        self.advance()

    def _measure(self, step: Step, clean: Tensor) -> None:
        if "cond" not in step.evaluated:
            return
        cond, found = step.cond.x0, self.figures[-1]
        found["ratio"] = (norm(clean) / norm(cond).clamp_min(TINY)).flatten()
        changes = {"update": clean - cond}
        if "uncond" in step.evaluated:
            changes["difference"] = cond - step.uncond.x0
            found["cosine"] = cosine(*changes.values())
            self.shares[-1] = shares(changes["difference"], step.x.float())
        for change, d in changes.items():
            parts = split(d, cond)
            found |= {f"{change} {name}": rms(part) for name, part in parts.items()}
            if "low" not in parts:
                shape = list(d.shape)
                self._leave_out(f"frequencies. Latents of shape {shape} have too small a grid.")

    def _show(self, step: Step, clean: Tensor) -> None:
        """Decode the predictions for the first sample, one at a time: a decoder takes memory."""
        shown = {name: each.x0 for name, each in step.evaluated.items()} | {"guided": clean}
        w = step.guidance_scale
        if {"cond", "uncond"} <= step.evaluated.keys() and w is not None:
            shown["cfg"] = step.cfg(w).x0
        try:
            decoded = {name: step.decode(x0[:1])[0] for name, x0 in shown.items()}
        except GuidanceError as error:
            self._leave_out(f"pictures of the predictions. {error}")
            return
        self.strip[step.index] = {
            name: picture.permute(1, 2, 0).cpu().numpy() for name, picture in decoded.items()
        }

    def _leave_out(self, what: str) -> None:
        if (text := f"Left out: {what}") not in self.notes:
            self.notes.append(text)


def watch(
    pipe: Any,
    recipe: Recipe,
    seeds: Sequence[int],
    frames: int = FRAMES,
    advance: Callable[[], None] = lambda: None,
) -> Seen:
    """Run `recipe` for all `seeds` in one call of the pipeline, and look at every step.

    Sample i is the picture of `guidancekit generate --seed seeds[i]`, up to rounding. `frames`
    steps are decoded; `advance` is called after each step.
    Raises `GuidanceError` for what the pipeline cannot do.
    """
    if not seeds:
        raise GuidanceError("seeds: found none, expected at least one.")
    recipes = [replace(recipe, seed=seed) for seed in seeds]  # raises for one out of range
    count = len(seeds)
    given = arguments(pipe, recipe, [(each.prompt, each.seed) for each in recipes])
    guidance = parse(recipe.guidance)
    along_difference = (Guidance.effective_scale, Sum.effective_scale)  # 1 if there is none
    says_scale = type(guidance).effective_scale not in along_difference
    watcher = Watcher(guidance, frames, advance)
    with warnings.catch_warnings(), guidance.attach(pipe, watch=watcher):
        warnings.simplefilter("ignore")  # those of the guidance are in its report
        with refusals(pipe):
            pictures = pipe(**given).images
        report = guidance.report()
    missing = torch.full((count,), float("nan"))
    for found, record, skipped in zip(watcher.figures, report.steps, report.brief, strict=True):
        if skipped:
            continue
        scale = torch.as_tensor(record.scale, dtype=torch.float32).expand(count)
        if not says_scale and "difference size" not in found and "update size" in found:
            scale = scale.where(found["update size"].to(scale.device) == 0, float("nan"))
        found["scale"] = scale
    figures = {
        name: torch.stack([found.get(name, missing).cpu() for found in watcher.figures]).numpy()
        for name in FIGURES
    }
    return Seen(
        replace(recipes[0], guidance=repr(guidance)),
        np.array(watcher.noise),
        figures,
        torch.stack(watcher.shares).cpu().numpy(),
        np.array(report.rows_per_step) / count,
        watcher.strip,
        list(pictures),
        [*watcher.notes, *report.warnings],
    )


# --- beside CFG ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """A method's run, CFG's run from the same noise if there is one, and notes as in `Seen`."""

    method: Seen
    baseline: Seen | None
    seeds: list[int]
    notes: list[str]

    @property
    def runs(self) -> dict[str, Seen]:
        """By what they are called on the page."""
        runs = {"method": self.method, "CFG": self.baseline}
        return {name: run for name, run in runs.items() if run is not None}


def explain(
    pipe: Any,
    recipe: Recipe,
    seeds: Sequence[int],
    frames: int = FRAMES,
    advance: Callable[[], None] = lambda: None,
) -> Explanation:
    """Watch the guidance of `recipe`, and CFG at the scale that the pipeline is called with.

    The baseline is left out where the method is just that, or where the pipeline has no
    unconditional branch. Arguments as in `watch`.
    """
    method = watch(pipe, recipe, seeds, frames, advance)
    notes = list(method.notes)
    guidance = parse(recipe.guidance)
    if np.isnan(method.mean("difference size")):
        notes.append(
            f"Left out: the difference cond − uncond and its parts. {guidance!r} does not evaluate "
            "both branches here. What it adds to the conditional prediction is shown."
        )
    if len(seeds) < 2:
        notes.append("Left out: what the difference consists of. That takes two seeds or more.")
    if guidance.edits_latents and not isinstance(guidance, Renoising):
        notes.append(
            f"Left out: what {guidance!r} does to the latent after the scheduler's step. The "
            "figures are of the prediction that the scheduler was given."
        )
    if _acts_before(guidance):
        notes.append(
            f"Not in the update: what {guidance!r} does inside the network, to the condition or to "
            "the latent before a step. Its x0(cond) contains that already: look at the pictures."
        )
    baseline = None
    if method.recipe.guidance != BASELINE:
        try:
            baseline = watch(pipe, replace(recipe, guidance=BASELINE), seeds, frames, advance)
        except GuidanceError as error:
            notes.append(f"Left out: CFG beside it. {error}")
    return Explanation(method, baseline, list(seeds), notes)


def _acts_before(guidance: Guidance) -> bool:
    """Whether the conditional prediction is not what it would be without the method."""
    if isinstance(guidance, Sum):
        return any(map(_acts_before, guidance.terms))
    cls, base = type(guidance), Guidance
    moves = cls.condition is not base.condition or cls.before_step is not base.before_step
    return guidance.inside or moves
