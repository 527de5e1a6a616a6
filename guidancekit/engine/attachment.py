"""The connection between a strategy and a pipeline: what is hooked, and when it comes off.

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

from .run import Run, denoiser

if TYPE_CHECKING:
    from ..guidance import Guidance

_HOOK = "guidancekit"


class Attachment:
    """One guidance on one pipeline. It holds the guidance weakly and comes off when that dies."""

    def __init__(self, guidance: Guidance, pipe: Any) -> None:
        self.pipe = pipe
        self.denoiser = denoiser(pipe)
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


class DenoiserHook(ModelHook):
    """Hands every call of the denoiser to the attachment."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.attachment = attachment

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.attachment.denoise(self.fn_ref.original_forward, args, kwargs)


_NOT_RUNNING = object()


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
