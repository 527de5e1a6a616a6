"""GFCG, gradient-free classifier guidance, arXiv:2411.15393: our reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import bundled, schedules
from ..errors import GuidanceError
from ..guidance import ClassifierFree, Preset, State
from ..parameters import Range
from ..schedules import AnyScale, scale_at
from ..scoring import LatentScorer
from ..step import BOTH, COND, Branch, Moment, Prediction, Step
from ..tensors import on_device
from ..uncompiled import brought_to, uncompiled

Classifier = Callable[[Tensor], Tensor]
"""Logits [n, K] of clean latents or images [n, ...]."""

_REFERENCES = [
    f"a {shape}" for shape in "circle square triangle star ring cross heart moon".split()
]


class GFCG(ClassifierFree):
    """GFCG (reconstructed): away from the class it is confused with, after arXiv:2411.15393.

    A classifier reads the conditional clean prediction: q_c is the probability of the wanted class
    `target`, r the likeliest other class and q_r its probability. With the confusion
    k = q_r / (q_r + q_c) and w_t = 1 + (w - 1) k the guided prediction is x0_r + w_t (x0_c - x0_r),
    where x0_r is the same network's under class r: a class label, or the prompt `references`[r].

    What the paper says (abstract and summary): a classifier in inference mode only, a reference
    class per step in the place of the unconditional prediction, and a scale from the confusion. THE
    FORMULAS ABOVE ARE OURS, NOT THE PAPER'S, which are not confirmed: do not read its figures into
    this. Ours too: CFG at w above the noise fraction `high`, where every class looks alike; `lag`,
    the class and confusion of the step before, with both passes in one batch (CFG in the first such
    step); `confident`, a confusion below which a sample is conditional. Labels of classifier and
    model must agree. A `LatentScorer`, or its folder, scores the prompt, which is then the wanted
    class, against the `references`. Functions cannot be saved. No presets were published; those
    of the embedded models are ours. In a sum, `lag` gives the reference to the other terms too, as
    their unconditional prediction.
    Cost: 2 network evaluations per step and 1 of the classifier (and of the decoder, with
    `decode`), one after the other without `lag`; 1 of the network where all are confident.
    Oracle: none for the paper; our formulas by hand, and CFG with the rival as negative prompt.
    """

    name = "gfcg"
    paper = "arXiv:2411.15393"
    evaluates = ("cond",)
    presets = {
        family: Preset(
            {"classifier": f"{family}:scorer", "references": _REFERENCES},
            "ours: the embedded model's latent scorer; not tuned",
        )
        for family in bundled.FAMILIES.values()
    }

    def __init__(
        self,
        classifier: Annotated[
            Classifier | LatentScorer | str | None,
            "logits [n, K] of clean predictions; or the folder of a LatentScorer",
        ] = None,
        target: Annotated[Sequence[int] | int, "wanted class, one or one per sample"] = 0,
        scale: AnyScale = None,
        references: Annotated[Sequence[str] | None, "a prompt per class; None: labels"] = None,
        high: Annotated[float, Range(0, 1), "noise fraction above which it is CFG"] = 0.8,
        lag: Annotated[bool, "take class and confusion from the step before"] = False,
        confident: Annotated[float, Range(0, 1), "confusion below which nothing is guided"] = 0.0,
        decode: Annotated[bool, "classify images [n, 3, H, W] in [0, 1], not latents"] = False,
    ) -> None:
        if not (classifier is None or isinstance(classifier, str) or callable(classifier)):
            raise GuidanceError(
                f"GFCG(classifier=...): found {classifier!r:.80}, expected a function that returns "
                "logits."
            )
        self.classifier = classifier
        self.target = [target] if isinstance(target, int) else list(target)
        if not self.target or not all(isinstance(k, int) for k in self.target):
            raise GuidanceError(
                f"GFCG(target=...): found {target!r:.80}, expected the number of a class, or one "
                "per sample."
            )
        self.scale = schedules.from_config(scale)
        self.references = references
        self.high = high
        self.lag = lag
        self.confident = confident
        self.decode = decode

    def _confuses(self, moment: Moment) -> bool:
        """Whether the classifier decides in this step."""
        return 1 - moment.progress <= self.high + 1e-9

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        if self.classifier is None:
            raise GuidanceError(
                "GFCG needs a classifier of clean predictions: GFCG(classifier=f, target=...), "
                'f(x0 [n, ...]) -> logits [n, K]. GFCG.preset("scenes") has one for the embedded '
                "model."
            )
        judge = self._judge()  # before the first step
        if isinstance(judge, LatentScorer) and not self.references:
            raise GuidanceError(
                f"{self!r} holds the prompt against others: give them, references=[...]."
            )
        if scale_at(self.scale, moment) == 1:
            return COND
        return COND if self._confuses(moment) and not self.lag else BOTH

    def acts(self, moment: Moment, state: State) -> bool:
        return scale_at(self.scale, moment) != 1

    def before_step(self, step: Step, state: State) -> Tensor:
        if self.references and self.acts(step, state):
            self._texts(step, step.conditions("cond"), state)  # before anything is evaluated
        return step.x

    def condition(
        self, step: Step, branch: Branch, given: dict[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        """With a lag the reference class takes the place of the unconditional condition."""
        if branch == "cond" or not (self.lag and self._confuses(step) and hasattr(state, "seen")):
            return given
        return {**given, **self._conditions(step, state.seen[0], state)}

    def guide(self, step: Step, state: State) -> Prediction:
        w = scale_at(self.scale, step)
        before: tuple[Tensor, Tensor] | None = getattr(state, "seen", None)
        state.excess = torch.tensor(w - 1)
        if w == 1:
            return step.cond
        if step.stage == 0 and (self.lag or self._confuses(step)):
            state.seen = uncompiled(lambda: self._classify(step, state))
        basis = before if self.lag else getattr(state, "seen", None)
        if not self._confuses(step) or basis is None:
            return step.cfg(w)
        rival, confusion = basis
        guided = confusion >= self.confident
        state.excess = (w - 1) * confusion * guided
        if not self.lag and self.confident and not bool(guided.any()):
            return step.cond
        if self.lag:
            reference = step.uncond.out
        else:
            conditions = self._conditions(step, rival, state)
            reference = step.evaluate("cond", conditions=conditions).out
        excess = state.excess.view(-1, *[1] * (step.x.ndim - 1))
        return step.predict(out=step.cond.out + excess * (step.cond.out - reference))

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> Tensor:
        """w_t, counted from the reference prediction."""
        return 1 + state.excess

    def _judge(self) -> Classifier | LatentScorer:
        """The classifier, or the scorer, read once where it was given as a folder."""
        if not hasattr(self, "_loaded"):
            given: Any = self.classifier
            self._loaded = LatentScorer.load(given) if isinstance(given, str) else given
        return self._loaded

    @torch.no_grad()
    def _hold(
        self, scorer: LatentScorer, x: Tensor, step: Step, state: State
    ) -> tuple[Tensor, Tensor]:
        """The same, of a scorer: the references are the other classes, the prompt itself is not."""
        given = step.conditions("cond")
        wanted = scorer.about(given)(x, 0.0, 0)
        scores = []
        for text in self._texts(step, given, state)["encoder_hidden_states"]:
            same = (given["encoder_hidden_states"] == text).flatten(1).all(1)
            scores.append(scorer(x, text[None]).masked_fill(same, -torch.inf))
        highest, rival = torch.stack(scores, dim=1).max(1)
        return rival, torch.sigmoid(highest - wanted)

    def _classify(self, step: Step, state: State) -> tuple[Tensor, Tensor]:
        """The likeliest other class and the confusion of each sample, [B]."""
        x = step.decode(step.cond.x0) if self.decode else step.cond.x0
        judge = self._judge()
        if isinstance(judge, LatentScorer):
            return self._hold(brought_to(x.device, judge), x, step, state)
        with torch.no_grad():
            logits = judge(x)
        count = x.shape[0]
        if len(self.target) not in (1, count):
            raise GuidanceError(
                f"GFCG(target=...): found {len(self.target)} classes, but the batch has {count} "
                "samples: give one class, or one per sample."
            )
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise GuidanceError(f"The classifier returned {found}, expected logits [{count}, K].")
        classes = logits.shape[1]
        if classes < 2 or not all(0 <= k < classes for k in self.target):
            raise GuidanceError(
                f"The classifier knows {classes} classes, expected two or more, among them the "
                f"target {self.target}."
            )
        if self.references is not None and len(self.references) != classes:
            raise GuidanceError(
                f"GFCG(references=...): found {len(self.references)} prompts, expected one for "
                f"each of the classifier's {classes} classes."
            )
        logits = logits.to(x.device, torch.float32)
        target = on_device(self.target, logits).long().expand(count)[:, None]
        wanted = logits.gather(1, target)[:, 0]
        highest, rival = logits.scatter(1, target, -torch.inf).max(1)
        return rival, torch.sigmoid(highest - wanted)  # q_r / (q_r + q_c) of a softmax

    def _conditions(self, step: Step, rival: Tensor, state: State) -> dict[str, Tensor]:
        """What the reference prediction is conditioned on, [B, ...] by argument name."""
        given = step.conditions("cond")
        if self.references is None:
            if "class_labels" not in given:
                raise GuidanceError(
                    f"{self!r}: this network is conditioned on {', '.join(given) or 'nothing'}, "
                    "not on class labels: give one prompt per class, references=[...]."
                )
            return {"class_labels": rival}
        texts = self._texts(step, given, state)
        return {name: table[rival] for name, table in texts.items()}

    def _texts(self, step: Step, given: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """What the references condition the network on, [K, ...] by argument name."""
        if not hasattr(state, "encoded"):
            each = [step.encode(prompt) for prompt in self.references or ()]
            names = [name for name in each[0] if name in given]
            state.encoded = {name: torch.cat([one[name] for one in each]) for name in names}
        encoded: dict[str, Tensor] = state.encoded
        return encoded
