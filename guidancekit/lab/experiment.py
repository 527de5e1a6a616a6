"""Runs of the laboratory: many pictures per setting, kept in files, shared by processes."""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from .. import bundled
from ..engine import Watch
from ..engine.report import Report
from ..errors import GuidanceError
from ..files import written_whole
from ..generate import arguments, refusals, warm_up, with_scale
from ..loading import default_scale, load_pipeline
from ..recipe import Recipe, installed_versions
from ..registry import parse
from ..series import Process
from ..step import Prediction, Step
from ..trace import Trace
from .metrics import Array
from .scenes import truth


@dataclass(frozen=True)
class Arm:
    """One setting: `method` as it was asked for, at `scale`, and the recipe of all its pictures.

    That recipe's prompt and seed mean nothing. `scale` is None where the method has its own.
    """

    method: str
    scale: float | None
    recipe: Recipe

    @property
    def label(self) -> str:
        """The method and the scale."""
        return self.method if self.scale is None else f"{self.method} {self.scale:g}"


def arm(base: Recipe, method: str, scale: float | None = None) -> Arm:
    """`method` at `scale`, with the presets for the model; see `with_scale`."""
    guidance, given = with_scale(method, scale, family=bundled.family(base.model))
    given = default_scale(base.model) if given is None else given
    return Arm(method, scale, replace(base, guidance=guidance, guidance_scale=given))


class Ask(NamedTuple):
    """What a picture was asked to be: the number of its prompt, the prompt, its seed."""

    number: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Questions:
    """The prompts that every arm is asked, each with `seeds` seeds, in calls of `batch` pictures.

    The starting noise depends on the prompt's number and the seed alone, so all arms share it.
    `first_seed` gives fresh noise. With `inverted` it is not drawn: each picture starts from a true
    one of its prompt, which the method itself has led to noise (DDIM inversion), and should come
    back to that.
    """

    prompts: tuple[str, ...]
    seeds: int
    batch: int = 64
    negative: str = ""
    first_seed: int = 0
    inverted: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise GuidanceError("there are no prompts: give at least one.")
        for name in ("seeds", "batch"):
            if getattr(self, name) < 1:
                raise GuidanceError(f"{name}: found {getattr(self, name)}, expected at least 1.")

    @property
    def asks(self) -> list[Ask]:
        """One per picture."""
        return [
            Ask(number, prompt, 100_000 * number + self.first_seed + seed)
            for number, prompt in enumerate(self.prompts)
            for seed in range(self.seeds)
        ]

    @property
    def batches(self) -> list[list[Ask]]:
        """The pictures of one call each: the same whoever makes them, down to the last bit."""
        asks = self.asks
        return [asks[i : i + self.batch] for i in range(0, len(asks), self.batch)]


@dataclass(frozen=True)
class Call:
    """One call of the pipeline that is asked for, and the file its pictures go to."""

    path: Path
    arm: Arm
    asks: tuple[Ask, ...]
    negative: str
    inverted: bool


def calls(out: Path, arms: Iterable[Arm], questions: Questions) -> list[Call]:
    """The calls that arms take. Equal settings have equal files, whatever else is asked."""
    made = {}
    for each in arms:
        recipe = replace(each.recipe, device="cpu", versions={}, seed=0, prompt="-").to_json()
        words = re.sub(r"[^a-z0-9]+", "-", each.recipe.guidance.lower()).strip("-")[:40]
        for asks in questions.batches:
            text = f"{recipe}\n{asks}\n{questions.negative}" + "\ninverted" * questions.inverted
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            path = out / "runs" / f"{each.recipe.model.rpartition('/')[2]}-{words}-{key}.npz"
            made[path] = Call(path, each, tuple(asks), questions.negative, questions.inverted)
    return list(made.values())


@dataclass(frozen=True)
class Sample:
    """The finished pictures of an arm.

    `pictures` (n, H, W, 3) uint8, `number` (n,) the prompts' numbers, `effective_scale`,
    `latent_std` and `latent_mean` (n,), the latter two of the last predicted clean latent: its
    standard deviation, and the root mean square of its channels' means. `steps` has one row per
    step: noise level, and means over all pictures of the effective scale, and of difference and
    cosine (`TracePoint`; no cosine for methods that act after the scheduler's step). Steps that are
    `brief` have no effective scale, and no part in the mean.
    `originals` are the pictures that were inverted, as the autoencoder leaves them, if so.
    """

    pictures: Array
    number: Array
    effective_scale: Array
    latent_std: Array
    latent_mean: Array
    steps: Array
    rows: float
    """Network rows per picture."""
    seconds: float
    """Per picture, in calls of the given batch size."""
    memory: float
    """Highest memory of the graphics card in bytes; NaN elsewhere."""
    originals: Array | None = None


def run(
    todo: Sequence[Call], process: Process, tell: Callable[[Call], None] = lambda call: None
) -> None:
    """Make the calls whose file is not there yet, as far as they are this process's.

    `tell` is called after each. A file appears whole or not at all, so a broken run goes on where
    it was. What a pipeline refuses does not stop the others; see `refusal`.
    """
    pipe, loaded = None, None
    refused: set[str] = set()
    mine = {path for path, _ in process.share([(call.path, call.arm.recipe) for call in todo])}
    for call in todo:
        recipe = call.arm.recipe
        if call.path not in mine or call.path.exists():
            continue
        if recipe.to_json() not in refused:  # else it would refuse the other calls too
            if loaded != (recipe.model, recipe.scheduler, recipe.dtype):
                pipe = None  # let go of the last model before the next is loaded
                pipe = load_pipeline(recipe, process.device)
                loaded = (recipe.model, recipe.scheduler, recipe.dtype)
                warm_up(pipe, recipe)
            try:
                result = make(pipe, call)
            except GuidanceError as error:
                refused.add(recipe.to_json())
                with written_whole(_note(call)) as file:
                    file.write(str(error).encode())
            else:
                with written_whole(call.path) as file:
                    np.savez_compressed(file, **result)
                _note(call).unlink(missing_ok=True)
        tell(call)


def refusal(todo: Sequence[Call]) -> str | None:
    """Why calls of one arm could not be made, if so."""
    notes = [_note(call) for call in todo if not call.path.exists() and _note(call).exists()]
    return notes[0].read_text() if notes else None


def _note(call: Call) -> Path:
    return call.path.with_suffix(".refused")


def make(pipe: Any, call: Call) -> dict[str, Any]:
    """One call of the pipeline, as arrays; see `read`."""
    recipe = call.arm.recipe
    trace, latents = Trace(), _LastLatent()
    asked = [(ask.prompt, ask.seed) for ask in call.asks]
    given = arguments(pipe, replace(recipe, negative=call.negative), asked)
    given["output_type"] = "np"
    originals = {}
    if call.inverted:
        pictures, given["latents"] = invert(pipe, call, given)
        originals["originals"] = pictures
    if cuda := str(pipe.device).startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with (
        warnings.catch_warnings(),
        parse(recipe.guidance).attach(pipe, watch=_both(trace, latents)) as guidance,
    ):
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        with refusals(pipe):
            pictures = pipe(**given).images
        seconds = time.perf_counter() - started
        report = guidance.report()
    scale = report.mean_scale.expand(len(call.asks))
    facts = {
        "recipe": asdict(recipe),
        "negative": call.negative,
        "prompts": given["prompt"],
        "seeds": [ask.seed for ask in call.asks],
        "rows": report.rows,
        "seconds": seconds,
        "memory": torch.cuda.max_memory_allocated() if cuda else None,
        "versions": installed_versions(),
    }
    return {
        "pictures": _bytes(pictures),
        **originals,
        "number": np.array([ask.number for ask in call.asks]),
        "effective_scale": scale.numpy(),
        "latent_std": latents.std.cpu().numpy(),
        "latent_mean": latents.mean.cpu().numpy(),
        "steps": _steps(trace, report),
        "facts": np.array(json.dumps(facts)),
    }


def invert(pipe: Any, call: Call, given: Mapping[str, Any]) -> tuple[Array, torch.Tensor]:
    """True pictures of what is asked for, as the autoencoder leaves them, and noise behind them.

    That is where the scheduler's steps lead the other way round, under the guidance of the call.
    Raises `GuidanceError` for schedulers other than DDIM and flow Euler.
    """
    backwards = inverse(pipe.scheduler)
    drawn = [truth(ask.prompt, 1, (ask.seed,)) for ask in call.asks]
    pixels = pipe.image_processor.preprocess(np.concatenate(drawn).astype(np.float32) / 255)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latents
        decoded = pipe.vae.decode(latents).sample
    forwards = pipe.scheduler
    try:
        pipe.scheduler = backwards
        with (
            warnings.catch_warnings(),
            parse(call.arm.recipe.guidance).attach(pipe),
            refusals(pipe),
        ):
            warnings.simplefilter("ignore")
            noise = pipe(**{**given, "output_type": "latent"}, latents=latents).images
    finally:
        pipe.scheduler = forwards
    return _bytes(pipe.image_processor.postprocess(decoded, "np")), noise


class FlowInversion(FlowMatchEulerDiscreteScheduler):
    """Flow Euler from the picture to noise, over the same noise levels."""

    sigmas: torch.Tensor

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas.flip(0)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


def inverse(scheduler: Any) -> SchedulerMixin:
    """The scheduler that goes the other way; raises `GuidanceError` where there is none."""
    kinds = {DDIMScheduler: DDIMInverseScheduler, FlowMatchEulerDiscreteScheduler: FlowInversion}
    for kind, backwards in kinds.items():
        if isinstance(scheduler, kind):
            made: SchedulerMixin = backwards.from_config(scheduler.config)
            return made
    raise GuidanceError(
        f"inversion: found {type(scheduler).__name__}, expected DDIMScheduler or "
        "FlowMatchEulerDiscreteScheduler."
    )


def _steps(trace: Trace, report: Report) -> Array:
    """Those of a `Sample`, [steps, 4]."""
    scales = {
        step.index: np.nan if skipped else step.effective_scale
        for step, skipped in zip(report.steps, report.brief, strict=True)
    }
    return np.array([[p.noise, scales[p.index], p.difference, p.cosine] for p in trace.points])


def _bytes(pictures: Any) -> Array:
    return np.rint(np.asarray(pictures) * 255).astype(np.uint8)


def read(todo: Sequence[Call]) -> Sample | None:
    """The pictures of the calls of one arm, which must all be there; None if one is missing."""
    if not todo or not all(call.path.exists() for call in todo):
        return None
    parts = []
    for call in todo:
        try:
            with np.load(call.path, allow_pickle=False) as file:
                parts.append({name: file[name] for name in file.files})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise GuidanceError(
                f"{call.path} is damaged ({error}): delete it, and run the same command again."
            ) from error
    facts = [json.loads(str(part["facts"])) for part in parts]
    counts = np.array([len(part["number"]) for part in parts])

    def joined(name: str) -> Array:
        return np.concatenate([part[name] for part in parts])

    def total(name: str) -> float:
        return float(sum(fact[name] for fact in facts))

    return Sample(
        joined("pictures"),
        joined("number"),
        joined("effective_scale"),
        joined("latent_std"),
        joined("latent_mean"),
        np.average([part["steps"] for part in parts], axis=0, weights=counts),
        total("rows") / counts.sum(),
        total("seconds") / counts.sum(),
        float(max(fact["memory"] or np.nan for fact in facts)),
        joined("originals") if "originals" in parts[0] else None,
    )


class _LastLatent:
    """Watches a run for what the clean latent that it ends with has drifted to; see `Sample`."""

    def __call__(self, step: Step, guided: Prediction) -> None:
        if step.index == step.total - 1:
            clean = guided.x0
            self.std = clean.flatten(1).std(dim=1)
            self.mean = clean.flatten(2).mean(2).square().mean(1).sqrt()


def _both(*watches: Watch) -> Watch:
    def look(step: Step, guided: Prediction) -> None:
        for watch in watches:
            watch(step, guided)

    return look
