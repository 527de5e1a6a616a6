"""The denoiser calls of one step of a pipeline, split into the rows of its branches."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..errors import GuidanceError
from ..step import Branch
from .arguments import Arguments, Rows, joined
from .layers import rows_of
from .shapes import Layout

_CONDITIONS = re.compile(
    r"encoder_hidden_states(_(?!mask|image)\w+)?|cap_feats|text_embeds|pooled_(projections|embeds)"
    r"|class_labels|guidance"
)
TELLS_SCALE = _SCALE, _WAVES = "guidance", "timestep_cond"
"""How distilled networks are told a guidance scale; latent consistency models take it in waves."""


def in_waves(w: Tensor, width: int) -> Tensor:
    """The scales w [B] (0: no guidance) as latent consistency models take them, [B, width]."""
    count = width // 2
    rates = torch.exp(torch.arange(count, device=w.device) * (-math.log(10000) / (count - 1)))
    phases = 1000 * w.float()[:, None] * rates
    return F.pad(torch.cat([phases.sin(), phases.cos()], dim=1), (0, width % 2))


class Call:
    """One denoiser call, whose batch is the concatenation of `branches`.

    `embedded` is the guidance scale that a distilled network is told, in the pipeline's units.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        forward: Callable[..., Any],
        given: Arguments,
        branches: tuple[Branch, ...],
        layout: Layout,
        embedded: float | None = None,
    ) -> None:
        self.network, self.forward, self.given = network, forward, given
        self.embedded = embedded if _WAVES in given.batches else None
        self.branches, self.layout = branches, layout
        self.rows = len(self.sample)
        self.batch = self.rows // len(branches)
        self.reply: Any = None
        self._deferred: Any = None

    @property
    def sample(self) -> Rows:
        """The noisy input of all rows, as the network takes it."""
        return self.given.sample

    @property
    def timestep(self) -> Any:
        """The timestep argument: a scalar, or one value (or more) per sample."""
        return self.given.rows_of(self.given.time, range(self.rows - self.batch, self.rows))

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return self.sample[0].dtype

    @property
    def x(self) -> Tensor:
        """The noisy latent [B, ...]; some networks read more channels or tokens after it."""
        return self.layout.unpack(self.layout.cut(self.sample[-self.batch :]))

    def conditions(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors [B, ...] that a branch is conditioned on, by argument name.

        A list of texts (Z-Image) is one of them where all have the same length. A scale that the
        network takes as waves (latent consistency models) is one in the pipeline's units.
        """
        found: dict[str, Tensor] = {}
        if self.embedded is not None:
            found[_SCALE] = torch.full((self.batch,), self.embedded, device=self.sample[0].device)
        for name, rows in self.given.batches.items():
            if _CONDITIONS.fullmatch(name) and len(rows) == self.rows:
                own = rows[self._rows(branch)]
                if isinstance(own, Tensor):
                    found[name] = own
                elif len({each.shape for each in own}) == 1:
                    found[name] = torch.stack(own)
        return found

    @property
    def masked(self) -> bool:
        """Whether parts of the texts are masked, so that others cannot take their place."""
        masks = [rows for name, rows in self.given.batches.items() if "mask" in name]
        return any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in masks)

    def with_conditions(self, changed: dict[Branch, dict[str, Tensor]]) -> Call:
        """The same call, its branches conditioned on other tensors."""
        changed = {branch: self._as_taken(values) for branch, values in changed.items()}

        def renew(name: str, rows: Rows) -> Rows:
            each = (changed.get(b, {}).get(name, rows[self._rows(b)]) for b in self.branches)
            return joined([*each], like=rows)

        names = {name for values in changed.values() for name in values}
        return self._with(self.given.renewed(names, renew))

    def _as_taken(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Conditions in the form in which the network takes them."""
        waves = self.given.batches.get(_WAVES)
        if self.embedded is None or _SCALE not in conditions or not isinstance(waves, Tensor):
            return conditions
        return {**conditions, _WAVES: in_waves(conditions[_SCALE] - 1, waves.shape[-1])}

    def with_latent(self, x: Tensor) -> Call:
        """The same call at another latent [B, ...]."""
        rows = self.layout.pack(x).repeat(len(self.branches), *[1] * len(self.layout.shape))
        return self._with(self.given.with_sample(self.layout.paste(rows, self.sample)))

    def evaluate(
        self,
        branch: Branch | None = None,
        x: Tensor | None = None,
        timestep: Any = None,
        conditions: dict[str, Tensor] | None = None,
        network: Callable[..., Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Network output for one branch, [B, C, ...], or for all rows where `branch` is None.

        Optionally at another (x, t), under other conditions, through another network that takes the
        same arguments, or for some `rows` only, which may repeat. Conditions of fewer rows are
        those of the last ones.
        """
        given, chosen = self.given, list(range(self.rows))
        if branch is not None:
            chosen = chosen[self._rows(branch)]
        if rows is not None:
            chosen = [chosen[i] for i in rows]
        if chosen != list(range(self.rows)):
            given = given.take(chosen)
        if x is not None:
            given = given.with_sample(self.layout.paste(self.layout.pack(x), given.sample))
        if timestep is not None:
            given = given.with_time(timestep, len(chosen))
        if conditions is not None:

            def renew(name: str, rows: Any) -> Any:
                own = conditions[name]  # which may have another number of tokens
                before = [rows[: len(rows) - len(own)]] if len(own) < len(rows) else []
                return joined([*before, own], like=rows)

            given = given.renewed({*conditions}, renew)
        self.reply = given.pass_to(network or self.forward)
        return self.layout.sign * self.layout.unpack(self.layout.cut(self.reply[0]))

    def answer(self, values: Mapping[Branch, Tensor]) -> Any:
        """What the network would have returned, had it predicted `values` for each branch.

        `values` are rows of latents as the network predicts them, [B, *layout.shape].
        """
        latents = torch.cat([values[branch] for branch in self.branches])
        rows = self.layout.paste(latents, self._template())
        if self.reply is None:  # nothing was evaluated
            wants_tuple = self.given.values.get("return_dict") is False
            return (rows,) if wants_tuple else Transformer2DModelOutput(sample=rows)
        if isinstance(self.reply, tuple):
            return (rows, *self.reply[1:])
        return type(self.reply)(sample=rows)

    def defer(self) -> Any:
        """An answer whose values `fill` writes later: the pipeline keeps it until it combines."""
        nothing = self.sample[0].new_zeros(self.batch, *self.layout.shape)
        answer = self.answer(dict.fromkeys(self.branches, nothing))
        self._deferred = answer[0]
        return answer

    def fill(self, latents: Tensor) -> None:
        """Write the values [B, *layout.shape] of the answer that `defer` gave, if it did."""
        if self._deferred is not None:
            self.layout.cut(self._deferred).copy_(latents)

    def _template(self) -> Rows:
        """Rows of the network's output: some predict more channels than there are latents."""
        config = getattr(self.network, "config", {})
        sample = self.sample
        if isinstance(sample, list):
            return sample
        shape = list(self.layout.shape)
        if len(shape) == 3:  # images: learned sigmas come after the latents' channels
            width = config.get("out_channels") or shape[0]
            shape[0] = max(width, (1 + bool(config.get("learn_sigma"))) * shape[0])
        if self.reply is not None:
            shape = list(self.reply[0].shape[1:])
        return sample.new_zeros(self.rows, *shape)

    def _rows(self, branch: Branch) -> slice:
        return rows_of(self.branches, branch, self.rows)

    def _with(self, given: Arguments) -> Call:
        branches, layout = self.branches, self.layout
        return Call(self.network, self.forward, given, branches, layout, self.embedded)


class Passes:
    """The calls by which a pipeline asks for the branches of one step: one for all, or one each."""

    def __init__(self, *calls: Call, moved: bool = False) -> None:
        self.calls = calls
        self.moved = moved
        self.counts: dict[str, int] = {}

    @property
    def last(self) -> Call:
        """The latest call, which is the one to answer."""
        return self.calls[-1]

    @property
    def joint(self) -> bool:
        """Whether one call holds several branches."""
        return len(self.last.branches) > 1

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for call in self.calls for branch in call.branches)

    def of(self, branch: Branch) -> Call:
        """The call that holds a branch."""
        for call in self.calls:
            if branch in call.branches:
                return call
        raise GuidanceError(
            f"The {branch} prediction is needed in a step in which the pipeline does not ask for "
            "it. Give it a guidance scale above 1 (and, where it takes true_cfg_scale, a negative "
            "prompt), and leave out branches by an Interval, not by its cfg_truncation or the like."
        )

    def conditions(self, branch: Branch) -> dict[str, Tensor]:
        return self.of(branch).conditions(branch)

    def with_conditions(self, changed: dict[Branch, dict[str, Tensor]]) -> Passes:
        return self._map(
            lambda call: call.with_conditions(changed) if {*changed} & {*call.branches} else call
        )

    def with_latent(self, x: Tensor) -> Passes:
        passes = self._map(lambda call: call.with_latent(x))
        passes.moved = True
        return passes

    def evaluate(self, branch: Branch | None = None, **changes: Any) -> Tensor:
        """Network output of one branch, or of all rows of the joint call.

        Each evaluation of a step keeps its own entry in a cache such as FirstBlockCache.
        """
        call = self.last if branch is None else self.of(branch)
        name = " ".join(
            map(str, ("cond_uncond" if branch is None else branch, *(changes.get("rows") or ())))
        )
        count = self.counts[name] = self.counts.get(name, 0) + 1
        cached = getattr(call.network, "cache_context", lambda name: nullcontext())
        with cached(name if count == 1 else f"{name} {count}"):
            return call.evaluate(branch, **changes)

    def _map(self, change: Callable[[Call], Call]) -> Passes:
        return Passes(*map(change, self.calls), moved=self.moved)
