"""Several strategies in one run: their sum, or one for each row of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from .errors import GuidanceError
from .guidance import Companion, Guidance, State, live
from .step import BOTH, Branch, Moment, Prediction, Step


class Several(Guidance):
    """What compositions have in common: strategies, each with a state of its own."""

    terms: tuple[Guidance, ...]

    @property
    def edits_latents(self) -> bool:  # type: ignore[override]
        return any(term.edits_latents for term in self.terms)

    @property
    def evaluates(self) -> tuple[Branch, ...]:  # type: ignore[override]
        return tuple({branch for term in self.terms for branch in term.evaluates})

    @property
    def inside(self) -> bool:
        return any(term.inside for term in self.terms)

    @property
    def scheduled(self) -> bool:
        return any(term.scheduled for term in self.terms)

    def acts(self, moment: Moment, state: State) -> bool:
        pairs = zip(self.terms, self._states(state), strict=True)
        return any(term.acts(moment, own) for term, own in pairs)

    def _states(self, state: State) -> list[State]:
        if not hasattr(state, "terms"):
            state.terms = [State() for _ in self.terms]
        states: list[State] = state.terms
        return states


class Sum(Several):
    """Several strategies at once: their updates on the conditional prediction add up."""

    name = "sum"

    def __init__(self, terms: Annotated[Sequence[Any], "the strategies to add"]) -> None:
        flat: list[Guidance] = []
        for term in map(live, terms):
            if isinstance(term, SideBySide):
                raise GuidanceError(
                    "SideBySide cannot be a term of a sum: add inside of it, as in "
                    "SideBySide([CFG() + SAG(), APG() + SAG()])."
                )
            flat.extend(term.terms if isinstance(term, Sum) else [term])
        self.terms = tuple(flat)
        silent = [isinstance(term, Companion) and term.scale is None for term in flat]
        if all(silent):
            silent[:1] = [False]
        self._silent = silent
        # Passes that may join come first, so that the branches still wait for them.
        self._order = sorted(range(len(flat)), key=lambda i: not flat[i].joins)

    @property
    def joins(self) -> bool:  # type: ignore[override]
        return not self.inside and any(term.joins for term in self.terms)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        each = zip(self.terms, self._states(state), self._silent, strict=True)
        needed = {
            branch for term, own, silent in each if not silent for branch in term.needs(moment, own)
        }
        return tuple(branch for branch in BOTH if branch == "cond" or branch in needed)

    def condition(
        self, step: Step, branch: Branch, given: dict[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        for term, own in zip(self.terms, self._states(state), strict=True):
            given = term.condition(step, branch, given, own)
        return given

    def before_step(self, step: Step, state: State) -> Tensor:
        for term, own in zip(self.terms, self._states(state), strict=True):
            step.x = term.before_step(step, own)
        return step.x

    @contextmanager
    def during(self, step: Step, state: State) -> Iterator[None]:
        with ExitStack() as stack:
            for term, own in zip(self.terms, self._states(state), strict=True):
                stack.enter_context(term.during(step, own))
            yield

    def guide(self, step: Step, state: State) -> Prediction:
        states = self._states(state)
        for i in self._order:
            term, own = self.terms[i], states[i]
            own.guided = step.cond if self._silent[i] else term.guide(step, own)
        cond = step.cond
        changed = [own.guided for own in states if own.guided is not cond]
        if len(changed) < 2:  # one term acts, or none: to the last bit
            return changed[0] if changed else cond
        total = changed[0].out
        for each in changed[1:]:
            total = (each.out - cond.out).add_(total)
        return step.predict(out=total)

    def after_step(self, step: Step, latents: Tensor, state: State) -> Tensor:
        for term, own in zip(self.terms, self._states(state), strict=True):
            latents = term.after_step(step, latents, own)
        return latents

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> Tensor | float:
        pairs = zip(self.terms, self._states(state), strict=True)
        return 1 + sum(term.effective_scale(step, own.guided, own) - 1 for term, own in pairs)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


@dataclass
class Share:
    """The part of one strategy in a step of `SideBySide`."""

    index: int
    rows: range
    term: Guidance
    step: Step
    state: State
    guided: Prediction | None = None

    @property
    def own(self) -> slice:
        """Its rows of a tensor [B, ...]: a view, for which no device is waited."""
        return part(self.rows)


def part(rows: range) -> slice:
    """Rows as an index of tensors."""
    return slice(rows.start, rows.stop, rows.step)


class SideBySide(Several):
    """One strategy for each row of the batch: a comparison of K methods in one pipeline call.

    >>> with SideBySide([CFG(), APG(), FDG()]).attach(pipe) as guidance:
    ...     images = pipe(prompt, num_images_per_prompt=3, latents=noise.repeat(3, 1, 1, 1)).images

    Row i is guided by strategy i modulo K, so that each prompt is drawn by all of them in order.
    It equals K separate runs. One prompt encoding and one batched network pass serve all rows, and
    a row whose method needs no unconditional prediction costs none; what a method evaluates beyond
    its two branches, or inside the network (attention), is evaluated for its own rows.

    `evaluations` holds the network rows of each strategy in the latest run.
    """

    name = "side-by-side"

    def __init__(self, terms: Annotated[Sequence[Any], "one strategy per row"]) -> None:
        self.terms = tuple(map(live, terms))
        if not self.terms or any(isinstance(term, SideBySide) for term in self.terms):
            raise GuidanceError(
                f"SideBySide: found {list(self.terms)!r:.80}, expected at least one strategy, and "
                "none that is itself a SideBySide."
            )
        self.evaluations: list[int] = [0] * len(self.terms)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        pairs = zip(self.terms, self._states(state), strict=True)
        needed = {branch for term, own in pairs for branch in term.needs(moment, own)}
        return tuple(branch for branch in BOTH if branch in needed)

    def condition(
        self, step: Step, branch: Branch, given: dict[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        altered: dict[str, Tensor] = {}
        for each in self._shares(step, state):
            shown = {name: tensor[each.own] for name, tensor in given.items()}
            result = each.term.condition(each.step, branch, shown, each.state)
            for name, tensor in given.items():
                if result[name] is not shown[name]:
                    whole = altered.setdefault(name, tensor.clone())
                    whole[each.own] = result[name].to(tensor.dtype)
        return {**given, **altered} if altered else given

    def before_step(self, step: Step, state: State) -> Tensor:
        x = step.x
        for each in self._shares(step, state):
            before = each.step.x
            each.step.x = each.term.before_step(each.step, each.state)
            if each.step.x is not before:
                x = x.clone() if x is step.x else x
                x[each.own] = each.step.x
        return x

    def evaluate(self, step: Step, state: State) -> None:
        """One pass for the rows of all strategies that do not reach into the network."""
        sharing: dict[Branch, list[Share]] = {}
        for each in self._shares(step, state):
            each.step.needed = each.term.needs(each.step, each.state)
            for branch in () if each.term.inside else each.step.needed:
                sharing.setdefault(branch, []).append(each)
                self.evaluations[each.index] += len(each.rows)
        wanted: dict[Branch, list[int]] = {
            branch: sorted(row for each in shares for row in each.rows)
            for branch, shares in sharing.items()
        }
        found = step.gather(wanted) if wanted else {}
        for branch, out in found.items():
            shares = sharing[branch]
            for i, each in enumerate(shares):  # who take turns, prompt by prompt
                each.step.evaluated[branch] = each.step.predict(out=out[i :: len(shares)])

    def guide(self, step: Step, state: State) -> Prediction:
        out, cond = torch.empty_like(step.x), torch.empty_like(step.x)
        for each in self._shares(step, state):
            with each.term.during(each.step, each.state):
                if each.term.inside:
                    each.term.evaluate(each.step, each.state)
                each.guided = each.term.guide(each.step, each.state)
            out[each.own] = each.guided.out
            known = each.step.evaluated.get("cond", each.guided)
            cond[each.own] = known.out
        step.evaluated["cond"] = step.predict(out=cond)  # for the pipeline's own rescaling
        return step.predict(out=out)

    def after_step(self, step: Step, latents: Tensor, state: State) -> Tensor:
        edited = latents.clone()
        for each in self._shares(step, state):
            edited[each.own] = each.term.after_step(each.step, latents[each.own], each.state)
        return edited

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> Tensor:
        scale = step.x.new_empty(step.x.shape[0])
        for each in self._shares(step, state):
            assert each.guided is not None
            scale[each.own] = each.term.effective_scale(each.step, each.guided, each.state)
        return scale

    def _shares(self, step: Step, state: State) -> list[Share]:
        """Each strategy with the step as it sees it: its own rows only."""
        if getattr(state, "step", None) is not step:
            count, batch = len(self.terms), step.x.shape[0]
            if batch % count:
                raise GuidanceError(
                    f"SideBySide of {count} strategies found a batch of {batch}, expected a "
                    f"multiple of {count}: call the pipeline with num_images_per_prompt={count}."
                )
            if not hasattr(state, "step"):
                self.evaluations = [0] * count
            pairs = zip(self.terms, self._states(state), strict=True)
            state.step, state.shares = step, []
            for i, (term, own) in enumerate(pairs):
                rows = range(i, batch, count)
                state.shares.append(Share(i, rows, term, self._view(step, i, rows), own))
        shares: list[Share] = state.shares
        return shares

    def _view(self, step: Step, index: int, rows: range) -> Step:
        """The step, narrowed down to the rows of one strategy."""
        own = part(rows)

        def evaluate(branch: Branch, **changes: Any) -> Prediction:
            found = step.evaluate(branch, rows=rows, **changes)
            self.evaluations[index] += len(rows)  # unless it was broken off
            return found

        def gather(wanted: Mapping[Branch, Any]) -> dict[Branch, Tensor]:
            self.evaluations[index] += len(wanted) * len(rows)
            return step.gather(dict.fromkeys(wanted, rows))

        def conditions(branch: Branch) -> dict[str, Tensor]:
            return {name: tensor[own] for name, tensor in step.conditions(branch).items()}

        return replace(
            step,
            x=step.x[own],
            timestep=step.timestep[own] if step.timestep.ndim else step.timestep,
            evaluate=evaluate,
            gather=gather,
            conditions=conditions,
            evaluated={},
        )

    def __repr__(self) -> str:
        return f"SideBySide([{', '.join(map(repr, self.terms))}])"


COMPOSITIONS = (Sum, SideBySide)
