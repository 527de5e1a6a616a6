"""What works with a pipeline, found out by running it: two steps at the smallest size.

>>> print(diagnose(pipe))

Nothing is looked up in a list of known pipelines. Each method is attached and called once; what it
cannot do, it says itself.
"""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from .engine.noise import kind
from .engine.run import networks
from .engine.shapes import FramesFirst, Packing, Shape
from .errors import GuidanceError
from .guidance import Guidance, State
from .loading import first_line
from .registry import create, methods
from .step import COND, Branch, Moment, Prediction, Step

STEPS = 2
CELLS = 8  # latent cells per side
TOKENS = 8  # of a made-up prompt
WIDTH = 96  # characters


@dataclass(frozen=True)
class Finding:
    """How a method fared: the network `rows` it takes per sample and step, or why it failed."""

    works: bool
    reason: str = ""
    rows: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """What guidancekit found out about a pipeline; `problem` says why it does not support it."""

    pipeline: str
    networks: list[str]
    scheduler: str
    prediction: str
    call: dict[str, Any]
    shape: str = ""
    latents: str = ""
    problem: str = ""
    methods: dict[str, Finding] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        facts = {
            "pipeline": self.pipeline,
            "network": ", ".join(self.networks),
            "scheduler": self.scheduler,
            "predicts": self.prediction,
            "called with": ", ".join(f"{name}={value!r}" for name, value in self.call.items()),
            "branches": self.shape,
            "latents": self.latents,
            "problem": self.problem,
        }
        lines = [_wrapped(fact, f"{name}:".ljust(13)) for name, fact in facts.items() if fact]
        works = [f"{name} {each.rows:g}" for name, each in self.methods.items() if each.works]
        if works:
            lines += ["", "methods that work, and the network rows they take per sample and step:"]
            lines += [_wrapped(", ".join(works), "  ")]
        reasons: dict[str, list[str]] = {}
        for name, each in self.methods.items():
            if not each.works:
                reasons.setdefault(each.reason, []).append(name)
        if reasons:
            lines += ["", "methods that do not, and why:"]
        for reason, names in reasons.items():
            lines += [_wrapped(", ".join(names), "  "), _wrapped(reason, "      ")]
        return "\n".join(lines)


def _wrapped(text: str, start: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )


def diagnose(pipe: Any, family: str | None = None, **call: Any) -> Diagnosis:
    """What works with `pipe`: each method at its defaults, or at its preset for a model `family`.

    `call` are arguments of the pipeline's call; what is left out is made up: a prompt (or random
    embeddings where the text encoder was not loaded), pictures, the smallest size. Raises
    `GuidanceError` for what is no pipeline, and for one that cannot be called that way.
    """
    if not callable(pipe) or not networks(pipe):
        raise GuidanceError(
            f"found {type(pipe).__name__}, expected a Diffusers pipeline with a denoiser and a "
            "scheduler."
        )
    arguments = {**_made_up(pipe, call), **call}
    facts: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "networks": [type(network).__name__ for network in networks(pipe)],
        "scheduler": type(pipe.scheduler).__name__,
        "prediction": kind(pipe.scheduler),
        "call": {k: v for k, v in arguments.items() if isinstance(v, (int, float, str))},
    }
    looking = _Looking()
    looking.shapes = []
    try:
        _run(pipe, looking, arguments)
    except GuidanceError as error:
        return Diagnosis(**facts, problem=str(error))
    except Exception as error:  # of the pipeline, which knows best what it lacks
        raise GuidanceError(
            f"{type(pipe).__name__} cannot be called with made-up arguments: {first_line(error)} "
            "Give them: diagnose(pipe, prompt_embeds=..., ...)."
        ) from error
    shape, seen = looking.shapes[0]
    found = {name: _try(pipe, name, family, arguments, shape.batch) for name in methods()}
    return Diagnosis(**facts, shape=_describe(shape), latents=_latents(shape, seen), methods=found)


class _Looking(Guidance):
    """The conditional prediction; keeps what the engine read."""

    shapes: list[tuple[Shape, Tensor]]

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def guide(self, step: Step, state: State) -> Prediction:
        run = self.attachment.run if self.attachment else None
        if run is not None and run.shape is not None:
            self.shapes.append((run.shape, step.x))
        return step.cond


def _try(
    pipe: Any, name: str, family: str | None, arguments: dict[str, Any], batch: int
) -> Finding:
    guidance: Any = name
    try:
        guidance = create(name, family)
        _run(pipe, guidance, arguments)
    except Exception as error:  # of any library: here it is a finding
        return Finding(False, first_line(error).removeprefix(f"{guidance!r} "))
    report = guidance.report()
    return Finding(True, rows=report.rows / len(report.steps) / batch)


def _run(pipe: Any, guidance: Guidance, arguments: dict[str, Any]) -> None:
    """Call the pipeline once, guided, and quietly."""
    shown, level = vars(pipe).get("_progress_bar_config"), logging.get_verbosity()
    pipe.set_progress_bar_config(disable=True)
    logging.set_verbosity_error()
    if "generator" in inspect.signature(pipe.__call__).parameters:
        arguments = {"generator": torch.Generator("cpu").manual_seed(0), **arguments}
    try:
        with warnings.catch_warnings(), guidance.attach(pipe):
            warnings.simplefilter("ignore")
            pipe(**arguments)
    finally:
        logging.set_verbosity(level)
        if shown is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = shown


# --- words ---------------------------------------------------------------------------------------


def _describe(shape: Shape) -> str:
    """How a pipeline asks for its branches, in words."""
    if len(shape.branches) == 1:
        return "one call on cond: no unconditional branch in this run"
    order = ", ".join(shape.branches)
    return f"two calls: {order}" if shape.sequential else f"one batch: [{order}]"


def _latents(shape: Shape, x: Tensor) -> str:
    """The latents as strategies see them, and as the pipeline keeps them."""
    text = " x ".join(map(str, x.shape[1:]))
    match shape.layout.packing:
        case Packing():
            tokens, width = shape.layout.shape
            return f"{text}, packed into {tokens} tokens of {width}"
        case FramesFirst():
            return f"{text}, kept with the frames first"
    return text


# --- made-up arguments ---------------------------------------------------------------------------


def _made_up(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the smallest run that a pipeline accepts, with both branches if it has them."""
    accepted = inspect.signature(pipe.__call__).parameters
    sizes = _sizes(pipe)
    values: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "guidance_scale": 5.0,
        "true_cfg_scale": 5.0,
        "strength": 1.0,
        "use_resolution_binning": False,
        "_auto_resize": False,
        **sizes,
    }
    if "prompt" in accepted and not {"prompt", "prompt_embeds"} & given.keys():
        values |= _prompts(pipe, accepted)
    if "class_labels" in accepted:
        values["class_labels"] = [0]
    picture = Image.linear_gradient("L").resize((sizes["width"], sizes["height"])).convert("RGB")
    values |= {"image": picture, "control_image": picture, "mask_image": picture.convert("L")}
    return {name: value for name, value in values.items() if name in accepted}


def _sizes(pipe: Any) -> dict[str, int]:
    """The pixels of a few latent cells, and the frames of two latent ones."""

    def factor(*names: str, default: int) -> int:
        return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), default)

    side = CELLS * factor(
        "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor", default=8
    )
    frames = factor("vae_scale_factor_temporal", "vae_temporal_compression_ratio", default=4)
    return {"height": side, "width": side, "max_area": side**2, "num_frames": 1 + frames}


_WIDTHS = (
    "encoder_hid_dim",
    "joint_attention_dim",
    "caption_channels",
    "cap_feat_dim",
    "text_embed_dim",
    "text_dim",
    "cross_attention_dim",
)
"""What networks call the width of the text embeddings that they take."""


def _prompts(pipe: Any, accepted: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and a negative one; random embeddings where there is no text encoder."""
    if getattr(pipe, "tokenizer", None) is not None:
        return {"prompt": "a photo", "negative_prompt": ""}
    config = getattr(networks(pipe)[0], "config", {})
    width = next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None)
    tokens = config.get("max_text_seq_length") or TOKENS
    if width is None or "prompt_embeds" not in accepted:
        raise GuidanceError(
            f"{type(pipe).__name__} was loaded without its text encoder: give it embeddings, "
            "diagnose(pipe, prompt_embeds=..., negative_prompt_embeds=...)."
        )
    pooled = config.get("pooled_projection_dim")
    if pooled is None and config.get("projection_class_embeddings_input_dim"):
        ids = 5 if getattr(pipe.config, "requires_aesthetics_score", False) else 6
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= ids * (config.get("addition_time_embed_dim") or 0)
    dtype, device = networks(pipe)[0].dtype, getattr(pipe, "_execution_device", None)
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, tokens, width)}
    if pooled is not None:
        shapes["pooled_prompt_embeds"] = (1, pooled)
    values: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        for name, shape in shapes.items():
            embedding = torch.randn(shape, generator=draw).to(device, dtype)
            listed = "list" in str(accepted["prompt_embeds"].annotation)
            values[prefix + name] = list(embedding) if listed else embedding
        for mask in ("prompt_attention_mask", "prompt_embeds_mask"):
            values[prefix + mask] = torch.ones(1, tokens, dtype=torch.bool, device=device)
    return {**values, "negative_prompt": None}
