"""Dynamic guidance by online feedback, after arXiv:2509.16131."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from .. import bundled, schedules
from ..errors import GuidanceError
from ..guidance import ClassifierFree, Preset, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..scoring import LatentScorer, Scorer, choose, relative_rise, score
from ..step import BOTH, Branch, Moment, Prediction, Step, branches_at
from ..tensors import on_device
from ..uncompiled import brought_to

CANDIDATES = (1.0, 3.0, 7.5, 11.0, 15.0)


class FeedbackGuidance(ClassifierFree):
    """Online feedback: at each step the scale whose result scores best, after arXiv:2509.16131.

    The clean predictions x0_u + s (x0_c - x0_u) of all `candidates` s are scored by every function
    of `scorers`, f(x0, noise_fraction, index) -> [n], higher is better; each call holds one
    candidate for every sample of the batch, in the batch's order. A `LatentScorer`, or its folder,
    is held against the prompt. Per sample and function the scores are normalised over the
    candidates, and their weighted sum decides. A candidate scored NaN or infinite is never chosen;
    of equals the nearest to `scale` is; where all are equal, and until the first scored step,
    `scale` itself. CFG is linear, so the choice is free of the space.

    This is our generalisation. The paper scores next states with its own evaluators of noisy
    latents (code not public) and weights them by their relative change, which `adaptive` does by
    our reading (which state it is measured at, and its sign, are unverified). `candidates` are the
    paper's for latent diffusion, known second-hand; fixed equal weights and `high` 0.8 are ours:
    at higher noise clean predictions are too blurred to judge. No presets were published; those
    of the embedded models are ours. Functions cannot be saved: give them anew when loading a file.
    Cost: 2 network evaluations per step; in scored steps each function (and the decoder, with
    `decode`) runs once per candidate.
    Oracle: none for the paper's evaluators; our rule by hand in NumPy.
    """

    name = "feedback"
    paper = "arXiv:2509.16131"
    presets = {
        family: Preset(
            {"scorers": f"{family}:scorer", "candidates": [1.0, 2.0, 4.0, 6.0, 8.0]},
            "ours: the embedded model's latent scorer; not tuned",
        )
        for family in bundled.FAMILIES.values()
    }

    def __init__(
        self,
        scorers: Annotated[
            Mapping[str, Scorer | LatentScorer | str] | str | None,
            "functions of clean latents, by name; or the folder of a LatentScorer",
        ] = None,
        scale: AnyScale = None,
        candidates: Annotated[Sequence[float], Range(0), "scales to choose from"] = CANDIDATES,
        weights: Annotated[Sequence[float] | None, Range(0), "one per function; None: 1"] = None,
        adaptive: Annotated[bool, "weight also by each score's rise since the last one"] = False,
        every: Annotated[int, Range(1, slider=(1, 8)), "score every so many steps"] = 1,
        low: Annotated[float, Range(0, 1), "noise fraction down to which is scored"] = 0.0,
        high: Annotated[float, Range(0, 1), "noise fraction from which on is scored"] = 0.8,
        decode: Annotated[bool, "score images [n, 3, H, W] in [0, 1], not latents"] = False,
    ) -> None:
        scorers = {"fit": scorers} if isinstance(scorers, str) else scorers or {}
        if not isinstance(scorers, Mapping) or not all(
            callable(each) or isinstance(each, str) for each in scorers.values()
        ):
            raise GuidanceError(
                f"FeedbackGuidance(scorers=...): found {scorers!r:.80}, expected functions by "
                "name, or the folder of a LatentScorer."
            )
        if not candidates or (weights is not None and len(weights) != len(scorers)):
            raise GuidanceError(
                f"FeedbackGuidance: found {len(candidates)} candidates and {len(scorers)} scorers "
                f"with weights {weights}, expected one candidate at least and a weight per scorer."
            )
        self.scorers = dict(scorers)
        self.scale = schedules.from_config(scale)
        self.candidates = sorted({float(s) for s in candidates})
        self.weights = [1.0] * len(scorers) if weights is None else list(weights)
        self.adaptive = adaptive
        self.every = every
        self.low = low
        self.high = high
        self.decode = decode

    def scores_at(self, index: int, total: int) -> bool:
        """Whether the candidates are scored in this step: there is no need to if there is one."""
        if len(self.candidates) == 1:
            return False
        noise = 1 - index / max(total - 1, 1)
        return index % self.every == 0 and self.low - 1e-9 <= noise <= self.high + 1e-9

    def default_at(self, moment: Moment) -> float:
        """The scale where nothing was scored, or all candidates scored the same."""
        return self.candidates[0] if len(self.candidates) == 1 else scale_at(self.scale, moment)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        if not self.scorers:
            raise GuidanceError(
                "FeedbackGuidance needs functions that score clean predictions: "
                "FeedbackGuidance(scorers={'name': f}), f(x0, noise_fraction, index) -> [n]. "
                'FeedbackGuidance.preset("scenes") has one for an embedded model.'
            )
        self._judges()  # before the first step
        steps = range(moment.total)
        if len(self.candidates) > 1 and not any(self.scores_at(i, len(steps)) for i in steps):
            raise GuidanceError(
                f"{self!r} scores in none of the {len(steps)} steps: widen low and high, which "
                "are noise fractions (1 at the first step, 0 at the last), or lower every."
            )
        if self.scores_at(moment.index, moment.total) or hasattr(state, "w"):
            return BOTH
        return branches_at(self.default_at(moment))

    def guide(self, step: Step, state: State) -> Prediction:
        if self.scores_at(step.index, step.total) and step.stage == 0:
            state.w = self._best(step, state)
        if not hasattr(state, "w"):
            return step.cfg(self.default_at(step))
        w = state.w.view(-1, *[1] * (step.x.ndim - 1))
        cond, uncond = step.cond.out, step.uncond.out
        return step.predict(out=torch.where(w == 1, cond, uncond + w * (cond - uncond)))

    def _best(self, step: Step, state: State) -> Tensor:
        """The chosen scale of each sample, [B]."""
        noise, columns, functions = 1 - step.progress, [], self._functions(step)
        for s in self.candidates:
            x = step.cfg(s).x0
            x = step.decode(x) if self.decode else x
            columns.append([score(*pair, x, noise, step.index) for pair in functions.items()])
        scores = torch.stack([torch.stack(column) for column in columns], dim=1)
        weights = on_device(self.weights, scores)[:, None].expand(-1, scores.shape[2])
        if self.adaptive:
            means = scores.where(scores.isfinite(), torch.nan).nanmean(1)
            weights = weights * relative_rise(means, getattr(state, "means", None))
            state.means = means
        return choose(scores, weights, self.candidates, self.default_at(step))

    def _judges(self) -> dict[str, Scorer | LatentScorer]:
        """The scorers; those given as folders are read once."""
        if not hasattr(self, "_loaded"):
            self._loaded = {
                name: LatentScorer.load(each) if isinstance(each, str) else each
                for name, each in self.scorers.items()
            }
        return self._loaded

    def _functions(self, step: Step) -> dict[str, Scorer]:
        """The scorers as functions; those of latents and text get the prompt."""
        return {
            name: brought_to(step.x.device, each).about(step.conditions("cond"))
            if isinstance(each, LatentScorer)
            else each
            for name, each in self._judges().items()
        }
