"""The connection between a strategy and a pipeline, and the course of a run.

Two places are hooked, and everything else follows from them: the denoiser's forward (through
diffusers' HookRegistry), which sees every evaluation, and the scheduler's `set_timesteps` and
`step`, which mark the start of a run, the end of each step, and see the latents.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from ..errors import GuidanceError
from ..step import Branch, Level, Moment, Prediction, Step
from ..tensors import match_std
from . import noise
from .call import Call
from .report import Report, StepRecord

if TYPE_CHECKING:
    from ..guidance import Guidance

_HOOK = "guidancekit"


class Attachment:
    """One guidance on one pipeline. It holds the guidance weakly and comes off when that dies."""

    def __init__(self, guidance: Guidance, pipe: Any) -> None:
        self.pipe = pipe
        self.denoiser = _denoiser(pipe)
        self.scheduler: Any = None
        self.installed = True
        self.entered = False
        self.run: Run | None = None
        self.used = False
        self._guidance = weakref.ref(guidance)
        self._description = repr(guidance)
        self._patch_denoiser()
        self._patch_scheduler()
        weakref.finalize(guidance, _discard, self).atexit = False

    # --- installing and removing ----------------------------------------------------------------

    def _patch_denoiser(self) -> None:
        found = vars(self.denoiser).get("_diffusers_hook")
        if isinstance(found, HookRegistry):
            other = found.get_hook(_HOOK)
            if isinstance(other, DenoiserHook):
                other.attachment.remove()
        self._found = [
            name for name in ("forward", "_diffusers_hook") if name in vars(self.denoiser)
        ]
        registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        registry.register_hook(DenoiserHook(self), _HOOK)

    def _patch_scheduler(self) -> None:
        """Replace the scheduler's methods on the instance (it is not a module, it has no hooks)."""
        self.scheduler = self.pipe.scheduler
        other = getattr(vars(self.scheduler).get("step"), "attachment", None)
        if other is not None:
            other.remove()
        around = {"set_timesteps": self.begin, "step": self.finish_step}
        self._replaced = {name: vars(self.scheduler).get(name) for name in around}
        for name, method in around.items():
            setattr(self.scheduler, name, _around(self.scheduler, name, method, self))

    def _unpatch_scheduler(self) -> None:
        for name, previous in self._replaced.items():
            if previous is None:
                vars(self.scheduler).pop(name, None)
            else:
                setattr(self.scheduler, name, previous)

    def remove(self) -> None:
        """Take every hook off; denoiser and scheduler are as they were found."""
        if not self.installed:
            return
        self.installed = False
        self.run = None
        self._unpatch_scheduler()
        registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        registry.remove_hook(_HOOK, recurse=False)
        if not registry.hooks:
            for name in {"forward", "_diffusers_hook"} - set(self._found):
                vars(self.denoiser).pop(name, None)

    # --- the course of a run --------------------------------------------------------------------

    def begin(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `set_timesteps`: a run of some pipeline starts."""
        result = set_timesteps(*args, **kwargs)
        self._start()
        return result

    def _start(self) -> None:
        guidance = self._guidance()
        callback = _callback_of_running(self.pipe)
        cut_short = self.run is not None and not self.run.finished
        self.run = None
        if guidance is None or callback is _NOT_RUNNING:
            return
        if cut_short and not self.entered and not _mentions(callback, guidance):
            # Outside a block only a call that names the guidance still means it now: perhaps the
            # object is alive only because a traceback holds it.
            self.remove()
            warnings.warn(
                f"{self._description} came off: its last run did not finish. Attach it again, or "
                "use a with block.",
                stacklevel=2,
            )
            return
        self.run = Run(guidance, self.pipe)
        self.used = True

    def denoise(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of the denoiser by the pipeline."""
        if self.pipe.scheduler is not self.scheduler:
            self._unpatch_scheduler()
            self._patch_scheduler()
            self._start()
        run = self.run
        if run is None or (run.finished and _callback_of_running(self.pipe) is _NOT_RUNNING):
            return forward(*args, **kwargs)
        return run.denoise(forward, args, kwargs)

    def finish_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `step`."""
        if self.run is None or self.run.call is None:
            return step(*args, **kwargs)
        return self.run.finish_step(step, *args, **kwargs)


class Run:
    """One call of the pipeline: the state, the position and the report."""

    def __init__(self, guidance: Guidance, pipe: Any) -> None:
        from ..guidance import State

        self._guidance = weakref.ref(guidance)
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.state = State()
        self.moments: list[Moment] = []
        self.finished = False
        self.position = -1  # index into scheduler.timesteps, known from the first call on
        self.first = 0
        self.call: Call | None = None
        self.step: Step | None = None
        self.guided: Tensor | None = None
        self.branches: tuple[Branch, ...] = ("cond",)
        self.verified = False
        self.report = guidance._report = Report(repr(guidance))

    @property
    def guidance(self) -> Guidance:
        guidance = self._guidance()
        assert guidance is not None  # the running call, or a with block, keeps it alive
        return guidance

    def denoise(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.finished or self.call is not None:
            raise GuidanceError(
                f"{type(self.pipe).__name__} evaluates its network more than once per step, in a "
                "way that guidancekit does not know."
            )
        first_call = self.position < 0
        if first_call:
            self.branches = _branches(self.pipe)
        call = Call(forward, args, kwargs, self.branches)
        if first_call:
            self._locate(call.timestep)
            self._check_before_first_step()
        self.call = call
        moment = self._moment
        if moment.index == len(self.report.steps):
            nsr = moment.nsr if moment.grid else None
            self.report.steps.append(StepRecord(moment.index, nsr))
        self.step = step = self._evaluate(call, moment, self.guidance.needs(moment, self.state))
        guided = self.guidance.guide(step, self.state)
        self._record(step, guided)
        out = guided.out
        if len(self.branches) > 1 and _guidance_rescale(self.pipe):
            out = match_std(out, step.cond.out, _guidance_rescale(self.pipe))
        self.guided = out.to(call.sample.dtype)
        if not self.verified:
            # A known offset between the branches shows what the pipeline does with them.
            return call.answer(cond=self.guided + 1, uncond=self.guided)
        return call.answer(cond=self.guided, uncond=self.guided)

    def finish_step(
        self,
        step: Callable[..., Any],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        assert self.guided is not None and self.step is not None
        if not self.verified:
            self._verify(model_output)
            model_output = self.guided
        result = step(model_output, timestep, sample, *args, **kwargs)
        if self.guidance.edits_latents:
            latents = result[0]
            edited = self.guidance.after_step(self.step, latents, self.state)
            if isinstance(result, tuple):
                result = (edited, *result[1:])
            else:
                result.prev_sample = edited
        self.call = self.step = self.guided = None
        self.position += 1
        if self.position == self.first + self._length:
            self.finished = True
            self.state = type(self.state)()
        return result

    def _verify(self, model_output: Tensor) -> None:
        """Once per run: the value that reaches the scheduler is what the pipeline's own combination
        makes of the branches, and nothing else happened on the way."""
        assert self.guided is not None
        uncond, cond = self.guided, self.guided + 1
        expected = cond
        if len(self.branches) > 1:
            scale = _guidance_scale(self.pipe) or 0.0
            expected = uncond + scale * (cond - uncond)
            if _guidance_rescale(self.pipe):
                expected = match_std(expected, cond, _guidance_rescale(self.pipe))
        same = model_output.shape == expected.shape
        if same:
            size = expected.float().abs().max() + 1
            error = (model_output.float() - expected.float()).abs().max()
            same = bool(error <= 16 * torch.finfo(expected.dtype).eps * size)
        if not same:
            raise GuidanceError(
                f"{type(self.pipe).__name__} does not combine its branches as uncond + scale * "
                "(cond - uncond) between its network and its scheduler, so the guided prediction "
                "would not arrive. guidancekit does not support this pipeline."
            )
        self.verified = True

    # --- where we are ---------------------------------------------------------------------------

    def _locate(self, timestep: Tensor) -> None:
        """Find the first executed entry of the schedule (image-to-image starts late)."""
        times = self.scheduler.timesteps.tolist()
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None:
            now = float(torch.as_tensor(timestep).flatten()[0])
            begin = min(range(len(times)), key=lambda i: abs(times[i] - now))
        self.position = self.first = begin
        planned = getattr(self.pipe, "_num_timesteps", None) or len(times)
        self._length = min(len(times) - begin, planned)
        self._levels = noise.levels(self.scheduler)
        self._kind = noise.kind(self.scheduler)
        total = -(-self._length // self._order)
        grid: tuple[float, ...] = ()
        if self._levels is not None:
            starts = [self._levels[begin + self._order * i][0].nsr for i in range(total)]
            grid = (*starts, self._levels[begin + self._length - 1][1].nsr)
        scale = _guidance_scale(self.pipe)
        self.moments = [Moment(i, total, grid, scale) for i in range(total)]

    @property
    def _order(self) -> int:
        """Network evaluations per solver step."""
        order: int = getattr(self.scheduler, "order", 1)
        return order

    @property
    def _moment(self) -> Moment:
        return self.moments[(self.position - self.first) // self._order]

    @property
    def _stage(self) -> int:
        return (self.position - self.first) % self._order

    def _check_before_first_step(self) -> None:
        """Refuse what cannot work, and say what would do nothing, before any work is lost."""
        from ..guidance import State

        guidance = self.guidance
        if guidance.edits_latents and not noise.correctable(self.scheduler):
            raise GuidanceError(
                f"{guidance!r} corrects the latents after each step, which "
                f"{type(self.scheduler).__name__} does not allow: it keeps samples of its own. "
                "Use DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, "
                "DPMSolverMultistepScheduler or FlowMatchEulerDiscreteScheduler."
            )
        planned = State()
        active = ["uncond" in guidance.needs(moment, planned) for moment in self.moments]
        if any(active) and "uncond" not in self.branches:
            raise GuidanceError(
                f"{guidance!r} needs the unconditional prediction, but "
                f"{type(self.pipe).__name__} was called without it (guidance_scale = "
                f"{_guidance_scale(self.pipe)}). Call the pipeline with a guidance_scale above 1, "
                "for example guidance_scale=5; the scale of the strategy is the one that counts."
            )
        if guidance.scheduled and not any(active):
            message = f"{guidance!r} guides none of the {len(active)} steps of this run"
            grid = self.moments[0].grid
            if grid:
                message += f", whose noise levels fall from {grid[0]:.3g} to {grid[-2]:.3g}"
            self.report.warnings.append(f"{message}.")
            warnings.warn(f"{message}.", stacklevel=2)

    # --- one evaluation -------------------------------------------------------------------------

    def _evaluate(self, call: Call, moment: Moment, needed: tuple[Branch, ...]) -> Step:
        """Run the network on the branches that are needed; lay the results out as a Step."""
        x = call.x(self._channels)
        level, next_level = self._levels[self.position] if self._levels else (_UNKNOWN, _UNKNOWN)

        def evaluate(
            branch: Branch,
            x: Tensor | None = None,
            timestep: Any = None,
            level: Level = level,
        ) -> Prediction:
            seen = call.x(self._channels) if x is None else x
            return Prediction(self._network(call, branch, x, timestep), seen, level, self._kind)

        evaluated: dict[Branch, Prediction] = {}
        if set(needed) >= set(self.branches) and len(self.branches) > 1:
            halves = self._network(call, None).chunk(len(self.branches))
            for branch, out in zip(self.branches, halves, strict=True):
                evaluated[branch] = Prediction(out, x, level, self._kind)
        else:
            for branch in needed:
                evaluated[branch] = evaluate(branch)
        return Step(
            **vars(moment),
            stage=self._stage,
            timestep=call.timestep,
            x=x.float(),
            level=level,
            next_level=next_level,
            kind=self._kind,
            evaluate=evaluate,
            evaluated=evaluated,
        )

    @property
    def _channels(self) -> int:
        """Channels of the latent: inpainting networks read more than they predict."""
        config = _denoiser(self.pipe).config
        channels: int = config.get("out_channels") or config["in_channels"]
        return channels

    def _network(
        self, call: Call, branch: Branch | None, x: Tensor | None = None, timestep: Any = None
    ) -> Tensor:
        out = call.evaluate(branch, x, timestep)
        record = self.report.steps[-1]
        record.rows += out.shape[0]
        record.calls += 1
        return out

    def _record(self, step: Step, guided: Prediction) -> None:
        if step.stage == 0:
            record = self.report.steps[-1]
            record.active = guided is not step.evaluated.get("cond")
            record.scale = self.guidance.effective_scale(step, guided, self.state)


class DenoiserHook(ModelHook):
    """Hands every call of the denoiser to the attachment."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.attachment = attachment

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.attachment.denoise(self.fn_ref.original_forward, args, kwargs)


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
_NOT_RUNNING = object()


def _denoiser(pipe: Any) -> Any:
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module) and hasattr(pipe, "scheduler"):
            return module
    raise GuidanceError(
        f"attach: found {type(pipe).__name__}, expected a Diffusers pipeline with a denoiser "
        "(unet or transformer) and a scheduler."
    )


def _branches(pipe: Any) -> tuple[Branch, ...]:
    """The rows of the pipeline's network calls, as its own switch says."""
    try:
        guided = pipe.do_classifier_free_guidance
    except AttributeError as error:
        raise GuidanceError(
            f"{type(pipe).__name__} does not say whether it batches an unconditional prediction "
            "(do_classifier_free_guidance). guidancekit does not support this pipeline."
        ) from error
    return ("uncond", "cond") if guided else ("cond",)


def _guidance_scale(pipe: Any) -> float | None:
    """The scale that the pipeline was called with."""
    scale = getattr(pipe, "_guidance_scale", None)
    return None if scale is None else float(scale)


def _guidance_rescale(pipe: Any) -> float:
    """The pipeline's own rescaling (arXiv:2305.08891), which the engine applies in its place."""
    return float(getattr(pipe, "_guidance_rescale", None) or 0.0)


def _callback_of_running(pipe: Any) -> Any:
    """The `callback_on_step_end` of the call of `pipe` that is under way, or `_NOT_RUNNING`.

    Read from the call stack: pipelines offer no other way to tell, before the first step, whose
    run this is (two pipelines may share a denoiser) and what it was asked for.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return frame.f_locals.get("callback_on_step_end")
        frame = frame.f_back
    return _NOT_RUNNING


def _mentions(callback: Any, guidance: Guidance) -> bool:
    if isinstance(callback, MultiPipelineCallbacks):
        return any(_mentions(inner, guidance) for inner in callback.callbacks)
    return callback is guidance


def _around(
    scheduler: Any, name: str, around: Callable[..., Any], attachment: Attachment
) -> types.MethodType:
    """The scheduler's method `name` with `around` about it, signature included."""
    replaced = vars(scheduler).get(name)

    @functools.wraps(getattr(type(scheduler), name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = replaced or functools.partial(getattr(type(self), name), self)
        return around(original, *args, **kwargs)

    method.attachment = attachment  # type: ignore[attr-defined]
    return types.MethodType(method, scheduler)


def _discard(attachment: Attachment) -> None:
    """The guidance died: take its hooks off, and say so if it never had a run."""
    if attachment.installed and not attachment.used:
        warnings.warn(
            f"{attachment._description} was attached and then discarded before any run. Keep it: "
            "guidance = ....attach(pipe), or with ....attach(pipe) as guidance.",
            stacklevel=2,
        )
    attachment.remove()
