"""From recipes to pictures: run a pipeline under a guidance, and count what it cost."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from . import bundled
from .composition import SideBySide, Sum
from .engine import Watch
from .errors import GuidanceError
from .guidance import Guidance
from .loading import first_line
from .parameters import parameters
from .recipe import Recipe, installed_versions
from .registry import create, parse
from .schedules import Schedule


@dataclass(frozen=True)
class Picture:
    """One finished picture and what it cost.

    `evaluations` counts the samples that went through the network, `seconds` is the time of the
    pipeline call, and `effective_scale` has one CFG-equivalent scale per step; those of steps that
    are `brief` (`Report.brief`) say nothing, and have no part in `mean_scale`.
    """

    image: Image.Image
    recipe: Recipe
    evaluations: int
    seconds: float
    effective_scale: list[float]
    brief: list[bool]
    warnings: list[str]

    @property
    def mean_scale(self) -> float:
        """The effective scale of the run."""
        steps = zip(self.effective_scale, self.brief, strict=True)
        return fmean(scale for scale, skipped in steps if not skipped)

    def to_dict(self) -> dict[str, Any]:
        """All but the image, as JSON values."""
        return {
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 3),
            "effective_scale": self.effective_scale,
            "mean_scale": round(self.mean_scale, 4),
            "warnings": self.warnings,
            "recipe": asdict(self.recipe),
        }


def with_scale(
    method: str,
    scale: float | None,
    values: Mapping[str, Any] | None = None,
    family: str | None = None,
) -> tuple[str, float | None]:
    """The guidance `method` at CFG scale `scale`: its text, and the pipeline's `guidance_scale`.

    `method` is a registry name, to which `values` are given, or a text such as ``apg(eta=0.5)``;
    what is left open is taken from the preset for the model `family`, if there is one.
    Methods whose scale is None read the pipeline's, which has an unconditional branch above 1
    only. Scales up to 1 therefore, and those of methods that are not CFG, go to the method's own
    `scale` if it has one.
    Raises `GuidanceError` for unknown methods and unfit values.
    """
    values = values or {}
    is_text = "(" in method or " + " in method
    if is_text and values:
        raise GuidanceError(f"write all parameters inside {method!r}.")
    guidance = parse(method, family) if is_text else create(method, family, **values)
    if scale is None or (scale > 1 and follows_pipeline(guidance)):
        return repr(guidance), scale
    has_scale = any(parameter.name == "scale" for parameter in parameters(type(guidance)))
    if has_scale and not is_text and "scale" not in values:
        return repr(create(method, family, **{**values, "scale": scale})), None
    if scale == 1 and follows_pipeline(guidance):
        return repr(guidance), scale  # no guidance, and no unconditional branch to miss
    raise GuidanceError(
        f"scale: found {scale:g}, but {guidance!r} cannot take it from outside: "
        "give the scale among its parameters."
    )


def follows_pipeline(value: Any) -> bool:
    """Whether a guidance or schedule takes a scale from the pipeline's `guidance_scale`."""
    if isinstance(value, Sum):
        return any(follows_pipeline(term) for term in value.terms)
    if not isinstance(value, (Guidance, Schedule)):
        return False
    scales = [getattr(value, p.name) for p in parameters(type(value)) if p.kind == "scale"]
    return any(scale is None or follows_pipeline(scale) for scale in scales)


def run(pipe: Any, recipe: Recipe, watch: Watch | None = None) -> Picture:
    """Make the one picture of `recipe` with `pipe`, which `load_pipeline` has loaded for it.

    Every picture is a pipeline call of its own, from its own generator on the CPU: batch size and
    neighbours never change a pixel. `watch` as in `Guidance.attach`.
    Raises `GuidanceError` for what the pipeline cannot do.
    """
    given = arguments(pipe, recipe)
    with parse(recipe.guidance).attach(pipe, watch) as guidance:
        started = time.perf_counter()
        with refusals(pipe):
            image = pipe(**given).images[0]
        seconds = time.perf_counter() - started
        report = guidance.report()
    made = _made(pipe, replace(recipe, guidance=repr(guidance)), given, image)
    scales = [round(scale, 4) for scale in report.effective_scale]
    notes = list(report.warnings)
    return Picture(image, made, report.rows, seconds, scales, report.brief, notes)


def run_together(pipe: Any, recipes: Sequence[Recipe]) -> list[Picture]:
    """The pictures of recipes that differ in their guidance alone, in one pipeline call.

    Each is the picture of a call of its own, up to rounding; `seconds` is its share of the call.
    """
    count, given = len(recipes), arguments(pipe, recipes[0])
    given["num_images_per_prompt"] = count
    given["generator"] = generators(each.seed for each in recipes)
    _check_arguments(pipe, given)
    guidance = SideBySide([parse(recipe.guidance) for recipe in recipes])
    with guidance.attach(pipe):
        started = time.perf_counter()
        with refusals(pipe):
            images = pipe(**given).images
        seconds = time.perf_counter() - started
        report = guidance.report()
    scales = torch.stack([torch.as_tensor(step.scale).cpu() for step in report.steps], dim=1)
    return [
        Picture(
            image,
            _made(pipe, replace(recipe, guidance=repr(term)), given, image),
            evaluations,
            seconds / count,
            [round(scale, 4) for scale in own.tolist()],
            report.brief,
            list(report.warnings),
        )
        for recipe, term, image, evaluations, own in zip(
            recipes, guidance.terms, images, guidance.evaluations, scales, strict=True
        )
    ]


def _made(pipe: Any, recipe: Recipe, given: Mapping[str, Any], image: Image.Image) -> Recipe:
    """The recipe with what was left open when it was run."""
    name = scale_name(pipe)
    return replace(
        recipe,
        guidance_scale=given.get(name, _accepted(pipe)[name].default),
        size=image.size,
        device=pipe.device.type,
        versions=installed_versions(),
    )


@contextmanager
def refusals(pipe: Any) -> Iterator[None]:
    """Raise `GuidanceError` for what a pipeline refuses inside."""
    try:
        yield
    except GuidanceError:
        raise
    except (ValueError, torch.OutOfMemoryError) as error:  # diffusers checks its arguments
        raise GuidanceError(
            f"{type(pipe).__name__} refused the run: {first_line(error)}"
        ) from error


def warm_up(pipe: Any, recipe: Recipe) -> None:
    """Two unguided steps, so that the first picture timed does not pay for start-up."""
    pipe(**arguments(pipe, replace(recipe, steps=2)))


def arguments(
    pipe: Any, recipe: Recipe, several: Sequence[tuple[str, int]] | None = None
) -> dict[str, Any]:
    """What the pipeline is called with for the picture of `recipe`.

    Or for `several` pictures in one call, whose prompts and seeds take the place of its own.
    """
    asked = [(recipe.prompt, recipe.seed)] if several is None else several
    given: dict[str, Any] = {
        "prompt": [prompt for prompt, _ in asked],
        "num_inference_steps": recipe.steps,
        "generator": generators(seed for _, seed in asked),
    }
    if recipe.negative:
        given["negative_prompt"] = [recipe.negative] * len(asked)
    if several is None:
        given |= {name: each[0] for name, each in given.items() if isinstance(each, list)}
    if recipe.guidance_scale is not None:
        given[scale_name(pipe)] = recipe.guidance_scale
    if recipe.size is not None:
        given["width"], given["height"] = recipe.size
    given |= bundled.CALL.get(recipe.model, {})
    _check_arguments(pipe, given)
    return given


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One per picture, on the CPU: its noise depends on its seed alone, on whatever machine."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _check_arguments(pipe: Any, given: Mapping[str, Any]) -> None:
    if missing := given.keys() - _accepted(pipe).keys():
        raise GuidanceError(f"{type(pipe).__name__} does not take {', '.join(sorted(missing))}.")


def scale_name(pipe: Any) -> str:
    """Models with a distilled guidance embedding keep `guidance_scale` for that."""
    accepted = _accepted(pipe)
    name = "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"
    if name not in accepted:
        raise GuidanceError(f"{type(pipe).__name__} takes no guidance scale, so it has no CFG.")
    return name


def _accepted(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters
