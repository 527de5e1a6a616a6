"""One run of a guided pipeline: the position, the state, the evaluations and the report.

The strategy's prediction is what the scheduler steps on. Of what the pipeline itself makes of its
branches, its rescaling (guidance_rescale) is applied to that prediction too, because the caller
asks for it; its re-normalisation to the conditional prediction (Qwen-Image, Lumina 2, Z-Image) and
its schedules of the scale (CogVideoX) are replaced: strategies say themselves how far to go.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..step import BOTH, Branch, Level, Moment, Prediction, Step
from ..tensors import match_std, norm, on_device
from ..uncompiled import uncompiled
from . import noise
from .arguments import Arguments, picked
from .call import TELLS_SCALE, Call, Passes
from .frames import scope_of
from .layers import around, rows_of, tapped
from .report import Report, StepRecord
from .shapes import Shape

if TYPE_CHECKING:
    from ..guidance import Guidance


def networks(pipe: Any) -> list[Any]:
    """The networks of a pipeline, of which each step uses one."""
    names = ("unet", "transformer", "transformer_2")
    found = [getattr(pipe, name, None) for name in names if hasattr(pipe, "scheduler")]
    return [module for module in found if isinstance(module, torch.nn.Module)]


def denoisers(pipe: Any) -> list[Any]:
    """The networks of a pipeline; `GuidanceError` if it has none."""
    modules = networks(pipe)
    if not modules:
        raise GuidanceError(
            f"attach: found {type(pipe).__name__}, expected a Diffusers pipeline with a denoiser "
            "(unet or transformer) and a scheduler."
        )
    return modules


def denoiser(pipe: Any) -> Any:
    """The network of a pipeline, the first one where it has two."""
    return denoisers(pipe)[0]


@torch.no_grad()
def decode(pipe: Any, x0: Tensor) -> Tensor:
    """Images [n, 3, H, W] in [0, 1], float32, of clean latents [n, C, h, w]."""
    vae = getattr(pipe, "vae", None)
    if vae is None or x0.ndim != 4:
        raise GuidanceError(
            f"{type(pipe).__name__} cannot decode latents of shape {list(x0.shape)} here: that "
            "takes an image autoencoder (pipe.vae) and latents [n, C, h, w]. Judge latents instead."
        )
    config = vae.config
    if hasattr(vae, "bn"):  # normalises packed latents (Flux 2)
        raise GuidanceError(
            f"{type(pipe).__name__} cannot decode single predictions: its {type(vae).__name__} "
            "normalises latents in a way that guidancekit does not know. Judge latents instead."
        )
    latents = x0 / (config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        std, mean = (
            on_device(config[name], x0).view(1, -1, 1, 1)
            for name in ("latents_std", "latents_mean")
        )
        latents = latents * std + mean
    latents = latents + (config.get("shift_factor") or 0.0)
    dtype = vae.dtype
    overflows = dtype == torch.float16 and config.get("force_upcast", False)  # SDXL's
    try:
        if overflows:
            vae.to(torch.float32)
        latents = latents.to(vae.dtype)
        if config.get("z_dim") is None:
            images = vae.decode(latents, return_dict=False)[0]
        else:  # made for video (Qwen-Image)
            images = vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]
    finally:
        if overflows:
            vae.to(dtype)
    return (images.float() / 2 + 0.5).clamp(0, 1)


Watch = Callable[[Step, Prediction], None]
"""Is shown every evaluation of a guidance, with its guided prediction; what it raises ends the run.
"""


class Run:
    """One call of the pipeline: the state, the position and the report."""

    def __init__(
        self, guidance: Guidance, pipe: Any, watch: Watch | None = None, joined: bool = False
    ) -> None:
        self._guidance = weakref.ref(guidance)
        self.watch, self.joined = watch, joined
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.state = SimpleNamespace()
        self.moments: list[Moment] = []
        self.finished = False
        self.position = -1  # index into scheduler.timesteps, known from the first call on
        self.first = 0
        self.shape: Shape | None = None
        self.passes: Passes | None = None
        self.step: Step | None = None
        self.guided: Tensor | None = None  # as the network predicts: [B, *layout.shape]
        self.evaluating: tuple[Branch, ...] = ()
        self.waiting: tuple[Branch, ...] = ()  # for a further pass that they can join
        self.perturbed: slice | None = None  # the rows of that pass among all that are evaluated
        self.encoded: dict[str, dict[str, Tensor]] = {}
        self.verified: set[int] = set()  # for how many branches at once
        self._scale: float | None = None  # the pipeline's
        self._embedded: float | None = None  # what it tells a distilled network
        self._now = 0.0
        self._signature = inspect.signature(type(self.scheduler).step)
        self.report = guidance._report = Report(repr(guidance))

    @property
    def guidance(self) -> Guidance:
        guidance = self._guidance()
        assert guidance is not None  # the running call, or a with block, keeps it alive
        return guidance

    def denoise(
        self,
        network: torch.nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scope: Mapping[str, Any],
    ) -> Any:
        """One call of the denoiser by the pipeline, answered with the guided prediction.

        Where the pipeline asks for its branches one after the other, the first answer is filled in
        with the last one: what the strategy knows of one branch may decide what it needs of the
        other. `scope` holds the local variables of the pipeline's call.
        """
        given = Arguments.of(network, args, kwargs)
        if self.shape is None:
            self.shape = self._read_shape(network, given, scope)
        shape = self.shape
        waiting = self.passes.calls if self.passes else ()
        expected = len(shape.branches) if shape.sequential else 1
        if self.finished or len(waiting) == expected:
            raise GuidanceError(
                f"{type(self.pipe).__name__} evaluates its network more than once per step and "
                "branch, in a way that guidancekit does not know."
            )
        branches = shape.branches_of(given, len(waiting))
        call = Call(network, forward, given, branches, shape.layout, self._embedded)
        self.passes = Passes(*waiting, call)
        if self.position < 0:
            self._locate()
            self._check_before_first_step()
        self._follow_scale(scope)
        if len(self.passes.calls) < expected:
            return call.defer()
        self._guide(scope)
        for earlier in waiting:
            earlier.fill(self._answers["cond"])
        return self.passes.last.answer(self._answers)

    def _guide(self, scope: Mapping[str, Any]) -> None:
        """The guided prediction of this step, from the calls of the pipeline."""
        assert self.passes is not None and self.shape is not None
        guidance, state, step = self.guidance, self.state, self._step()
        self.step = step
        if step.index == len(self.report.steps):
            self.report.steps.append(
                StepRecord(step.index, step.nsr if step.grid else None, step.time)
            )
        self._condition(step)
        x = step.x
        step.x = guidance.before_step(step, state)
        if step.x is not x:
            self.passes = self.passes.with_latent(step.x)
        step.needed = guidance.needs(step, state)
        acts = guidance.acts(step, state)
        with guidance.during(step, state):
            if self.joined and guidance.joins and {*step.needed} <= {*self.passes.last.branches}:
                self.waiting = step.needed
            else:
                guidance.evaluate(step, state)
            guided = guidance.guide(step, state)
        if step.stage == 0:
            record = self.report.steps[-1]
            record.active = acts
            record.scale = guidance.effective_scale(step, guided, state)
        if self.watch is not None:
            self.watch(step, guided)
        out = guided.out
        rescale = _guidance_rescale(self.pipe, scope)
        if len(self.passes.branches) > 1 and step.evaluated and rescale:
            out = match_std(out, step.cond.out, rescale)
        layout = self.shape.layout
        self.guided = (layout.sign * layout.pack(out)).to(self.passes.last.dtype)

    @property
    def _answers(self) -> dict[Branch, Tensor]:
        """The guided prediction for every branch: whatever the pipeline's own scale, u + s (c - u)
        is that prediction, exactly.

        Once per run a known offset between the branches shows what the pipeline does with them.
        """
        assert self.guided is not None and self.passes is not None
        verified = len(self.passes.branches) in self.verified
        return {"cond": self.guided if verified else self.guided + 1, "uncond": self.guided}

    def finish_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's step, on the guided prediction and the latents of the strategy."""
        if self.passes is None:
            raise GuidanceError(
                f"{type(self.pipe).__name__} steps its scheduler without a call of its "
                f"{' or '.join(type(each).__name__ for each in networks(self.pipe))} that "
                "guidancekit has seen, so nothing would be guided. guidancekit does not support "
                "this pipeline."
            )
        given = self._signature.bind(self.scheduler, *args, **kwargs)
        output, latents = given.arguments["model_output"], given.arguments["sample"]
        assert self.shape is not None and self.passes is not None
        layout = self.shape.layout
        if self.guided is None:  # the pipeline left out its second branch in this step
            self._guide(scope_of(self.pipe) or {})
        elif len(self.passes.branches) not in self.verified:
            self._verify(output)
        assert self.step is not None and self.guided is not None
        given.arguments["model_output"] = self._like(layout.sign * self.guided, output)
        if self.passes.moved:
            moved = self.step.level.scale * layout.pack(self.step.x)
            given.arguments["sample"] = self._like(moved, latents)
        result = step(*given.args[1:], **given.kwargs)
        if self.guidance.edits_latents:
            new = result[0]
            x = layout.unpack(new[: self.step.x.shape[0]])
            x = self.guidance.after_step(self.step, x, self.state)
            edited = self._like(layout.pack(x), new)
            if isinstance(result, tuple):
                result = (edited, *result[1:])
            else:
                result.prev_sample = edited
        self.passes = self.step = self.guided = None
        self.position += 1
        if self.position == self.first + self._length:
            self.finished = True
            self.state = SimpleNamespace()
        return result

    @staticmethod
    def _like(latents: Tensor, other: Tensor) -> Tensor:
        """Latents in the shape and dtype of others; some pipelines step both branches (DiT)."""
        latents = latents.reshape(-1, *other.shape[1:]).to(other.dtype)
        count = other.shape[0] // latents.shape[0]
        return latents.repeat(count, *[1] * (latents.ndim - 1)) if count > 1 else latents

    def _verify(self, output: Tensor) -> None:
        """Once per run: the value that reaches the scheduler is what the pipeline's own combination
        makes of the branches, and nothing else happened on the way."""
        assert self.shape is not None and self.passes is not None and self.guided is not None
        answers, sign = self._answers, self.shape.layout.sign
        cond, uncond = (answers[branch].float() for branch in BOTH[::-1])
        expected = list(self._combinations(cond, uncond))
        found = output[: cond.shape[0]].float()
        if expected and found.numel() == cond.numel():
            found = sign * found.reshape(cond.shape)
            if _is_any_of(found, expected, self.guided.dtype):
                self.verified.add(len(self.passes.branches))
                return
            if _is_any_of(-found, expected, self.guided.dtype):
                raise GuidanceError(
                    "This run starts in the middle of the schedule, where guidancekit cannot tell "
                    f"in which direction the network of {type(self.pipe).__name__} counts time. "
                    "Choose another strength or number of steps."
                )
        raise GuidanceError(
            f"{type(self.pipe).__name__} does not combine its branches as uncond + scale * "
            "(cond - uncond) between its network and its scheduler, so the guided prediction would "
            "not arrive. guidancekit does not support this pipeline."
        )

    def _combinations(self, cond: Tensor, uncond: Tensor) -> Iterator[Tensor]:
        """What Diffusers' pipelines make of their branches.

        A re-normalisation to the conditional prediction is recognised here, and guidance takes its
        place: per token (Qwen-Image, Lumina 2) or of the whole, as a cap (Z-Image).
        """
        assert self.passes is not None
        if len(self.passes.branches) == 1:
            yield cond
            return
        scope = scope_of(self.pipe) or {}
        rescale = _guidance_rescale(self.pipe, scope)
        cap = getattr(self.pipe, "_cfg_normalization", None)
        for scale in _scales(self.pipe, scope):
            for start in (uncond, cond):  # Z-Image counts its scale from the conditional one
                combined = start + scale * (cond - uncond)
                yield combined
                if rescale:
                    yield match_std(combined, cond, rescale)
                yield combined * (
                    cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
                )
                if cap:
                    yield combined * (float(cap) * norm(cond) / norm(combined)).clamp_max(1)

    # --- where we are ---------------------------------------------------------------------------

    def _read_shape(self, network: Any, given: Arguments, scope: Mapping[str, Any]) -> Shape:
        """How the pipeline asks for its branches, from the first call of a run."""
        shape = Shape.read(self.pipe, network, scope, given)
        self._scale = next(iter(_scales(self.pipe, scope)), None)
        if self._scale is not None:
            if "uncond" in shape.branches:
                self._scale += shape.offset
            elif self._scale < 1:  # also what distilled models are called with
                self._scale = 1.0
        if any(isinstance(given.values.get(name), Tensor) for name in TELLS_SCALE):
            embedded = getattr(self.pipe, "_guidance_scale", None) or scope.get("guidance_scale")
            self._embedded = None if embedded is None else float(embedded)
        self._now = float(scope.get("t", torch.as_tensor(given.time).flatten()[0]))
        return shape

    def _follow_scale(self, scope: Mapping[str, Any]) -> None:
        """The pipeline's scale in this step, where it changes (Wan 2.2, Z-Image's truncation)."""
        assert self.shape is not None
        scale = scope.get("current_guidance_scale")
        if isinstance(scale, (int, float)) and "uncond" in self.shape.branches:
            self.moments[self._solver_step].guidance_scale = float(scale) + self.shape.offset

    def _locate(self) -> None:
        """Find the first executed entry of the schedule (image-to-image starts late)."""
        entries = self.scheduler.timesteps.tolist()
        planned = getattr(self.pipe, "_num_timesteps", None) or len(entries)
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None:
            away = [abs(time - self._now) for time in entries]
            begin = away.index(min(away))
            late = len(entries) - planned
            if 0 <= late < len(entries) and away[late] == away[begin]:  # PNDM repeats an entry
                begin = late
        self.position = self.first = begin
        self._length = min(len(entries) - begin, planned)
        self._levels = noise.levels(self.scheduler, begin)
        self._kind = noise.kind(self.scheduler)
        self._stages = noise.stages(self.scheduler, begin)[: self._length]
        starts = [begin + i for i, stage in enumerate(self._stages) if stage == 0]
        grid: tuple[float, ...] = ()
        if self._levels is not None:
            starting = (self._levels[i][0].nsr for i in starts)
            grid = (*starting, self._levels[begin + self._length - 1][1].nsr)
        times = noise.times(self.scheduler)
        self.moments = [
            Moment(
                index, len(starts), grid, self._scale, time=times[i], embedded_scale=self._embedded
            )
            for index, i in enumerate(starts)
        ]

    @property
    def _solver_step(self) -> int:
        """Index of the solver step that the current position belongs to."""
        return self._stages[: self.position - self.first + 1].count(0) - 1

    @property
    def _training_steps(self) -> int:
        return int(self.scheduler.config.get("num_train_timesteps", 1000))

    def _check_before_first_step(self) -> None:
        """Refuse what cannot work, and say what would do nothing, before any work is lost."""
        guidance = self.guidance
        noise.check(self.scheduler, guidance, (scope_of(self.pipe) or {}).get("eta"))
        _check_caches(networks(self.pipe))
        planned = SimpleNamespace()
        needs = [guidance.evaluates, *(guidance.needs(each, planned) for each in self.moments)]
        assert self.shape is not None
        if any("uncond" in needed for needed in needs) and "uncond" not in self.shape.branches:
            raise GuidanceError(
                f"{guidance!r} needs the unconditional prediction, but "
                f"{type(self.pipe).__name__} was called without it. {self._how_to_ask()}"
            )
        acts = [guidance.acts(moment, planned) for moment in self.moments]
        if guidance.scheduled and not any(acts):
            message = f"{guidance!r} guides none of the {len(acts)} steps of this run"
            grid = self.moments[0].grid
            if grid:
                message += f", whose noise levels fall from {grid[0]:.3g} to {grid[-2]:.3g}"
            self._warn(f"{message}.")

    def _how_to_ask(self) -> str:
        """How this pipeline is made to evaluate its unconditional branch."""
        found = next(iter(_scales(self.pipe, scope_of(self.pipe) or {})), None)
        if "true_cfg_scale" in inspect.signature(type(self.pipe).__call__).parameters:
            call = (
                "Call it with a true_cfg_scale above 1 and a negative_prompt, for example "
                'true_cfg_scale=4, negative_prompt=""'
            )
        elif found is not None and found > 1:
            return (
                f"It makes none at a guidance_scale of {found:g} either: the model is distilled. "
                "Use a strategy that needs none, such as ICG, TSG, PAG, SAG or NAG."
            )
        else:
            call = (
                f"Call it with a guidance_scale above 1 (found {found}), for example "
                "guidance_scale=5"
            )
        return f"{call}; the scale of the strategy is the one that counts."

    def _warn(self, message: str) -> None:
        if message not in self.report.warnings:
            self.report.warnings.append(message)
            warnings.warn(message, stacklevel=2)

    # --- one evaluation -------------------------------------------------------------------------

    def _step(self) -> Step:
        """This step as a strategy sees it; nothing is evaluated yet."""
        assert self.passes is not None and self.shape is not None
        call, clock, layout = self.passes.last, self.shape.clock, self.shape.layout
        level, next_level = self._levels[self.position] if self._levels else (_UNKNOWN, _UNKNOWN)
        following = self.position + 1
        times = self.scheduler.timesteps

        def only() -> slice | None:
            return self.perturbed

        return Step(
            **vars(self.moments[self._solver_step]),
            stage=self._stages[self.position - self.first],
            timestep=call.timestep,
            next_timestep=clock(times[following]) if following < len(times) else None,
            flow_timestep=lambda sigma: clock(self._training_steps * sigma),
            x=call.x.float(),
            level=level,
            next_level=next_level,
            kind=self._kind,
            evaluate=functools.partial(self._evaluate_branch, level),
            conditions=self.passes.conditions,
            attention=functools.partial(
                tapped, call.network, layout.grid, lambda: self.evaluating, only=only
            ),
            around=functools.partial(around, call.network, only=only),
            rows=lambda branch, count: rows_of(self.evaluating, branch, count),
            encode=self._encode,
            warn=self._warn,
            decode=lambda x0: uncompiled(lambda: decode(self.pipe, x0)),
            gather=self._gather,
            needed=(),
            evaluated={},
        )

    def _condition(self, step: Step) -> None:
        """Let the strategy alter what the branches are conditioned on."""
        assert self.passes is not None
        changed = {
            branch: altered
            for branch in self.passes.branches
            if (given := self.passes.conditions(branch))
            and (altered := self.guidance.condition(step, branch, given, self.state)) is not given
        }
        if changed:
            self.passes = self.passes.with_conditions(changed)

    def _gather(self, wanted: Mapping[Branch, Sequence[int] | None]) -> dict[Branch, Tensor]:
        """Network outputs of some rows of each branch (None: all), in one batch where it can be."""
        assert self.passes is not None
        branches = self.passes.last.branches
        if not self.passes.joint or set(wanted) < set(branches):
            return {branch: self._network(branch, rows=rows) for branch, rows in wanted.items()}
        everyone = range(self.passes.last.batch)
        rows = [everyone if (given := wanted[branch]) is None else given for branch in branches]
        chosen = [i * len(everyone) + row for i, own in enumerate(rows) for row in own]
        out = self._network(rows=None if len(chosen) == 2 * len(everyone) else chosen)
        parts = out.split([len(own) for own in rows])
        return dict(zip(branches, parts, strict=True))

    def _evaluate_branch(
        self,
        now: Level,
        branch: Branch,
        x: Tensor | None = None,
        timestep: Any = None,
        level: Level | None = None,
        within: AbstractContextManager[None] | None = None,
        **changes: Any,
    ) -> Prediction:
        assert self.passes is not None
        if self.waiting and x is None and timestep is None and {*changes} <= {"conditions"}:
            if changes or within is not None:
                return self._join(branch, within or nullcontext(), **changes)
            if branch in self.waiting:
                return self._evaluate_waiting()[branch]
        seen = self.passes.last.x if x is None else x
        rows = changes.get("rows")
        if x is None and rows is not None:
            seen = picked(seen, rows)
        with within or nullcontext():
            out = self._network(branch, x=x, timestep=timestep, **changes)
        return Prediction(out, seen, level or now, self._kind)

    def _evaluate_waiting(self) -> dict[Branch, Prediction]:
        """No further pass came first, or none that they could join."""
        assert self.step is not None
        self.waiting = ()
        self.guidance.evaluate(self.step, self.state)
        return self.step.evaluated

    def _join(
        self, branch: Branch, within: AbstractContextManager[None], **changes: Any
    ) -> Prediction:
        """A further pass of a branch, in one batch with the branches that wait for theirs."""
        assert self.passes is not None and self.step is not None
        call, branches, self.waiting = self.passes.last, (*self.waiting, branch), ()
        starts = (call.branches.index(each) * call.batch for each in branches)
        rows = [start + row for start in starts for row in range(call.batch)]
        self.perturbed = slice(len(rows) - call.batch, len(rows))
        try:
            with within:
                out = self._network(None, branches, rows=rows, **changes)
        finally:
            self.perturbed = None
        *outs, further = [self.step.predict(out=part) for part in out.split(call.batch)]
        self.step.evaluated.update(zip(branches, outs, strict=False))
        return further

    def _network(
        self,
        branch: Branch | None = None,
        branches: tuple[Branch, ...] | None = None,
        **changes: Any,
    ) -> Tensor:
        """Network output of a branch, or of all rows or some, which then are of `branches`."""
        assert self.passes is not None
        if branches is None:
            branches = self.passes.last.branches if branch is None else (branch,)
        self.evaluating = branches
        out = self.passes.evaluate(branch, **changes)
        record = self.report.steps[-1]
        record.rows += out.shape[0]
        record.calls += 1
        return out

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """What a prompt conditions the network on, [1, ...] by argument name; once per run."""
        if prompt not in self.encoded:
            self.encoded[prompt] = uncompiled(lambda: self._encoded(prompt))
        return self.encoded[prompt]

    def _encoded(self, prompt: str) -> dict[str, Tensor]:
        assert self.passes is not None
        call, name = self.passes.of("cond"), type(self.pipe).__name__
        encode = getattr(self.pipe, "encode_prompt", None)
        if encode is None or getattr(self.pipe, "tokenizer", None) is None:
            raise GuidanceError(
                f"{name} cannot encode {prompt!r} here: it was loaded without its text encoder. "
                "Call it with a negative prompt and guidance_scale above 1 instead."
            )
        if call.masked:
            raise GuidanceError(
                f"{name} masks its texts, so guidancekit cannot put {prompt!r} in the place of "
                "another one. Call it with a negative prompt and guidance_scale above 1 instead."
            )
        scope = scope_of(self.pipe) or {}
        given = {
            **{name: scope[name] for name in _OF_TEXTS if name in scope},
            "prompt": prompt,
            "device": self.scheduler.timesteps.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        accepted = inspect.signature(encode).parameters.values()
        needed = [each.name for each in accepted if each.default is each.empty]
        names = {each.name for each in accepted}
        options = dict.fromkeys(needed) | {k: v for k, v in given.items() if k in names}
        texts = {k: y for k, y in call.conditions("cond").items() if y.ndim > 1}
        found: dict[str, Tensor] = {}
        for value in encode(**options):  # which is which shows in the sizes
            value = torch.stack(value) if isinstance(value, list) and value else value
            if isinstance(value, Tensor) and value.is_floating_point():
                size = value.ndim, value.shape[-1]
                fit = [k for k, y in texts.items() if (y.ndim, y.shape[-1]) == size]
                found |= dict.fromkeys([k for k in fit if k not in found][:1], value)
        if found.keys() != texts.keys():
            raise GuidanceError(
                f"{name} does not encode {prompt!r} to what its network takes: found "
                f"{', '.join(found) or 'nothing'}, expected {', '.join(texts) or 'embeddings'}."
            )
        return found


_OF_TEXTS = ("max_sequence_length", "clip_skip", "lora_scale")
"""What a call of a pipeline says of how its texts are encoded."""


class _UnknownLevel(Level):
    """Stands in where the scheduler's noise levels are unknown: an error when they are needed."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("alpha", "sigma", "scale", "nsr"):
            raise GuidanceError(
                "This strategy needs the noise level of each step, which is unknown for this "
                "scheduler. Use DDIM, DDPM, Euler, Heun, DPM++, UniPC or flow-matching Euler."
            )
        return super().__getattribute__(name)


_UNKNOWN = _UnknownLevel(1.0, 0.0)


def _is_any_of(found: Tensor, expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a result is one of those expected, up to rounding in `dtype`."""
    errors = [(found - each).abs().max() / (each.abs().max() + 1) for each in expected]
    return bool(torch.stack(errors).min() <= 16 * torch.finfo(dtype).eps)


def _check_caches(networks: Sequence[torch.nn.Module]) -> None:
    """Refuse caches that count the network's evaluations, or keep one memory for all of them.

    FirstBlockCache measures what has changed, for every kind of evaluation on its own.
    """
    for network in networks:
        for module in network.modules():
            registry = vars(module).get("_diffusers_hook")
            for hook in getattr(registry, "hooks", {}).values():
                name = type(hook).__name__
                if hook._is_stateful and not name.startswith("FBC"):
                    raise GuidanceError(
                        f"Found a cache on {type(network).__name__} ({name}) that counts on one "
                        "evaluation per step, always of the same rows, which guidance is not. Call "
                        "disable_cache(), or enable_cache(FirstBlockCacheConfig(...))."
                    )


def _scales(pipe: Any, scope: Mapping[str, Any]) -> list[float]:
    """The guidance scales that a pipeline was called with, the one that it combines with first."""
    names = ("true_cfg_scale",) if scope.get("do_true_cfg") else ()
    found = [
        *(scope.get(name) for name in (*names, "current_guidance_scale")),
        getattr(pipe, "_guidance_scale", None),
        scope.get("guidance_scale"),
        scope.get("true_cfg_scale"),
    ]
    return [float(scale) for scale in found if isinstance(scale, (int, float))]


def _guidance_rescale(pipe: Any, scope: Mapping[str, Any] | None) -> float:
    """The pipeline's own rescaling (arXiv:2305.08891), which the engine applies in its place."""
    found = getattr(pipe, "_guidance_rescale", None) or (scope or {}).get("guidance_rescale")
    return float(found or 0.0)
