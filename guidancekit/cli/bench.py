"""`guidancekit bench`: measure methods where the truth is known, or any model by its pictures."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        "--claims", action="store_true", help="test what the papers say of their methods"
    )
    parser.add_argument(
        "--mixture",
        action="store_true",
        help="on exact Gaussian mixtures in the plane, whose tilted distribution is known",
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
    from ..lab import claims, report
    from ..lab.bench import Bench, Result, make_arms
    from ..lab.experiment import Arm, Questions, arm
    from ..lab.scenes import captions
    from ..loading import check_scheduler, choose_dtype
    from ..series import this_process

    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    models = [name.strip() for name in options.models.split(",")]
    embedded = [name for name in models if name in bundled.MODELS]
    if options.prompts_file is not None:
        options.prompts = []
        prompts = read_prompts(options)
    elif embedded == models:
        prompts = captions(options.captions)
    else:
        raise GuidanceError("--prompts-file is missing: only the embedded models draw scenes.")
    process = this_process(options.device)
    quiet_libraries()
    given = {name: getattr(options, name) for name in ("steps", "scheduler", "size")}
    given = {name: value for name, value in given.items() if value is not None}
    bases = [
        replace(
            Recipe(
                prompt="-", model=model, dtype=options.dtype or choose_dtype(model, process.device)
            ),
            **given,
        )
        for model in models
    ]
    questions = Questions(
        tuple(prompts), options.seeds, options.batch, options.negative or "", options.first_seed
    )
    names = split_methods(options.methods)
    work = Bench(out, questions, process)
    facts = {
        "prompts": f"{len(prompts)}, {options.seeds} seeds each from {options.first_seed}",
        "models": ", ".join(models),
        "steps": bases[0].steps,
    }
    if options.claims:
        with progress(0, unit="call") as advance:
            tested = claims.verify(bases, questions, out, process, lambda call: advance())
        if tested is None:
            return _others(out)
        for path in claims.write(out, tested, facts):
            print(path)
        return 0
    found: list[Result] | None = []
    if options.match:
        facts["matched"] = f"{options.match} of CFG at {options.at:g}"
        for base in bases:
            baseline = arm(base, "cfg", options.at)
            with progress(0, unit="call") as advance:
                own = work.matched(
                    baseline,
                    [name for name in names if name != "cfg"],
                    options.match,
                    lambda call: advance(),
                )
            found = None if own is None or found is None else found + own
    else:
        arms: list[Arm] = [
            each for base in bases for each in make_arms(base, names, options.scales)
        ]
        missing = [call for call in work.calls(arms) if not call.path.exists()]
        note(f"{len(arms)} settings, {len(missing)} calls of up to {options.batch} pictures to go")
        with progress(len(missing), unit="call") as advance:
            work.run(arms, lambda call: advance())
        found = work.results(arms)
    if found is None:
        return _others(out)
    truth = {}
    for model in embedded:
        laboratory = work.laboratory(model)
        truth[model] = {
            "true pictures": laboratory.truth(),
            "true pictures, decoded": laboratory.decoded_truth(model),
        }
    for path in report.write(out, found, truth, facts, plots=not options.no_plots):
        print(path)
    return 0


def _mixture(options: argparse.Namespace, out: Path) -> int:
    """The methods on exact mixtures: figures and scatter plots, in seconds."""
    from ..compare import split_methods
    from ..lab import mixture
    from ..lab.report import save_figure

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
