"""A recipe as code that makes the same picture: Python lines, or a command line."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator

from . import bundled
from .composition import Sum
from .generate import follows_pipeline
from .guidance import Guidance, live
from .loading import SCHEDULERS
from .parameters import parameters
from .recipe import Recipe
from .registry import parse


def as_python(recipe: Recipe, scale_name: str = "guidance_scale") -> str:
    """Python lines that make the picture of `recipe` and save it as picture.png.

    `scale_name` is what the pipeline calls its CFG scale: `guidancekit.generate.scale_name(pipe)`.
    """
    guidance = repr(parse(recipe.guidance))
    names = sorted(_calls(guidance))
    imports, lines = ["import torch"], []
    load = f"torch_dtype=torch.{recipe.dtype}"
    if recipe.model in bundled.MODELS:
        names.append("bundled")
        lines.append(f"pipe = bundled.load({recipe.model!r}, {load})")
    else:
        imports.append("from diffusers import DiffusionPipeline")
        load += ", use_safetensors=True"
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({recipe.model!r}, {load})")
    lines.append(f"pipe.to({recipe.device!r})")
    if recipe.scheduler is not None:
        name, options = SCHEDULERS[recipe.scheduler]
        imports.append(f"from diffusers import {name}")
        arguments = ["pipe.scheduler.config", *(f"{k}={v!r}" for k, v in options.items())]
        lines.append(f"pipe.scheduler = {name}.from_config({', '.join(arguments)})")
    imports.append(f"from guidancekit import {', '.join(names)}")
    call = [
        f"    {recipe.prompt!r},",
        *([f"    negative_prompt={recipe.negative!r},"] if recipe.negative else []),
        f"    num_inference_steps={recipe.steps},",
    ]
    if recipe.guidance_scale is not None:
        call.append(f"    {scale_name}={recipe.guidance_scale!r},")
    if recipe.size is not None:
        call.append(f"    width={recipe.size[0]},")
        call.append(f"    height={recipe.size[1]},")
    call += [f"    {name}={value!r}," for name, value in bundled.CALL.get(recipe.model, {}).items()]
    call += [
        f'    generator=torch.Generator("cpu").manual_seed({recipe.seed}),',
        f"    callback_on_step_end={_attached(guidance)},",
    ]
    lines += ["image = pipe(", *call, ").images[0]", 'image.save("picture.png")']
    return "\n".join([*imports, "", *lines]) + "\n"


def as_command(recipe: Recipe) -> str:
    """One line for a shell that makes the picture of `recipe` again."""
    guidance = parse(recipe.guidance)
    text = repr(guidance)
    if parse(text, bundled.family(recipe.model)) != guidance:  # a preset would fill what is open
        text = _spelled(guidance)
    words = ["guidancekit", "generate", recipe.prompt, "--method", text]
    if recipe.guidance_scale is not None and follows_pipeline(guidance):
        words += ["--scale", f"{recipe.guidance_scale!r}"]
    if recipe.negative:
        words += ["--negative", recipe.negative]
    words += ["--steps", str(recipe.steps), "--seed", str(recipe.seed)]
    words += ["--model", recipe.model, "--dtype", recipe.dtype, "--device", recipe.device]
    if recipe.scheduler is not None:
        words += ["--scheduler", recipe.scheduler]
    if recipe.size is not None:
        words += ["--size", f"{recipe.size[0]}x{recipe.size[1]}"]
    return shlex.join(words)


def _attached(guidance: str) -> str:
    return f"({guidance}).attach(pipe)" if " + " in guidance else f"{guidance}.attach(pipe)"


def _calls(text: str) -> Iterator[str]:
    """The names of the classes that a guidance's text is made of."""
    nodes = ast.walk(ast.parse(text))
    yield from {node.func.id for node in nodes if isinstance(node, ast.Call)}  # type: ignore[attr-defined]


def _spelled(guidance: Guidance) -> str:
    """The text of a guidance with every parameter written out."""
    if isinstance(guidance, Sum):
        return " + ".join(map(_spelled, guidance.terms))
    values = {each.name: live(guidance.config[each.name]) for each in parameters(type(guidance))}
    given = [f"{name}={value!r}" for name, value in values.items()]
    return f"{type(guidance).__name__}({', '.join(given)})"
