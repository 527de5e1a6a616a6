"""Guidance: the contract that every strategy fulfils, and how strategies add up."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import Module

from . import schedules
from .errors import GuidanceError
from .parameters import Preset, check, parameters
from .schedules import Schedule, scale_at
from .step import BOTH, COND, Branch, Moment, Prediction, Step
from .tensors import TINY, dot

if TYPE_CHECKING:
    from .engine import Attachment, Report, Watch

_LIVE = ("_attachment", "_report", "_loaded")  # what copies of a guidance do not carry

State = SimpleNamespace
"""What a strategy remembers within one run; the engine hands out an empty one at each start."""


Demand = Literal["any", "one step", "first order", "flow", "renoising"]
"""A scheduler's step that reads nothing of earlier ones; that is a straight line as well; that
follows the ODE of a flow model with one evaluation; or whose latent may be edited afterwards, on
the way to the clean latent or, by DDIM, back to noise."""


class Guidance(PipelineCallback):
    """A guidance strategy: one rule that turns predictions into the guided prediction.

    Subclasses state `name`, `paper` and `presets`, declare their parameters in the constructor's
    signature (which validates and records them), and implement `guide`. Everything about pipelines
    is the engine's business.
    """

    config_name = "guidance_config.json"

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Preset]] = {}
    edits_latents: ClassVar[bool] = False
    """Whether `after_step` moves the latents, which not every scheduler tolerates."""
    solver: ClassVar[Demand] = "any"
    """What it asks of the scheduler's step; schedulers that do not give it are refused."""
    evaluates: ClassVar[tuple[Branch, ...]] = ()
    """Branches that it evaluates by itself, at other points than those of `needs`."""
    joins: ClassVar[bool] = False
    """Whether its further pass, asked for before `step.cond`, may join the pass of the branches."""

    @register_to_config
    def __init__(self) -> None:
        pass

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = register_to_config(cls.__init__)  # type: ignore[method-assign]

    # --- what a strategy implements -------------------------------------------------------------

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        """The branches that this step uses; the others are not computed."""
        return BOTH

    def acts(self, moment: Moment, state: State) -> bool:
        """Whether this step is guided at all; a schedule under which none is deserves a warning."""
        return self.needs(moment, state) != COND

    def condition(
        self, step: Step, branch: Branch, given: dict[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        """What a branch is conditioned on in this step: `given`, or altered tensors [B, ...]."""
        return given

    def before_step(self, step: Step, state: State) -> Tensor:
        """The latent that this step starts from: `step.x`, or another in its place."""
        return step.x

    def during(self, step: Step, state: State) -> AbstractContextManager[None]:
        """A context around every evaluation of this step."""
        return nullcontext()

    def evaluate(self, step: Step, state: State) -> None:
        """Evaluate the branches that this step needs, into `step.evaluated`."""
        for branch, out in step.gather(dict.fromkeys(step.needed)).items():
            step.evaluated[branch] = step.predict(out=out)

    def guide(self, step: Step, state: State) -> Prediction:
        """The guided prediction of one evaluation, per sample, in float32."""
        raise NotImplementedError

    def after_step(self, step: Step, latents: Tensor, state: State) -> Tensor:
        """The latents after the scheduler's step, [B, ...] in the scheduler's scale and dtype."""
        return latents

    def effective_scale(self, step: Step, guided: Prediction, state: State) -> Tensor | float:
        """How far along cond - uncond the guided prediction lies: exactly w for CFG; shape [B].

        <guided - uncond, cond - uncond> / ||cond - uncond||^2 per sample, the same in every space;
        1 where the unconditional prediction was not used, 0 where nothing else was.
        """
        if "uncond" not in step.evaluated or "cond" not in step.evaluated:
            return float("cond" in step.evaluated)
        difference = step.cond.out - step.uncond.out
        along = dot(guided.out - step.uncond.out, difference)
        return (along / dot(difference, difference).clamp_min(TINY)).flatten()

    @property
    def inside(self) -> bool:
        """Whether it changes or reads what happens inside the network while that runs."""
        return type(self).during is not Guidance.during

    @property
    def scheduled(self) -> bool:
        """Whether a schedule decides when this guidance acts."""
        return any(isinstance(value, Schedule) for value in vars(self).values())

    # --- what a user calls ----------------------------------------------------------------------

    def attach(self, pipe: Any, watch: Watch | None = None, joined: bool = False) -> Guidance:
        """Install this guidance on a Diffusers pipeline, and return it.

        It acts in every call of `pipe` until it comes off: at the end of a ``with`` block, on
        `detach`, when another guidance is attached to the same pipeline, or when the object dies
        (the pipeline holds it weakly). ``watch(step, guided)`` is called after every evaluation of
        the guidance, with the `Step` and the guided `Prediction`, to look on; what it raises ends
        the run. ``joined`` lets the further pass of PAG, SEG, SLG, ICG or TSG join the batch of the
        pass before it, where the pipeline has one for all branches: the same rows in fewer calls,
        for more memory at once. Raises `GuidanceError` for an object it cannot work on.
        """
        from .engine import Attachment

        self.detach()
        self._attachment: Attachment | None = Attachment(self, pipe, watch=watch, joined=joined)
        return self

    def detach(self) -> None:
        """Take this guidance off; the pipeline is left exactly as it was found."""
        if self.attachment is not None:
            self.attachment.remove()
            self._attachment = None

    def report(self) -> Report:
        """What the last guided run did: network rows per step, active steps, effective scale."""
        report: Report | None = vars(self).get("_report")
        if report is None:
            raise GuidanceError(
                "There is no run to report on yet: attach the guidance and call the pipeline first."
            )
        return report

    @classmethod
    def preset(cls, family: str, **changes: Any) -> Guidance:
        """The method with the published settings for a model family, such as ``"sdxl"``."""
        if family not in cls.presets:
            known = ", ".join(sorted(cls.presets)) or "none"
            raise GuidanceError(
                f"{cls.__name__} has no published settings for {family!r}. Published: {known}. "
                f"Give the parameters yourself: {cls.__name__}(...)."
            )
        make: Any = cls
        return make(**{**cls.presets[family].values, **changes})

    def __enter__(self) -> Guidance:
        self._require_attachment().entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __add__(self, other: Guidance) -> Guidance:
        from .composition import Sum

        if not isinstance(other, Guidance):
            return NotImplemented
        return Sum([self, other])

    # --- a diffusers callback and config --------------------------------------------------------

    @property
    def attachment(self) -> Attachment | None:
        """The live connection to a pipeline, if there is one."""
        attachment: Attachment | None = vars(self).get("_attachment")
        return attachment if attachment is not None and attachment.installed else None

    @property
    def tensor_inputs(self) -> list[str]:
        """None: the engine sees the latents at the scheduler, the callback changes nothing."""
        return []

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        self._require_attachment(pipeline)
        return callback_kwargs

    def _require_attachment(self, pipeline: Any = None) -> Attachment:
        attachment = self.attachment
        elsewhere = attachment is not None and (attachment.pipe is not pipeline or attachment.lost)
        if attachment is None or (pipeline is not None and elsewhere):
            raise GuidanceError(
                f"{self.name or type(self).__name__} guidance was used without being attached to "
                "this pipeline, so it has not guided it. Write: "
                f"pipe(prompt, callback_on_step_end={self!r}.attach(pipe))"
            )
        return attachment

    def register_to_config(self, **kwargs: Any) -> None:
        """Validate the constructor's arguments and record them as plain, serialisable values."""
        check(type(self), kwargs)
        super().register_to_config(**{key: _plain(value) for key, value in kwargs.items()})

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """Rebuild a guidance; on the base class `Guidance`, the class that the config names."""
        named = config.get("_class_name") if isinstance(config, Mapping) else None
        if cls is Guidance and named is not None:
            return _strategy(named).from_config(config, **kwargs)
        return super().from_config(config, **kwargs)

    def __repr__(self) -> str:
        """The shortest call that makes this guidance; `guidancekit.parse` reads it back."""
        given = [
            f"{parameter.name}={_shown(live(self.config[parameter.name]))}"
            for parameter in parameters(type(self))
            if self.config[parameter.name] != _plain(parameter.default)
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def to_json_string(self) -> str:
        try:
            text: str = super().to_json_string()
        except TypeError as error:
            raise GuidanceError(
                f"{self!r} holds an object that a file cannot: save a network to a folder of its "
                "own and give the folder's name instead; a function cannot be saved."
            ) from error
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guidance) and repr(self) == repr(other)

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the settings, not the connection to a pipeline."""
        return {k: v for k, v in vars(self).items() if k not in _LIVE}


class ClassifierFree(Guidance):
    """A rule along cond - uncond with a scale w; w = 1 is the conditional prediction itself."""

    scale: schedules.Scale

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND if scale_at(self.scale, moment) == 1 else BOTH


class Companion(ClassifierFree):
    """Acts elsewhere than on the prediction, which plain classifier-free guidance makes.

    With a scale of None it guides at the pipeline's scale when it is alone; in a sum it then leaves
    the guiding to the other terms.
    """

    def guide(self, step: Step, state: State) -> Prediction:
        return step.cfg(scale_at(self.scale, step))


def _shown(value: Any) -> str:
    """A value in one line, networks too."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(each)}" for key, each in value.items()) + "}"
    return object.__repr__(value) if isinstance(value, Module) else repr(value)


def _plain(value: Any) -> Any:
    """A constructor argument as JSON values."""
    if isinstance(value, Guidance):
        own = {name: value.config[name] for name in inspect.signature(type(value)).parameters}
        return {"_class_name": type(value).__name__, **own}
    if isinstance(value, Schedule):
        return value.to_config()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def live(value: Any) -> Any:
    """The object that a value of a config stands for."""
    if isinstance(value, Mapping) and "_class_name" in value:
        return Guidance.from_config(value)
    is_schedule = isinstance(value, Mapping) and "schedule" in value
    return schedules.from_config(value) if is_schedule else value


def _strategy(class_name: str) -> type[Guidance]:
    from .composition import COMPOSITIONS
    from .registry import methods

    strategies: list[type[Guidance]] = [*COMPOSITIONS, *methods().values()]
    for method in strategies:
        if method.__name__ == class_name:
            return method
    raise GuidanceError(f"found guidance class {class_name!r}, which guidancekit does not have.")
