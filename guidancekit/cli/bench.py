"""`guidancekit bench`: measure methods where the truth is known, or any model by its pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import bundled
from ..errors import GuidanceError
from ..files import check_writable, written_whole
from ..recipe import Recipe
from .options import (
    DEFAULT_MODEL,
    OUT,
    add_command,
    add_run_options,
    numbers,
    read_prompts,
)
from .talk import note, progress, quiet_libraries

if TYPE_CHECKING:
    from ..lab.bench import Bench, Result
    from ..lab.experiment import Questions
    from ..scoring import CLIPScore
    from ..series import Process

METHODS = "cfg,apg,cfg++,fdg,interval"
SCALES = [2.0, 4.0, 6.0, 10.0]


def add(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(
        commands,
        "bench",
        bench,
        "measure methods: adherence, diversity, distance to the truth, saturation, cost",
        """\
        guidancekit bench --methods cfg,apg,interval --scales 2,4,8
        guidancekit bench --methods apg,cfg++,fdg --match effective-scale --at 6
        guidancekit bench --claims
        accelerate launch --num_processes 2 -m guidancekit bench --methods all
        guidancekit bench --models stabilityai/sdxl-turbo --prompts-file prompts.txt --batch 2
        """,
    )
    parser.add_argument("--methods", default=METHODS, metavar="NAME,...", help="[%(default)s]")
    parser.add_argument(
        "--scales", type=numbers(float), default=SCALES, metavar="W,...", help="[2,4,6,10]"
    )
    parser.add_argument(
        "--models", default=DEFAULT_MODEL, metavar="NAME,...", help="to measure on [%(default)s]"
    )
    parser.add_argument(
        "--captions", type=int, default=16, metavar="N", help="of the scenes world [%(default)s]"
    )
    parser.add_argument("--prompts-file", metavar="FILE", help="for other models, one per line")
    parser.add_argument(
        "--seeds", type=int, default=8, metavar="N", help="pictures per caption [%(default)s]"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="S", help="another one is fresh noise [0]"
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="pictures per call [%(default)s]"
    )
    parser.add_argument(
        "--match",
        choices=("effective-scale", "diversity", "adherence"),
        help="search for the scale at which each method is as strong as CFG",
    )
    parser.add_argument("--at", type=float, default=6.0, metavar="W", help="that of CFG [6]")
    parser.add_argument(
        "--claims",
        nargs="?",
        const="all",
        metavar="NAME,...",
        help="test what the papers say of their methods, or of these",
    )
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="with --claims: say whether the differences lie in the intervals of a claims.json",
    )
    parser.add_argument(
        "--mixture",
        action="store_true",
        help="on exact Gaussian mixtures in the plane, whose tilted distribution is known: 1,000 "
        "points a setting, from --first-seed",
    )
    parser.add_argument(
        "--clip-score", metavar="MODEL", help="add CLIPScore by a CLIPModel, a folder or Hub id"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="write all pictures as PNGs, for other programs"
    )
    parser.add_argument("--no-plots", action="store_true", help="no matplotlib is needed then")
    parser.add_argument(
        "--out",
        default=f"{OUT}/bench",
        metavar="DIR",
        help="report, figures and all pictures; run again, it goes on there [%(default)s]",
    )
    add_run_options(parser)


def bench(options: argparse.Namespace) -> int:
    """Measure; every finished call is kept, and the last process writes the report."""
    out = Path(options.out)
    check_writable(out)
    if options.mixture:
        return _mixture(options, out)

    from ..compare import split_methods
    from ..lab.bench import Bench, make_arms
    from ..lab.experiment import Questions
    from ..series import this_process

    models = [name.strip() for name in options.models.split(",")]
    prompts = _prompts(options, models)
    process = this_process(options.device)
    quiet_libraries()
    bases = _bases(options, models, process.device)
    questions = Questions(
        tuple(prompts), options.seeds, options.batch, options.negative or "", options.first_seed
    )
    facts = {
        "command": f"`{options.typed}`",
        "prompts": f"{len(prompts)}, {options.seeds} seeds each from {options.first_seed}",
        "models": ", ".join(models),
        "steps": bases[0].steps,
    }
    if options.claims:
        return _claims(options, bases, questions, out, process, facts)
    work = Bench(out, questions, process, _clip(options.clip_score))
    names = split_methods(options.methods)
    if options.match:
        return _matched(options, bases, names, work, facts)
    arms = [each for base in bases for each in make_arms(base, names, options.scales)]
    missing = [call for call in work.calls(arms) if not call.path.exists()]
    note(f"{len(arms)} settings, {len(missing)} calls of up to {options.batch} pictures to go")
    with progress(len(missing), unit="call") as advance:
        work.run(arms, lambda call: advance())
    return _report(options, work, work.results(arms), facts, "report")


def _prompts(options: argparse.Namespace, models: list[str]) -> list[str]:
    from ..lab.scenes import captions

    if options.prompts_file is not None:
        options.prompts = []
        return read_prompts(options)
    if not set(models) <= set(bundled.MODELS):
        raise GuidanceError("--prompts-file is missing: only the embedded models draw scenes.")
    return captions(options.captions)


def _bases(options: argparse.Namespace, models: list[str], device: str) -> list[Recipe]:
    """What all settings of a model share."""
    from ..loading import check_scheduler, choose_dtype

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    given = {name: getattr(options, name) for name in ("steps", "scheduler", "size", "dtype")}
    given = {name: value for name, value in given.items() if value is not None}
    return [
        Recipe(prompt="-", model=model, **{"dtype": choose_dtype(model, device), **given})
        for model in models
    ]


def _clip(model: str | None) -> CLIPScore | None:
    """Load CLIP before any picture is made, and say so first if it is not here yet."""
    from huggingface_hub import try_to_load_from_cache

    from ..scoring import CLIPScore

    if model is None:
        return None
    try:
        here = Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str)
    except ValueError:  # no name of the Hub: loading says so
        here = True
    if not here:
        note(f"--clip-score: {model} is not on this machine: it is downloaded from the Hub.")
    return CLIPScore(model, "").load()


def _claims(
    options: argparse.Namespace,
    bases: list[Recipe],
    questions: Questions,
    out: Path,
    process: Process,
    facts: dict[str, Any],
) -> int:
    """The table of claims with its verdicts."""
    from ..compare import split_methods
    from ..lab.claims import Trial, about, read_intervals, write

    earlier = read_intervals(Path(options.against)) if options.against else None
    chosen = about([] if options.claims == "all" else split_methods(options.claims))
    trial = Trial(bases, questions, out, process, chosen)
    missing = [call for call in trial.calls if not call.path.exists()]
    note(f"{len(missing)} calls of up to {options.batch} pictures to go")
    with progress(len(missing), unit="call") as advance:
        trial.run(lambda call: advance())
    found = trial.verdicts()
    if found is None:
        return _others(out)
    for path in write(out, found, facts, earlier):
        print(path)
    return 0


def _matched(
    options: argparse.Namespace,
    bases: list[Recipe],
    names: list[str],
    work: Bench,
    facts: dict[str, Any],
) -> int:
    """Methods at the scale at which each is as strong as the baseline."""
    from ..lab.experiment import arm

    facts["matched"] = f"{options.match} of CFG at {options.at:g}"
    found: list[Result] | None = []
    for base in bases:
        with progress(None, unit="call") as advance:
            own = work.matched(
                arm(base, "cfg", options.at),
                [name for name in names if name != "cfg"],
                options.match,
                lambda call: advance(),
            )
        found = None if own is None or found is None else found + own
    return _report(options, work, found, facts, f"matched-{options.match}")


def _report(
    options: argparse.Namespace,
    work: Bench,
    found: list[Result] | None,
    facts: dict[str, Any],
    name: str,
) -> int:
    """Write what was found, beside the truth where it is known."""
    from ..lab.report import write

    if found is None:
        return _others(work.out)
    truth = {}
    for model in dict.fromkeys(each.arm.recipe.model for each in found):
        laboratory = work.laboratory(model)
        if laboratory.judge is not None:
            truth[model] = {
                "true pictures": laboratory.truth(),
                "true pictures, decoded": laboratory.decoded_truth(model),
            }
    for path in write(work.out, found, truth, facts, plots=not options.no_plots, name=name):
        print(path)
    for each in found if options.pictures else ():
        if each.measured is not None:
            print(work.export(each.arm))
    return 0


def _mixture(options: argparse.Namespace, out: Path) -> int:
    """The methods on exact mixtures: figures and scatter plots, in seconds."""
    from ..compare import split_methods
    from ..lab import mixture
    from ..lab.report import save_figure
    from ..series import this_process

    if this_process("cpu").index:  # one does it in seconds
        return 0
    names = mixture.METHODS if options.methods == METHODS else split_methods(options.methods)
    scales = sorted({1.0, *options.scales})
    steps = options.steps or 50
    records = mixture.study(names, scales, steps=steps, seeds=[options.first_seed])
    path = out / "mixture.json"
    with written_whole(path) as file:
        file.write((json.dumps(records, indent=1) + "\n").encode())
    print(path)
    for model in () if options.no_plots else mixture.MODELS:
        canvas = mixture.draw(names, scales, steps=steps, model=model)
        print(save_figure(canvas, out / f"mixture-{model}.png"))
    return 0


def _others(out: Path) -> int:
    note(f"this process has done its share of {out}; the last one writes the report.")
    return 0
