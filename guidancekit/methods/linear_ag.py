"""LinearAG, arXiv:2312.12487: estimate unconditional predictions from those of earlier steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import bundled, schedules
from ..errors import GuidanceError
from ..guidance import ClassifierFree, Preset, State
from ..schedules import AnyScale, scale_at
from ..step import BOTH, COND, Branch, Moment, Prediction, Step
from ..tensors import norm

Table = list[list[float] | None]
"""One row per step."""


class LinearAG(ClassifierFree):
    """LinearAG: half of the unconditional passes replaced by a linear estimate, arXiv:2312.12487.

    `table` has one entry per step: [] evaluates both branches; numbers [b, c_0..c_k, u_0..u_(k-1)]
    estimate u_k = b + sum c_j cond_j + sum u_j uncond_j from this run's outputs, estimates
    included; None is conditional only. A file may hold tables for several numbers of steps.
    `guidancekit fit linear-ag` makes one for a model, a solver, a scale and a negative prompt, and
    it holds for those only. An estimate further than ||u|| from the last uncond u is replaced by
    that u (ours).

    Space: the network's own output (noise in the paper). The policy (alternate in the first half,
    then conditional) and one scalar per earlier prediction are second-hand (unverified). No table
    was published; the presets `scenes` and `scenes-flow` name those of the embedded models. Stages
    after the first of a multi-stage solver are evaluated.
    Cost: 2 network evaluations per step where both are evaluated, else 1; 25 in 20 steps as fitted.
    Oracle: a loop by hand on SD3; a network whose regression is known.
    """

    name = "linear-ag"
    paper = "arXiv:2312.12487"
    presets = {
        family: Preset(
            {"table": f"{family}:linear-ag"}, "ours: its own scheduler, w = 4, no negative prompt"
        )
        for family in bundled.FAMILIES.values()
    }

    def __init__(
        self,
        scale: AnyScale = None,
        table: Annotated[
            Sequence[Any] | str | None, "one entry per step, or the path of a JSON file with them"
        ] = None,
    ) -> None:
        self.scale = schedules.from_config(scale)
        self.tables = _read(table) if isinstance(table, str) else _by_steps(table)

    @property
    def table(self) -> Table | None:
        """The table, where there is only one."""
        return next(iter(self.tables.values())) if len(self.tables) == 1 else None

    def _row(self, moment: Moment) -> list[float] | None:
        if not self.tables:
            raise GuidanceError(
                "LinearAG needs a table fitted to the model: LinearAG(table=...), made by "
                "`guidancekit fit linear-ag` or guidancekit.fitting.fit_linear_ag. "
                'LinearAG.preset("scenes") has those of an embedded model.'
            )
        if moment.total not in self.tables:
            known = " or ".join(map(str, self.tables))
            raise GuidanceError(
                f"LinearAG: the table was fitted for {known} steps, but the run has "
                f"{moment.total}. Use {known} steps, or fit another table."
            )
        return self.tables[moment.total][moment.index]

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return BOTH if self._row(moment) == [] else COND

    def acts(self, moment: Moment, state: State) -> bool:
        return self._row(moment) is not None

    def guide(self, step: Step, state: State) -> Prediction:
        row = self._row(step)
        if row is None:
            return step.cond
        if step.stage == 0:
            if not hasattr(state, "cond"):
                state.cond, state.uncond = [], []
            state.cond.append(step.cond.out)
            if "uncond" not in step.evaluated and row:
                step.evaluated["uncond"] = step.predict(out=estimate(row, state.cond, state.uncond))
            state.uncond.append(step.uncond.out)
        return step.cfg(scale_at(self.scale, step))


def estimate(row: Sequence[float], cond: list[Tensor], uncond: list[Tensor]) -> Tensor:
    """The unconditional output that a row of the table predicts, from [B, ...] outputs so far."""
    weights = zip(row[1:], [*cond, *uncond], strict=True)
    value = row[0] + torch.stack([weight * tensor for weight, tensor in weights]).sum(0)
    last = uncond[-1]
    return torch.where(norm(value - last) < norm(last), value, last)


def _read(path: str) -> dict[int, Table]:
    """The tables in a JSON file, by number of steps."""
    located = bundled.locate(path)
    try:
        return _by_steps(json.loads(Path(located).read_text(encoding="utf-8"))["table"])
    except GuidanceError:  # a ValueError too
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GuidanceError(
            f"LinearAG(table={path!r}): expected a JSON file with an entry 'table', such as "
            "`guidancekit fit linear-ag` or fit_linear_ag(...).save_config(folder) writes."
        ) from error


def _by_steps(table: Any) -> dict[int, Table]:
    """Tables by number of steps, from one, or from several by that number."""
    several = table.values() if isinstance(table, Mapping) else [table]
    return {len(rows): rows for rows in map(_checked, several) if rows is not None}


def _checked(table: Any) -> Table | None:
    """The table as lists; raises `GuidanceError` where a row does not fit its step."""
    if table is None:
        return None
    rows: Table = []
    for k, row in enumerate(table if isinstance(table, (list, tuple)) else [table]):
        numbers = isinstance(row, (list, tuple)) and all(isinstance(n, (int, float)) for n in row)
        estimated = numbers and k > 0 and None not in rows and all(map(math.isfinite, row))
        if row is not None and not (numbers and (not row or (estimated and len(row) == 2 * k + 2))):
            raise GuidanceError(
                f"LinearAG(table=...): found {row!r:.60} for step {k}, expected None, [] or, where "
                f"all steps before have an unconditional prediction, {2 * k + 2} finite numbers."
            )
        rows.append(None if row is None else list(row))
    return rows
