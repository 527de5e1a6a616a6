"""One run of a guided pipeline: the position, the state, the evaluations and the report."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..step import Branch, Level, Moment, Prediction, Step
from ..tensors import match_std
from . import noise
from .call import Call
from .layers import around, rows_of, tapped
from .report import Report, StepRecord

if TYPE_CHECKING:
    from ..guidance import Guidance


def denoiser(pipe: Any) -> Any:
    """The network of a pipeline; raises `GuidanceError` for an object that has none."""
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module) and hasattr(pipe, "scheduler"):
            return module
    raise GuidanceError(
        f"attach: found {type(pipe).__name__}, expected a Diffusers pipeline with a denoiser "
        "(unet or transformer) and a scheduler."
    )


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
    latents = x0 / config.scaling_factor
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        std, mean = (
            torch.tensor(config[name], device=x0.device).view(1, -1, 1, 1)
            for name in ("latents_std", "latents_mean")
        )
        latents = latents * std + mean
    latents = latents + (config.get("shift_factor") or 0.0)
    dtype = vae.dtype
    overflows = dtype == torch.float16 and config.get("force_upcast", False)  # SDXL's
    try:
        if overflows:
            vae.to(torch.float32)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    finally:
        vae.to(dtype)
    return (images.float() / 2 + 0.5).clamp(0, 1)


class Run:
    """One call of the pipeline: the state, the position and the report."""

    def __init__(self, guidance: Guidance, pipe: Any) -> None:
        self._guidance = weakref.ref(guidance)
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.state = SimpleNamespace()
        self.moments: list[Moment] = []
        self.finished = False
        self.position = -1  # index into scheduler.timesteps, known from the first call on
        self.first = 0
        self.call: Call | None = None
        self.step: Step | None = None
        self.guided: Tensor | None = None
        self.branches: tuple[Branch, ...] = ("cond",)
        self.evaluating: tuple[Branch, ...] = ()
        self.encoded: dict[str, dict[str, Tensor]] = {}
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
        """One call of the denoiser by the pipeline, answered with the guided prediction."""
        if self.finished or self.call is not None:
            raise GuidanceError(
                f"{type(self.pipe).__name__} evaluates its network more than once per step, in a "
                "way that guidancekit does not know."
            )
        first_call = self.position < 0
        if first_call:
            self.branches = _branches(self.pipe)
        self.call = call = Call(forward, args, kwargs, self.branches)
        if first_call:
            self._locate(call.timestep)
            self._check_before_first_step()
        guidance, state, step = self.guidance, self.state, self._step(call)
        if step.index == len(self.report.steps):
            self.report.steps.append(StepRecord(step.index, step.nsr if step.grid else None))
        self._condition(step)
        x = step.x
        step.x = guidance.before_step(step, state)
        if step.x is not x:
            self.call = self.call.with_latent(step.x)
        step.needed = guidance.needs(step, state)
        acts = guidance.acts(step, state)
        with guidance.during(step, state):
            self._evaluate(step)
            guided = guidance.guide(step, state)
        if step.stage == 0:
            record = self.report.steps[-1]
            record.active = acts
            record.scale = guidance.effective_scale(step, guided, state)
        out = guided.out
        if len(self.branches) > 1 and step.evaluated and _guidance_rescale(self.pipe):
            out = match_std(out, step.cond.out, _guidance_rescale(self.pipe))
        self.step, self.guided = step, out.to(call.sample.dtype)
        # Once per run a known offset between the branches shows what the pipeline does with them.
        offset = 0 if self.verified else 1
        return self.call.answer(cond=self.guided + offset, uncond=self.guided)

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
        if self.call is not None and self.call.moved:
            sample = (self.step.level.scale * self.step.x).to(sample.dtype)
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
            self.state = SimpleNamespace()
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
        starting = times[begin :: self._order]
        self.moments = [Moment(i, total, grid, scale, time=starting[i]) for i in range(total)]

    @property
    def _order(self) -> int:
        """Network evaluations per solver step."""
        order: int = getattr(self.scheduler, "order", 1)
        return order

    def _check_before_first_step(self) -> None:
        """Refuse what cannot work, and say what would do nothing, before any work is lost."""
        guidance = self.guidance
        if guidance.edits_latents and not noise.correctable(self.scheduler):
            raise GuidanceError(
                f"{guidance!r} corrects the latents after each step, which "
                f"{type(self.scheduler).__name__} does not allow: it keeps samples of its own. "
                "Use DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, "
                "DPMSolverMultistepScheduler or FlowMatchEulerDiscreteScheduler."
            )
        if guidance.first_order and not noise.first_order(self.scheduler):
            raise GuidanceError(
                f"{guidance!r} needs a first-order deterministic step, which "
                f"{type(self.scheduler).__name__} does not take. Use DDIMScheduler, "
                "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler."
            )
        planned = SimpleNamespace()
        needs = [guidance.evaluates, *(guidance.needs(each, planned) for each in self.moments)]
        if any("uncond" in needed for needed in needs) and "uncond" not in self.branches:
            raise GuidanceError(
                f"{guidance!r} needs the unconditional prediction, but "
                f"{type(self.pipe).__name__} was called without it (guidance_scale = "
                f"{_guidance_scale(self.pipe)}). Call the pipeline with a guidance_scale above 1, "
                "for example guidance_scale=5; the scale of the strategy is the one that counts."
            )
        acts = [guidance.acts(moment, planned) for moment in self.moments]
        if guidance.scheduled and not any(acts):
            message = f"{guidance!r} guides none of the {len(acts)} steps of this run"
            grid = self.moments[0].grid
            if grid:
                message += f", whose noise levels fall from {grid[0]:.3g} to {grid[-2]:.3g}"
            self._warn(f"{message}.")

    def _warn(self, message: str) -> None:
        if message not in self.report.warnings:
            self.report.warnings.append(message)
            warnings.warn(message, stacklevel=2)

    # --- one evaluation -------------------------------------------------------------------------

    def _step(self, call: Call) -> Step:
        """This step as a strategy sees it; nothing is evaluated yet."""
        level, next_level = self._levels[self.position] if self._levels else (_UNKNOWN, _UNKNOWN)
        following = self.position + 1
        times = self.scheduler.timesteps
        return Step(
            **vars(self.moments[(self.position - self.first) // self._order]),
            stage=(self.position - self.first) % self._order,
            timestep=call.timestep,
            next_timestep=times[following] if following < len(times) else None,
            x=call.x(self._channels).float(),
            level=level,
            next_level=next_level,
            kind=self._kind,
            evaluate=functools.partial(self._evaluate_branch, level),
            conditions=call.conditions,
            attention=functools.partial(
                tapped,
                self._denoiser,
                (call.sample.shape[-2], call.sample.shape[-1]),
                lambda: self.evaluating,
            ),
            around=functools.partial(around, self._denoiser),
            rows=lambda branch, count: rows_of(self.evaluating, branch, count),
            encode=self._encode,
            warn=self._warn,
            decode=functools.partial(decode, self.pipe),
            needed=(),
            evaluated={},
        )

    def _condition(self, step: Step) -> None:
        """Let the strategy alter what the branches are conditioned on."""
        assert self.call is not None
        changed = {
            branch: altered
            for branch in self.branches
            if (given := self.call.conditions(branch))
            and (altered := self.guidance.condition(step, branch, given, self.state)) is not given
        }
        if changed:
            self.call = self.call.with_conditions(changed)

    def _evaluate(self, step: Step) -> None:
        """Run the network on the branches that are needed, in one batch where they are all."""
        if set(step.needed) >= set(self.branches) and len(self.branches) > 1:
            halves = self._network().chunk(len(self.branches))
            for branch, out in zip(self.branches, halves, strict=True):
                step.evaluated[branch] = step.predict(out=out)
        else:
            for branch in step.needed:
                step.evaluated[branch] = step.evaluate(branch)

    def _evaluate_branch(
        self,
        now: Level,
        branch: Branch,
        x: Tensor | None = None,
        timestep: Any = None,
        level: Level | None = None,
        **changes: Any,
    ) -> Prediction:
        assert self.call is not None
        seen = self.call.x(self._channels) if x is None else x
        out = self._network(branch, x=x, timestep=timestep, **changes)
        return Prediction(out, seen, level or now, self._kind)

    def _network(self, branch: Branch | None = None, **changes: Any) -> Tensor:
        assert self.call is not None
        self.evaluating = self.branches if branch is None else (branch,)
        out = self.call.evaluate(branch, **changes)
        record = self.report.steps[-1]
        record.rows += out.shape[0]
        record.calls += 1
        return out

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """What a prompt conditions the network on, [1, ...] by argument name; once per run."""
        if prompt not in self.encoded:
            encode = getattr(self.pipe, "encode_prompt", None)
            if encode is None or getattr(self.pipe, "tokenizer", None) is None:
                raise GuidanceError(
                    f"{type(self.pipe).__name__} cannot encode {prompt!r} here: it was loaded "
                    "without its text encoder. Call it with a negative prompt and guidance_scale "
                    "above 1 instead."
                )
            device = self.scheduler.timesteps.device
            encoded = encode(
                prompt=prompt,
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            self.encoded[prompt] = {"encoder_hidden_states": encoded[0]}
            if len(encoded) == 4:  # SDXL and SD3: pooled embeddings too
                name = "pooled_projections" if hasattr(self.pipe, "transformer") else "text_embeds"
                self.encoded[prompt][name] = encoded[2]
        return self.encoded[prompt]

    @property
    def _denoiser(self) -> Any:
        return denoiser(self.pipe)

    @property
    def _channels(self) -> int:
        """Channels of the latent: inpainting networks read more than they predict."""
        config = self._denoiser.config
        channels: int = config.get("out_channels") or config["in_channels"]
        return channels


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
