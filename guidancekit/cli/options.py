"""The options that commands share: how they are declared, and what they ask for."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from .. import bundled
from ..errors import GuidanceError
from ..files import check_writable, written_whole
from ..recipe import DTYPES, Recipe, installed_versions, read_recipe
from .talk import warn

DEFAULT_MODEL = "scenes-unet"
MODEL_HELP = f"embedded model, Diffusers folder or Hub id [{DEFAULT_MODEL}]"
OUT = "guidancekit-out"


# --- declaring them -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        raise GuidanceError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Declare a command, which `run` carries out; the arguments are added to what is returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    return parser


def add_prompts(parser: argparse.ArgumentParser, what: str) -> None:
    """Any number of prompts; `read_prompts` reads them."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=what)
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one per line")


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """The method and its settings; `read_recipes` reads them."""
    parser.add_argument(
        "--method", metavar="NAME", help="strategy or schedule, or a sum: 'cfg(5) + apg' [cfg]"
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help="CFG scale, 1 is no guidance [4 for embedded models, else the pipeline's]; "
        "up to 1 it is the method's own scale (cfg++: lambda)",
    )
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="parameter of the method; repeatable"
    )
    parser.add_argument("--preset", metavar="NAME", help="published settings: see methods NAME")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What a picture is made with besides the prompt and the method."""
    parser.add_argument("--negative", metavar="TEXT", help="what to guide away from")
    parser.add_argument("--steps", type=int, metavar="N", help="solver steps [30]")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run, and where."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help="ddim, ddpm, euler, euler-a, dpm++2m, dpm++2m-karras, heun, unipc, lms, deis or "
        "flow-euler [the model's own]",
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help="pixels [the model's own]")
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} [by device]"
    )
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu [the best]")


def numbers(kind: type[int] | type[float]) -> Callable[[str], list[Any]]:
    """The `type` of an argument that is a list such as 2,4,8."""

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = "list of " + ("whole numbers" if kind is int else "numbers")
    return read


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


_size.__name__ = "size (expected WxH, such as 1024x1024)"


# --- what they ask for --------------------------------------------------------------------------


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of --prompts-file, one per line."""
    prompts = list(options.prompts)
    if options.prompts_file is not None:
        try:
            lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise GuidanceError(f"--prompts-file: {error}") from error
        prompts += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise GuidanceError("there is no prompt: give some, or --prompts-file with one per line.")
    return prompts


def read_recipes(options: argparse.Namespace, prompts: Sequence[str], device: str) -> list[Recipe]:
    """The recipes that the options of `generate` ask for; picture k of -n uses seed + k."""
    from ..generate import with_scale
    from ..loading import check_scheduler, choose_dtype, default_scale
    from ..registry import parse

    if options.count < 1:
        raise GuidanceError(f"-n: found {options.count}, expected at least 1.")
    method = options.method
    if options.source is not None:
        if (options.set or options.preset) and method is None:
            raise GuidanceError("--set and --preset on top of --from need --method.")
        base = read_recipe(options.source)
        _warn_versions(base, device)
        parse(base.guidance)  # raises before the model is loaded
    else:
        if not prompts:
            raise GuidanceError("there is no prompt: give one, or --from a picture made before.")
        model = options.model or DEFAULT_MODEL
        dtype = choose_dtype(model, device)
        scale = default_scale(model)
        base = Recipe(prompt=prompts[0], model=model, dtype=dtype, guidance_scale=scale)
        method = method or "cfg"
    if options.model not in (None, base.model):
        base = replace(base, size=None)  # another model has a size of its own
    changes = ("model", "negative", "steps", "seed", "scheduler", "size", "dtype")
    given = {name: getattr(options, name) for name in changes}
    base = replace(base, **{name: value for name, value in given.items() if value is not None})
    if base.scheduler is not None:
        check_scheduler(base.scheduler)
    if method is not None or options.scale is not None:
        text = method or base.guidance
        typed = method is not None and options.preset is None
        family = bundled.family(base.model) if typed else None
        guidance, scale = with_scale(text, options.scale, _settings(options, text), family)
        base = replace(
            base,
            guidance=guidance,
            guidance_scale=base.guidance_scale if scale is None else scale,
        )
    return [
        replace(base, prompt=prompt, seed=base.seed + k)
        for prompt in prompts or [base.prompt]
        for k in range(options.count)
    ]


def _settings(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """The parameters given by --preset, without its scale if there is a --scale, and --set."""
    from ..parameters import value_of
    from ..registry import methods

    values: dict[str, Any] = {}
    if options.preset is not None:
        if method not in methods():
            raise GuidanceError(f"--preset: {method!r} has no presets.")
        methods()[method].preset(options.preset)  # raises for an unknown one
        values.update(methods()[method].presets[options.preset].values)
        if options.scale is not None:
            values.pop("scale", None)
    for text in options.set or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise GuidanceError(f"--set: found {text!r}, expected key=value, such as eta=0.5.")
        values[key.strip()] = value_of(value.strip())
    return values


def _warn_versions(recipe: Recipe, device: str) -> None:
    """Say what differs from when the picture was made: only equal versions give equal pixels."""
    now = installed_versions()
    changed = [
        f"{package} {made} (now {now[package]})"
        for package, made in recipe.versions.items()
        if package in now and now[package] != made
    ]
    if recipe.device != device.partition(":")[0]:
        changed.append(f"device {recipe.device} (now {device})")
    if changed:
        warn(f"the picture was made with {', '.join(changed)}: pixels may differ slightly")


# --- what they name: files ----------------------------------------------------------------------


def out_file(text: str, suffix: str) -> Path:
    """The file that --out names; raises before anything is computed for it."""
    out = Path(text)
    if out.suffix.lower() != suffix or out.is_dir():
        raise GuidanceError(f"--out: found {text!r}, expected a file name ending in {suffix}.")
    check_writable(out.parent)
    return out


def partial_file(out: Path) -> Path:
    """Where the finished part of an interrupted grid goes."""
    return out.with_stem(f"{out.stem}-partial")


def save_grid(image: Any, table: str, path: Path) -> None:
    """Write a grid and the JSON beside it, and say where the grid is."""
    with written_whole(path.with_suffix(".json")) as file:
        file.write(table.encode())
    with written_whole(path) as file:
        image.save(file, format="PNG")
    print(path)
