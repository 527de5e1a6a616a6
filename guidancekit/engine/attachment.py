"""The connection between a strategy and a pipeline: what is hooked, and when it comes off.

Two places are hooked, and everything else follows from them: the denoiser's forward (through
diffusers' HookRegistry), which sees every evaluation, and the scheduler's `set_timesteps` and
`step`, which mark the start of a run, the end of each step, and see the latents.
"""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.hooks import HookRegistry, ModelHook

from ..errors import GuidanceError
from .frames import scope_of
from .run import Run, Watch, denoisers, networks

if TYPE_CHECKING:
    from ..guidance import Guidance

_HOOK = "guidancekit"


class Attachment:
    """One guidance on one pipeline. It holds the guidance weakly and comes off when that dies.

    With `once` it serves the run that is under way, and comes off after its last step.
    `watch` is shown every guided prediction; `joined` as in `Guidance.attach`.
    """

    def __init__(
        self,
        guidance: Guidance,
        pipe: Any,
        once: bool = False,
        watch: Watch | None = None,
        joined: bool = False,
    ) -> None:
        self.pipe, self.once, self.watch, self.joined = pipe, once, watch, joined
        self.denoisers = denoisers(pipe)
        self.scheduler: Any = None
        self.installed = True
        self.entered = False
        self.run: Run | None = None
        self.used = False
        self._guidance = weakref.ref(guidance)
        self._description = repr(guidance)
        self._patch_denoisers()
        self._patch_scheduler()
        weakref.finalize(guidance, _discard, self).atexit = False
        if once:
            self._start()

    # --- installing and removing ----------------------------------------------------------------

    def _patch_denoisers(self) -> None:
        """Hook the pipeline's networks."""
        self.denoisers = denoisers(self.pipe)
        self._hooks = [DenoiserHook(self, network) for network in self.denoisers]
        for hook in self._hooks:
            hook.install()

    def _unpatch_denoisers(self) -> None:
        for hook in self._hooks:
            hook.uninstall()

    def _patch_scheduler(self) -> None:
        """Replace the scheduler's methods on the instance (it is not a module, it has no hooks)."""
        self.scheduler = self.pipe.scheduler
        around = {"set_timesteps": self.begin, "step": self.finish_step}
        other = getattr(vars(self.scheduler).get("step"), "attachment", None)
        if other is not None and other.scheduler is self.scheduler:
            other.remove()
        elif other is not None:  # it is a copy of the scheduler that the other one is on
            for name in around:
                vars(self.scheduler).pop(name, None)
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
        if self.entered and self.lost:
            warnings.warn(
                f"The networks and the scheduler of the pipeline were replaced after "
                f"{self._description} was attached: it has not guided what was run since.",
                stacklevel=2,
            )
        self.installed = False
        self.run = None
        self._unpatch_scheduler()
        self._unpatch_denoisers()

    @property
    def lost(self) -> bool:
        """Whether networks and scheduler were all replaced, so that no run can be seen any more."""
        kept = any(network in self.denoisers for network in networks(self.pipe))
        return self.pipe.scheduler is not self.scheduler and not kept

    def __deepcopy__(self, memo: Any) -> Attachment:
        return self  # the pipeline is not copied with one of its networks

    # --- the course of a run --------------------------------------------------------------------

    def begin(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `set_timesteps`: a run of some pipeline starts."""
        result = set_timesteps(*args, **kwargs)
        self._start()
        return result

    def _start(self) -> None:
        guidance = self._guidance()
        scope = scope_of(self.pipe)
        if scope is not None and (
            denoisers(self.pipe) != self.denoisers or any(hook.displaced for hook in self._hooks)
        ):
            self._unpatch_denoisers()
            self._patch_denoisers()
        cut_short = self.run is not None and not self.run.finished
        self.run = None
        if guidance is None or scope is None:
            return
        named = [*_guidances(scope.get("callback_on_step_end"))]
        others = [each for each in named if each is not guidance]
        if cut_short and not self.entered and len(others) == len(named):
            # Outside a block only a call that names the guidance still means it now: perhaps the
            # object is alive only because a traceback holds it.
            self.remove()
            warnings.warn(
                f"{self._description} came off: its last run did not finish. Attach it again, or "
                "use a with block.",
                stacklevel=2,
            )
            return
        self.used = True
        if others:
            raise GuidanceError(
                f"Found {others[0]!r} among the callbacks of a pipeline that {guidance!r} is "
                "attached to, expected one guidance. Add them up, "
                f"({others[0]!r} + {guidance!r}).attach(pipe), or use them one after the other."
            )
        if any(network._compiled_call_impl is not None for network in self.denoisers):
            _hide_from_compiler()
        self.run = Run(guidance, self.pipe, self.watch, self.joined)

    def denoise(
        self,
        network: torch.nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One call of the denoiser by the pipeline."""
        if self.pipe.scheduler is not self.scheduler:
            self._unpatch_scheduler()
            self._patch_scheduler()
            self._start()
        scope = None if self.run is None else scope_of(self.pipe)
        if self.run is None or scope is None:
            return forward(*args, **kwargs)
        return self.run.denoise(network, forward, args, kwargs, scope)

    def finish_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `step`."""
        run = self.run
        if run is None or (run.passes is None and (run.finished or scope_of(self.pipe) is None)):
            return step(*args, **kwargs)
        result = run.finish_step(step, *args, **kwargs)
        if run.finished and self.once:
            self.remove()
        return result


class DenoiserHook(ModelHook):
    """Hands every call of a denoiser to the attachment.

    One that came off passes calls on, because what others have put around it keeps calling it.
    """

    def __init__(self, attachment: Attachment, network: torch.nn.Module) -> None:
        super().__init__()
        self.attachment: Attachment | None = attachment
        self.network = network
        self.caller: Any = network

    # --- installing and removing ----------------------------------------------------------------

    def install(self) -> None:
        """Put the hook on, in the place of another guidance's, and note what it leaves behind."""
        names = vars(self.network)
        found = names.get("_diffusers_hook")
        other = found.get_hook(_HOOK) if isinstance(found, HookRegistry) else None
        if isinstance(other, DenoiserHook):
            other.make_room(self.network)
        self.new = {"forward", "_diffusers_hook"} - names.keys()
        # A registry of its own also for torch.compile's module around another one.
        self.registry = names.setdefault("_diffusers_hook", HookRegistry(self.network))
        self.registry.register_hook(self, _HOOK)
        self.forward = names["forward"]

    def uninstall(self) -> None:
        """Take the hook off, and leave what others have put around it."""
        self.attachment = None
        names, original = vars(self.network), self.fn_ref.original_forward
        found = names.get("forward")
        self.registry.remove_hook(_HOOK, recurse=False)
        if found is not self.forward and names.get("forward") is original:
            names["forward"] = found
            self.new.discard("forward")
            if names.get(_WRAPPED) is self.forward:
                names[_WRAPPED] = original
        if not self.registry.hooks:
            for name in self.new:
                names.pop(name, None)

    @property
    def displaced(self) -> bool:
        """Whether the network's forward was replaced by one that may not lead here, or wrapped.

        Model offloading replaces it at the end of every run.
        """
        hooks = [*self.registry.hooks]
        wrapped = hooks[-1:] == [_HOOK] and vars(self.network).get("forward") is not self.forward
        return wrapped or _HOOK not in hooks

    def make_room(self, network: Any) -> None:
        """For another guidance on `network`, which may be a copy of the one hooked."""
        if self.attachment and any(network is own for own in self.attachment.denoisers):
            self.attachment.remove()
        else:
            network._diffusers_hook.remove_hook(_HOOK, recurse=False)

    # --- called by the network ------------------------------------------------------------------

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.caller = module
        return args, kwargs

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        caller, self.caller = self.caller, self.network
        if caller is not self.network:  # a copy of it, whose hooks still lead here
            return type(caller).forward(caller, *args, **kwargs)
        forward = self.fn_ref.original_forward
        if self.attachment is None:
            return forward(*args, **kwargs)
        return self.attachment.denoise(self.network, forward, args, kwargs)


_WRAPPED = "_old_forward"
"""Where a network keeps the forward that accelerate has wrapped."""


def _hide_from_compiler() -> None:
    """Of a network that was compiled in place, the forward inside the hook is compiled alone.

    What the network's layers call of ours is still compiled with them, taps for example.
    """
    from torch._dynamo import trace_rules

    if not trace_rules.check_file(__file__).skipped:
        here = Path(__file__)
        trace_rules.add(__name__.partition(".")[0])
        trace_rules.get_mod_inlinelist().update(
            path.as_posix() for path in here.parents[1].rglob("*.py") if path != here
        )


def _guidances(callback: Any) -> Iterator[Guidance]:
    """The guidances among the callbacks of a call."""
    from ..guidance import Guidance

    if isinstance(callback, MultiPipelineCallbacks):
        for inner in callback.callbacks:
            yield from _guidances(inner)
    elif isinstance(callback, Guidance):
        yield callback


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
