"""From recipes to pictures: load a pipeline, run it under a guidance, count what it cost."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import bundled
from .errors import GuidanceError
from .guidance import Guidance, Sum
from .parameters import parameters
from .recipe import Recipe, installed_versions
from .registry import create, parse
from .schedules import Schedule

EMBEDDED_SCALE = 4.0  # follows the prompts without saturating; see the models' cards

# name: (class in diffusers, options on top of the model's own scheduler configuration)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


@dataclass(frozen=True)
class Picture:
    """One finished picture and what it cost.

    `evaluations` counts the samples that went through the network, `seconds` is the time of the
    pipeline call, and `effective_scale` has one CFG-equivalent scale per step.
    """

    image: Image.Image
    recipe: Recipe
    evaluations: int
    seconds: float
    effective_scale: list[float]
    warnings: list[str]


def choose_device(wanted: str | None) -> str:
    """`wanted`, or the best there is; raises `GuidanceError` for a device that is not there."""
    available = ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    if wanted is None:
        return available[0]
    kind, _, index = wanted.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in available or index not in ("", *map(str, range(count))):
        raise GuidanceError(
            f"device: found {wanted!r}, but what there is here is {', '.join(available)}."
        )
    return wanted


def choose_dtype(model: str, device: str) -> str:
    """Half precision on a GPU, except for the embedded models, which are small and float32."""
    if model in bundled.MODELS or device == "cpu":
        return "float32"
    if device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return "bfloat16"
    return "float16"


def load_pipeline(recipe: Recipe, device: str | None = None) -> Any:
    """The pipeline that `recipe` names, with its scheduler and dtype, on `device`.

    The model is an embedded one, a Diffusers folder, or a repository on the Hugging Face Hub.
    Weights are read from safetensors only and no code of the repository is run.
    Raises `GuidanceError` for anything that is not such a pipeline.
    """
    from diffusers import DiffusionPipeline

    source = _locate(recipe.model)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            source,
            torch_dtype=getattr(torch, recipe.dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    # A dozen libraries take part, each with errors of its own; what they say is one line to us.
    except Exception as error:
        raise GuidanceError(
            f"cannot load the model {recipe.model!r}: {_first_line(error)} "
            "Expected a Diffusers pipeline folder or a Hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0, with safetensors weights."
        ) from error
    if not callable(pipe) or "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise GuidanceError(f"{recipe.model!r} is a {type(pipe).__name__}, which takes no prompt.")
    if recipe.scheduler is not None:
        pipe.scheduler = make_scheduler(recipe.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(choose_device(device))


def check_scheduler(name: str) -> None:
    """Raise `GuidanceError` unless `name` is in `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise GuidanceError(f"there is no scheduler {name!r}. There are: {', '.join(SCHEDULERS)}.")


def make_scheduler(name: str, current: Any) -> Any:
    """The scheduler `name` with the configuration of the model's `current` one."""
    import diffusers

    check_scheduler(name)
    class_name, options = SCHEDULERS[name]
    if ("FlowMatch" in class_name) != ("FlowMatch" in type(current).__name__):
        raise GuidanceError(
            f"scheduler {name!r} does not fit a model made for {type(current).__name__}: "
            "flow-matching models take flow-euler, all others the other schedulers."
        )
    try:
        return getattr(diffusers, class_name).from_config(current.config, **options)
    except ImportError as error:  # LMS integrates with scipy, which diffusers does not require
        raise GuidanceError(f"scheduler {name!r} needs scipy: pip install scipy") from error


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """The words of `prompt` that the model's tokenizer replaces by its unknown-word token."""
    tokenizer: Any = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    # Byte-level tokenizers know every word, and CLIP's has its end token as unknown token.
    if unknown is None or unknown == tokenizer.eos_token_id or not tokenizer.is_fast:
        return []
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    words = (prompt[start:end] for token, (start, end) in pairs if token == unknown)
    return list(dict.fromkeys(words))


def known_words(pipe: Any) -> list[str]:
    """The vocabulary of the model's tokenizer without its special tokens, sorted."""
    tokenizer = pipe.tokenizer
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def default_scale(model: str) -> float | None:
    """The CFG scale for `model` when none is given; None is the pipeline's own default."""
    return EMBEDDED_SCALE if model in bundled.MODELS else None


def with_scale(
    method: str, scale: float | None, values: Mapping[str, Any] | None = None
) -> tuple[str, float | None]:
    """The guidance `method` at CFG scale `scale`: its text, and the pipeline's `guidance_scale`.

    `method` is a registry name, to which `values` are given, or a text such as ``apg(eta=0.5)``.
    Methods take their scale from the pipeline, which has an unconditional branch above 1 only;
    smaller scales therefore go to the method's own `scale` (CFG++: lambda).
    Raises `GuidanceError` for unknown methods and unfit values.
    """
    values = values or {}
    is_text = "(" in method or " + " in method
    if is_text and values:
        raise GuidanceError(f"write all parameters inside {method!r}.")
    guidance = parse(method) if is_text else create(method, **values)
    if scale is None or (scale > 1 and follows_pipeline(guidance)):
        return repr(guidance), scale
    if scale > 1:
        raise GuidanceError(f"scale: found {scale:g}, but {guidance!r} has a scale of its own.")
    if is_text or "scale" in values:
        raise GuidanceError(
            f"scale: found {scale:g} for {method!r}, expected more than 1: "
            "write smaller scales inside."
        )
    return repr(create(method, **{**values, "scale": scale})), None


def follows_pipeline(value: Any) -> bool:
    """Whether a guidance or schedule takes a scale from the pipeline's `guidance_scale`."""
    if isinstance(value, Sum):
        return any(follows_pipeline(term) for term in value.terms)
    if not isinstance(value, (Guidance, Schedule)):
        return False
    scales = [getattr(value, p.name) for p in parameters(type(value)) if p.kind == "scale"]
    return any(scale is None or follows_pipeline(scale) for scale in scales)


def run(pipe: Any, recipe: Recipe) -> Picture:
    """Make the one picture of `recipe` with `pipe`, which `load_pipeline` has loaded for it.

    Every picture is a pipeline call of its own, from its own generator on the CPU: batch size and
    neighbours never change a pixel. Raises `GuidanceError` for what the pipeline cannot do.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    scale_name = "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"
    arguments: dict[str, Any] = {
        "prompt": recipe.prompt,
        "num_inference_steps": recipe.steps,
        "generator": torch.Generator("cpu").manual_seed(recipe.seed),
    }
    if recipe.negative:
        arguments["negative_prompt"] = recipe.negative
    if recipe.guidance_scale is not None:
        arguments[scale_name] = recipe.guidance_scale
    if recipe.size is not None:
        arguments["width"], arguments["height"] = recipe.size
    with parse(recipe.guidance).attach(pipe) as guidance:
        started = time.perf_counter()
        try:
            image = pipe(**arguments).images[0]
        except GuidanceError:
            raise
        except (ValueError, torch.OutOfMemoryError) as error:  # diffusers checks its arguments
            raise GuidanceError(
                f"{type(pipe).__name__} refused the run: {_first_line(error)}"
            ) from error
        seconds = time.perf_counter() - started
        report = guidance.report()
    made = replace(
        recipe,
        guidance=repr(guidance),
        guidance_scale=arguments.get(scale_name, accepted[scale_name].default),
        size=image.size,
        device=pipe.device.type,
        versions=installed_versions(),
    )
    scales = [round(float(scale), 4) for scale in report.effective_scale]
    return Picture(image, made, int(report.rows), seconds, scales, list(report.warnings))


def warm_up(pipe: Any, recipe: Recipe) -> None:
    """Two unguided steps, so that the first picture timed does not pay for start-up."""
    with torch.random.fork_rng(devices=[]):
        pipe(prompt=recipe.prompt, num_inference_steps=2)


def _locate(model: str) -> str | Path:
    """What `from_pretrained` takes for `model`: a folder that holds a pipeline, or a Hub id."""
    source: str | Path = bundled.path(model) if model in bundled.MODELS else model
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise GuidanceError(
                f"the model folder {folder} has no model_index.json: "
                "expected a Diffusers pipeline, as written by pipe.save_pretrained(folder)."
            )
    elif folder.is_absolute() or folder.exists() or model.startswith(".") or model.count("/") != 1:
        raise GuidanceError(
            f"there is no model folder {folder}. Expected a Diffusers pipeline folder, a Hub id "
            f"(owner/name), or an embedded model: {', '.join(bundled.MODELS)}."
        )
    return source


def _first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (line or type(error).__name__).rstrip(".") + "."
