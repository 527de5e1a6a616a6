"""Loading models: which device, which dtype, which scheduler, and what the model can read."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from . import bundled
from .errors import GuidanceError
from .recipe import Recipe

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
            f"cannot load the model {recipe.model!r}: {first_line(error)} "
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


def _locate(model: str) -> str:
    """What `from_pretrained` takes for `model`: a folder that holds a pipeline, or a Hub id."""
    source = str(bundled.path(model)) if model in bundled.MODELS else model
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


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (line or type(error).__name__).rstrip(".") + "."
