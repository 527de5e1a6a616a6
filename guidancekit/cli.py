"""The command line: `guidancekit generate | compare | grid | fit | doctor | app | methods`."""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import bundled
from .errors import GuidanceError
from .files import check_writable, free_path, written_whole
from .recipe import DTYPES, Recipe, installed_versions, read_recipe, save_picture

if TYPE_CHECKING:
    from .series import Job, Process

DEFAULT_MODEL = "scenes-unet"
DEFAULT_METHODS = "cfg,apg,cfg++,fdg,interval"
OUT = "guidancekit-out"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for bad input, 130 for Ctrl-C).

    It is 1 if `doctor` finds that a model is not supported.
    """
    try:
        options = make_parser().parse_args(argv)
        with _one_line_warnings():
            return options.command(options)
    except GuidanceError as error:
        print(f"guidancekit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("guidancekit: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0


# --- generate -----------------------------------------------------------------------------------


def generate(options: argparse.Namespace) -> int:
    """Make pictures, each with its recipe inside; those of a --prompts-file are a series."""
    out = Path(options.out)
    check_writable(out)
    in_series = options.prompts_file is not None
    prompts = _prompts(options) if in_series else options.prompts

    from .series import slug, this_process

    process = this_process(options.device)
    if process.count > 1 and not in_series:
        raise GuidanceError(f"{process.count} processes share a --prompts-file only: give one.")
    # The first process speaks for all, except of what stops another one.
    with redirect_stderr(io.StringIO()) if process.index else nullcontext():
        recipes = _recipes(options, prompts, process.device)
        if in_series:
            jobs = _missing(out, recipes, options.count, process)
        else:
            jobs = [(out / f"{slug(recipe)}.png", recipe) for recipe in recipes]
        if not jobs:
            return 0

        from .generate import run
        from .loading import load_pipeline

        _quiet_libraries()
        pipe = load_pipeline(recipes[0], process.device)
        _warn_unknown_words(pipe, [recipe.prompt for recipe in recipes])
        with _progress(len(jobs), pipe) as advance:
            for path, recipe in jobs:
                picture = run(pipe, recipe)
                path = path if in_series else free_path(path)
                save_picture(picture.image, picture.recipe, path)
                advance(str(path))
    return 0


def _missing(out: Path, recipes: Sequence[Recipe], count: int, process: Process) -> list[Job]:
    """What is left for `process` to do in a series that has `count` pictures of each prompt."""
    from .series import file_name, unfinished

    jobs = [(out / file_name(1 + k // count, recipe), recipe) for k, recipe in enumerate(recipes)]
    share = process.share(jobs)
    missing = unfinished(share)
    if len(missing) < len(share):
        whose = f"process {process.index + 1} of {process.count}: " if process.count > 1 else ""
        _note(f"{whose}{len(share) - len(missing)} of {len(share)} pictures are there already.")
    return missing


def _recipes(options: argparse.Namespace, prompts: Sequence[str], device: str) -> list[Recipe]:
    """The recipes that the options of `generate` ask for; picture k of -n uses seed + k."""
    from .generate import with_scale
    from .loading import check_scheduler, choose_dtype, default_scale
    from .registry import parse

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
    from .parameters import value_of
    from .registry import methods

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


# --- compare ------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> int:
    """Draw one labelled grid: prompts x seeds down, methods x scales across."""
    out = _out_file(options.out, ".png")
    prompts = _prompts(options)

    from .compare import Comparison, make_columns, split_methods
    from .loading import check_scheduler, choose_device, choose_dtype

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    device = choose_device(options.device)
    models = options.model or [DEFAULT_MODEL]
    family = bundled.family(*models)
    columns = make_columns(split_methods(options.methods), options.scales or (), family)
    rows = [
        Recipe(
            prompt=prompt,
            model=model,
            negative=options.negative or "",
            steps=30 if options.steps is None else options.steps,
            seed=seed,
            scheduler=options.scheduler,
            size=options.size,
            dtype=options.dtype or choose_dtype(model, device),
        )
        for model in models
        for prompt in prompts
        for seed in options.seeds
    ]
    comparison = Comparison(rows, columns)
    _quiet_libraries()
    seen = None
    try:
        with _progress(len(rows) * len(columns)) as advance:
            for pipe, cell in comparison.run(device, options.together):
                if pipe is not seen:
                    seen = pipe
                    _warn_unknown_words(pipe, prompts)
                    _show_steps(pipe)
                if cell != (0, 0):
                    advance()
            advance()
    except KeyboardInterrupt:
        if comparison.pictures:
            _save(comparison.draw(), comparison.to_json(), free_path(_partial(out)))
        raise
    for c, reason in comparison.left_out.items():
        _warn(f"left out {columns[c].method}: {reason}")
    _save(comparison.draw(), comparison.to_json(), out)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
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


def _partial(out: Path) -> Path:
    """Where the finished part of an interrupted grid goes."""
    return out.with_stem(f"{out.stem}-partial")


def _save(image: Any, table: str, path: Path) -> None:
    """Write a grid and the JSON beside it, and say where the grid is."""
    with written_whole(path.with_suffix(".json")) as file:
        file.write(table.encode())
    with written_whole(path) as file:
        image.save(file, format="PNG")
    print(path)


# --- grid ---------------------------------------------------------------------------------------


def draw_sheet(options: argparse.Namespace) -> int:
    """Draw pictures over two settings, labelled."""
    out = _out_file(options.out, ".png")

    from .axes import NOTHING, Axis, Sheet
    from .loading import choose_device
    from .studio import Studio

    device = choose_device(options.device)
    base = _recipes(options, [options.prompt], device)[0]

    def axis(option: str, text: str) -> Axis:
        name, equals, values = text.partition("=")
        if not equals or not name.strip():
            found = f"{option}: found {text!r}"
            raise GuidanceError(f"{found}, expected NAME=VALUES, such as scale=2,4,8.")
        return Axis.read(name, values)

    down = NOTHING if options.y is None else axis("--y", options.y)
    sheet = Sheet(base, axis("--x", options.x), down, options.seeds or ())
    _quiet_libraries()
    studio = Studio(base.model, device)
    _note(f"loading {base.model} ...")
    studio.load(base.model, base.dtype)
    _note(str(studio.cost(sheet.asked)))
    try:
        with _progress(len(sheet.cells)) as advance:
            studio.fill(sheet, lambda told: advance() if told is sheet else None)
    except KeyboardInterrupt:
        if sheet.pictures:
            _save(sheet.draw(), sheet.to_json(), free_path(_partial(out)))
        raise
    _save(sheet.draw(), sheet.to_json(), out)
    return 0


# --- fit ----------------------------------------------------------------------------------------


def fit_linear_ag(options: argparse.Namespace) -> int:
    """Fit LinearAG's tables for a model."""
    out = _out_file(options.out, ".json")
    prompts, base = _prompts(options), _fit_recipe(options, options.steps[0])
    if base.guidance_scale is None:
        raise GuidanceError("--scale: found none, but a table holds for one scale only: give it.")
    for steps in options.steps:
        replace(base, steps=steps)  # raises for a number out of range

    from .fitting import fit_linear_ag_file

    pipe = _load_for_fit(base, options, prompts)
    total = len(prompts) * len(options.seeds) * len(options.steps)
    with _progress(total, unit="run") as advance:
        fitted = fit_linear_ag_file(
            pipe,
            base,
            prompts,
            out,
            scale=base.guidance_scale,
            steps=options.steps,
            seeds=options.seeds,
            minutes=options.minutes,
            advance=advance,
        )
    print(fitted.path)
    for steps, errors in fitted.errors.items():
        worst = f"estimates are off by {100 * max(errors):.2g} % at most"
        _note(f"{steps} steps: {worst}, root mean square")
    _note(f"{fitted.runs} of {fitted.of} runs. Use it: --method linear-ag --set table={out}")
    return 0


def fit_annealing(options: argparse.Namespace) -> int:
    """Train the network of annealing guidance for a model."""
    out = _out_file(options.out, ".safetensors")
    if options.pictures is not None and (options.prompts or options.prompts_file):
        raise GuidanceError("--pictures: the prompts come with the pictures: give none besides.")
    if options.count < 1:
        raise GuidanceError(f"--count: found {options.count}, expected at least 1.")
    prompts = ["-"] if options.pictures else _prompts(options)
    base = _fit_recipe(options, options.steps)

    from .annealing import fit_annealing_file
    from .pictures import FolderPictures, OwnPictures

    pipe = _load_for_fit(base, options, [] if options.pictures else prompts)
    if options.pictures:
        pictures: Any = FolderPictures(pipe, Path(options.pictures), base.size)
    else:
        pictures = OwnPictures(pipe, base, prompts, options.seeds)
    with _progress(options.count) as advance:
        trained = fit_annealing_file(
            pipe,
            base,
            pictures,
            out,
            count=options.count,
            minutes=options.minutes,
            seed=options.seeds[0],
            advance=advance,
        )
    print(trained.path)
    means = ", ".join(f"{name} {value:.3g}" for name, value in trained.means.items())
    _note(f"{trained.pictures} pictures; {means or 'nothing left to do'}")
    _note(f"use it: --method annealing --set weights={out}")
    return 0


def _fit_recipe(options: argparse.Namespace, steps: int) -> Recipe:
    """What a fit says about the model and its runs."""
    from .loading import check_scheduler, choose_device, choose_dtype, default_scale

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    if options.minutes is not None and not options.minutes > 0:
        raise GuidanceError(f"--minutes: found {options.minutes:g}, expected more than 0.")
    model = options.model or DEFAULT_MODEL
    return Recipe(
        prompt="-",  # each run has its own
        model=model,
        negative=getattr(options, "negative", None) or "",
        guidance_scale=default_scale(model) if options.scale is None else options.scale,
        steps=steps,
        scheduler=options.scheduler,
        size=options.size,
        dtype=options.dtype or choose_dtype(model, choose_device(options.device)),
    )


def _load_for_fit(base: Recipe, options: argparse.Namespace, prompts: Sequence[str]) -> Any:
    from .loading import load_pipeline

    _quiet_libraries()
    pipe = load_pipeline(base, options.device)
    _warn_unknown_words(pipe, prompts)
    return pipe


def _out_file(text: str, suffix: str) -> Path:
    out = Path(text)
    if out.suffix.lower() != suffix or out.is_dir():
        raise GuidanceError(f"--out: found {text!r}, expected a file name ending in {suffix}.")
    check_writable(out.parent)
    return out


# --- methods ------------------------------------------------------------------------------------


def show_methods(options: argparse.Namespace) -> int:
    """List the methods and schedules, or explain one."""
    if options.markdown and options.name is not None:
        raise GuidanceError(f"--markdown is the table of all methods: leave out {options.name!r}.")
    if options.name is None and not options.markdown:
        from .listing import overview

        print(overview())
    else:
        from .describe import describe, markdown

        print(markdown() if options.markdown else describe(options.name))
    return 0


# --- doctor -------------------------------------------------------------------------------------


def show_diagnosis(options: argparse.Namespace) -> int:
    """Try every method on a model, and print what works and what does not, and why."""
    from . import bundled
    from .doctor import diagnose
    from .loading import check_scheduler, choose_device, choose_dtype, load_pipeline

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    dtype = choose_dtype(options.model, choose_device(options.device))
    recipe = Recipe(prompt="doctor", model=options.model, dtype=dtype, scheduler=options.scheduler)
    _quiet_libraries()
    pipe = load_pipeline(recipe, options.device)
    found = diagnose(pipe, bundled.family(options.model))
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 1 if found.problem else 0


# --- app ----------------------------------------------------------------------------------------


def start_app(options: argparse.Namespace) -> int:
    """Serve the app until Ctrl-C."""
    from .app import launch

    _quiet_libraries()
    _note(f"loading {options.model} ...")
    launch(options.model, device=options.device, share=options.share, port=options.port)
    return 0


# --- options ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        raise GuidanceError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = _Parser(
        prog="guidancekit",
        description="Guided sampling with any Diffusers text-to-image pipeline.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    make = _command(
        commands,
        "generate",
        generate,
        "make pictures whose PNGs carry their recipe",
        """\
        guidancekit generate "a large red circle on a white background"
        guidancekit generate "a blue star" --method apg --scale 8 --set eta=0.5 -n 4
        guidancekit generate --from guidancekit-out/a-blue-star-apg-seed0.png
        guidancekit generate "a cat" --model stabilityai/stable-diffusion-xl-base-1.0 \\
            --method apg --preset sdxl
        guidancekit generate --prompts-file prompts.txt -n 4 --out series
        accelerate launch --multi_gpu --num_processes 8 --module guidancekit generate \\
            --prompts-file prompts.txt -n 4 --out series
        """,
    )
    make.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    make.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="more prompts, one per line: a series, whose files are named by number and recipe. "
        "Given again, the command makes what is missing; processes of a launcher share the series",
    )
    _add_method_options(make)
    make.add_argument("--seed", type=int, metavar="S", help="seed of the first picture [0]")
    make.add_argument(
        "-n",
        dest="count",
        type=int,
        default=1,
        metavar="K",
        help="pictures per prompt, at seeds S, S+1, ... [1]",
    )
    make.add_argument(
        "--from",
        dest="source",
        metavar="PNG",
        help="repeat the recipe inside a picture; other options change it",
    )
    make.add_argument("--model", metavar="ID_OR_FOLDER", help=_MODEL_HELP)
    make.add_argument("--out", default=OUT, metavar="DIR", help="folder for pictures [%(default)s]")
    _add_run_options(make)

    grid = _command(
        commands,
        "compare",
        compare,
        "draw one grid: prompts x seeds down, methods x scales across",
        """\
        guidancekit compare "a large red circle" "a blue star above a yellow square"
        guidancekit compare "a green heart" --methods cfg,apg --scales 2,4,8 --seeds 0,1,2
        guidancekit compare "a cat" --methods "cfg,apg(norm_threshold=15),cfg++(0.6)" \\
            --model stabilityai/stable-diffusion-xl-base-1.0
        """,
    )
    _add_prompts(grid, "one row per prompt and seed")
    grid.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="A,B,...",
        help="names, 'all', or texts such as 'apg(eta=0.5)' [%(default)s]",
    )
    grid.add_argument(
        "--scales", type=_numbers(float), metavar="W,...", help="CFG scales, a column for each"
    )
    grid.add_argument(
        "--seeds", type=_numbers(int), default=[0], metavar="S,...", help="seeds, a row each [0]"
    )
    grid.add_argument(
        "--model", action="append", metavar="ID_OR_FOLDER", help=_MODEL_HELP + "; repeatable"
    )
    grid.add_argument(
        "--together",
        action="store_true",
        help="the methods of a row in one pipeline call: faster on a GPU; seconds are shares of it",
    )
    grid.add_argument(
        "--out",
        default=f"{OUT}/compare.png",
        metavar="PNG",
        help="the grid; a JSON of costs and recipes is written beside it [%(default)s]",
    )
    _add_run_options(grid)

    sheet = _command(
        commands,
        "grid",
        draw_sheet,
        "draw one prompt over any two settings",
        """\
        guidancekit grid "a red star" --x scale=2,4,8,15 --y method=cfg,apg,cfg++
        guidancekit grid "a red star" --method apg --x eta=0,0.5,1 --y "norm_threshold=0,5,none"
        guidancekit grid "a red star" --x "prompt=a red star | a blue ring" --seeds 0,1,2
        """,
    )
    sheet.add_argument("prompt", metavar="PROMPT", help="what to draw")
    sheet.add_argument(
        "--x",
        required=True,
        metavar="NAME=VALUES",
        help="across: method, scale, steps, scheduler, seed, prompt (values between bars: |), "
        "negative, or a parameter of the method",
    )
    sheet.add_argument("--y", metavar="NAME=VALUES", help="down, as --x [nothing]")
    sheet.add_argument(
        "--seeds", type=_numbers(int), metavar="S,...", help="seeds, a row each [that of --seed]"
    )
    _add_method_options(sheet)
    sheet.add_argument("--seed", type=int, metavar="S", help="seed of all pictures [0]")
    sheet.add_argument("--model", metavar="ID_OR_FOLDER", help=_MODEL_HELP)
    sheet.add_argument(
        "--out",
        default=f"{OUT}/grid.png",
        metavar="PNG",
        help="the grid; a JSON of recipes is written beside it [%(default)s]",
    )
    _add_run_options(sheet)
    sheet.set_defaults(count=1, source=None)

    _add_fit(commands)

    doctor = _command(
        commands,
        "doctor",
        show_diagnosis,
        "find out which methods work with a model, and why others do not",
        """\
        guidancekit doctor
        guidancekit doctor stabilityai/stable-diffusion-xl-base-1.0 --scheduler dpm++2m
        """,
    )
    doctor.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="ID_OR_FOLDER", help=_MODEL_HELP
    )
    doctor.add_argument("--scheduler", metavar="NAME", help="as for generate [the model's own]")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--device", metavar="NAME", help="cuda, mps or cpu [the best there is]")

    app = _command(
        commands,
        "app",
        start_app,
        "compare methods in the browser, on this machine only",
        """\
        guidancekit app
        guidancekit app --model stabilityai/stable-diffusion-xl-base-1.0 --port 7861
        """,
    )
    app.add_argument("--model", default=DEFAULT_MODEL, metavar="ID_OR_FOLDER", help=_MODEL_HELP)
    app.add_argument("--port", type=int, metavar="N", help="[the first free one from 7860]")
    app.add_argument(
        "--share", action="store_true", help="also serve it to others, under a public address"
    )
    app.add_argument("--device", metavar="NAME", help="cuda, mps or cpu [the best there is]")

    listing = _command(
        commands,
        "methods",
        show_methods,
        "list the guidance methods, or explain one",
        """\
        guidancekit methods
        guidancekit methods apg
        """,
    )
    listing.add_argument("name", nargs="?", metavar="NAME", help="a strategy or a schedule")
    listing.add_argument(
        "--markdown", action="store_true", help="papers, costs and tests of all, as a table"
    )
    return parser


def _add_fit(commands: Any) -> None:
    """`fit` has a command for each method that can be fitted to a model."""
    fit = commands.add_parser(
        "fit",
        help="fit what a method needs to know of a model",
        description="Fit what a method needs to know of a model. An interrupted fit goes on when "
        "the same command is given again.",
        allow_abbrev=False,
    )
    kinds = fit.add_subparsers(metavar="METHOD", required=True, parser_class=_Parser)
    table = _command(
        kinds,
        "linear-ag",
        fit_linear_ag,
        "fit LinearAG's tables from runs of plain guidance",
        """\
        guidancekit fit linear-ag --prompts-file prompts.txt --steps 20,30
        guidancekit generate "a red star" --method linear-ag \\
            --set table=guidancekit-out/linear-ag.json
        """,
    )
    _add_prompts(table, "what to draw; the paper takes 200")
    table.add_argument(
        "--steps",
        type=_numbers(int),
        default=[30],
        metavar="N,...",
        help="solver steps, a table for each [30]",
    )
    table.add_argument("--negative", metavar="TEXT", help="what to guide away from")
    _add_fit_options(table, f"{OUT}/linear-ag.json", "the scale that the table is for")

    network = _command(
        kinds,
        "annealing",
        fit_annealing,
        "train the network of annealing guidance on pictures",
        """\
        guidancekit fit annealing --prompts-file prompts.txt --minutes 30
        guidancekit fit annealing --pictures folder --model some/model
        guidancekit generate "a red star" --method annealing \\
            --set weights=guidancekit-out/annealing.safetensors
        """,
    )
    _add_prompts(network, "pictures that the model makes itself, for want of others")
    network.add_argument(
        "--pictures", metavar="DIR", help="pictures, each with its prompt in a .txt of its name"
    )
    network.add_argument(
        "--count", type=int, default=2000, metavar="N", help="pictures to train on [%(default)s]"
    )
    network.add_argument(
        "--steps", type=int, default=30, metavar="N", help="solver steps [%(default)s]"
    )
    _add_fit_options(network, f"{OUT}/annealing.safetensors", "of the model's own pictures")


def _add_fit_options(parser: argparse.ArgumentParser, out: str, scale: str) -> None:
    parser.add_argument(
        "--scale", type=float, metavar="W", help=f"CFG scale, {scale} [4 for the embedded model]"
    )
    parser.add_argument(
        "--seeds", type=_numbers(int), default=[0], metavar="S,...", help="prompt i starts at S+i"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long")
    parser.add_argument("--model", metavar="ID_OR_FOLDER", help=_MODEL_HELP)
    parser.add_argument("--out", default=out, metavar="FILE", help="the file [%(default)s]")
    _add_model_options(parser)


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method", metavar="NAME", help="strategy or schedule, or a sum: 'cfg(5) + apg' [cfg]"
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help="CFG scale, 1 is no guidance [4 for the embedded model, else the pipeline's]; "
        "up to 1 it is the method's own scale (cfg++: lambda)",
    )
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="parameter of the method; repeatable"
    )
    parser.add_argument("--preset", metavar="NAME", help="published settings: see methods NAME")


def _add_prompts(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=what)
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one per line")


_MODEL_HELP = f"embedded model, Diffusers folder or Hub id [{DEFAULT_MODEL}]"


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
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


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative", metavar="TEXT", help="what to guide away from")
    parser.add_argument("--steps", type=int, metavar="N", help="solver steps [30]")
    _add_model_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
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


def _numbers(kind: type[int] | type[float]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = "list of " + ("whole numbers" if kind is int else "numbers")
    return read


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


_size.__name__ = "size (expected WxH, such as 1024x1024)"


def _version() -> str:
    return "guidancekit " + installed_versions()["guidancekit"]


# --- talking ------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int, pipe: Any = None, unit: str = "picture") -> Iterator[Callable[..., None]]:
    """A bar over pictures, on a terminal only; `advance(line)` counts one and prints the line."""
    from tqdm import tqdm

    if pipe is not None:
        _show_steps(pipe)
    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:

        def advance(line: str | None = None) -> None:
            bar.update()
            if line is not None:
                tqdm.write(line)
                sys.stdout.flush()  # whole lines, also where several processes write

        yield advance


def _show_steps(pipe: Any) -> None:
    """Let the pipeline show a bar over its steps, on a terminal only."""
    pipe.set_progress_bar_config(disable=None, leave=False, unit="step")


def _note(text: str) -> None:
    """What is worth knowing about the result; only its name goes to stdout."""
    print(f"guidancekit: {text}", file=sys.stderr)


def _warn(text: str) -> None:
    print(f"guidancekit: warning: {text}", file=sys.stderr)


def _warn_unknown_words(pipe: Any, prompts: Sequence[str]) -> None:
    """Say which words the model has never seen, and which it knows."""
    from .loading import known_words, unknown_words

    unknown = list(dict.fromkeys(word for p in prompts for word in unknown_words(pipe, p)))
    if unknown:
        known = known_words(pipe)
        where = " ".join(known) if len(known) <= 200 else "see the tokenizer folder of the model"
        _warn(f"the model does not know {', '.join(map(repr, unknown))}. Its words: {where}")


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
        _warn(f"the picture was made with {', '.join(changed)}: pixels may differ slightly")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Each of our own warnings once, as one line; none of the libraries below."""
    seen = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            _warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="guidancekit")
        warnings.showwarning = show
        yield


def _quiet_libraries() -> None:
    """No log lines and loading bars of the libraries below."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
