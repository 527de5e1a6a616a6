"""Measure everything and write BENCHMARKS.md: python -m benchmarks [--device cuda] [--only ...]

Every table is written as soon as it is there, and the others of the file stay. `--only` chooses
questions, `--models` architectures: on a GPU each question takes five to ten minutes.

`--quick` tries the code in a minute and writes nothing: few rounds, and full-size architectures
shrunk. `--full-size` runs the GPU's sections on whatever device there is.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import diffusers
import torch

from guidancekit import Guidance
from guidancekit.registry import create, methods

from . import compiled, mathematics, overhead, passes, savings, side_by_side, start_up
from .models import ARCHITECTURES, HEAVY, embedded, full_size
from .report import Chapter, about, circumstances, when, write
from .timing import Effort

QUESTIONS: dict[str, tuple[str, ModuleType]] = {
    "mathematics": ("The mathematics alone, against Diffusers' guiders", mathematics),
    "overhead": ("Overhead of a step", overhead),
    "savings": ("Promised savings", savings),
    "side by side": ("Eight methods side by side", side_by_side),
    "passes": ("Further passes, joined or apart", passes),
    "start-up": ("Start-up", start_up),
    "compiled": ("Graphs of torch.compile", compiled),
}
SD15 = next(iter(ARCHITECTURES))
ON_GPU = {
    question: (SD15,) if question == "side by side" else tuple(ARCHITECTURES)
    for question in QUESTIONS
    if question not in ("mathematics", "start-up")
}
"""The architectures that a question is asked of."""

CHAPTERS = [
    Chapter("On a CPU", "", {"cpu circumstances": ""}),
    *(
        Chapter(f"{title} (CPU)", about(module.__doc__), {f"cpu {question}": ""})
        for question, (title, module) in QUESTIONS.items()
    ),
    Chapter(
        "On a GPU, at full size with random weights in bfloat16", "", {"cuda circumstances": ""}
    ),
    *(
        Chapter(
            f"{QUESTIONS[question][0]} (GPU)",
            "The section of the CPU says what is measured.",
            {f"cuda {question} / {name}": name for name in names},
        )
        for question, names in ON_GPU.items()
    ),
]
STEPS = 10  # LinearAG has a table for them
NOT_FOR_SCENES = {"rectified-cfg++", "embedded"}
"""For flow models, and for distilled ones."""

Measurements = dict[str, Callable[[], str]]
"""Tables by key, made when they are asked for."""


def of_scenes() -> dict[str, Guidance]:
    """Every method at its preset for the embedded model, or its defaults."""
    return {name: create(name, "scenes") for name in methods() if name not in NOT_FOR_SCENES}


def of_any_model(heavy: bool = False) -> dict[str, Guidance]:
    """Methods that run on every architecture, without text encoders; some where it is heavy."""
    some = {
        "cfg": {},
        "apg": {},
        "cfg-zero*": {"zero_init": 0},
        "tcfg": {},
        "rescaled-cfg": {},
        "pag": {"layers": "mid"},
        "sag": {"layers": "mid"},
        "tsg": {"low": 0.0},
        "icg": {},
    }
    others = {
        "beta-cfg": {},
        "blur": {},
        "cads": {},
        "cfg++": {"strength": "equivalent_cfg"},
        "dynamic-thresholding": {"data_range": 5.0},
        "fbg": {},
        "fdg": {},
        "mambo-g": {},
        "nag": {},
        "pcg": {},
        "seg": {"layers": "mid"},
        "slg": {"layers": "mid", "start": 0.0, "end": 1.0},
    }
    chosen = some if heavy else {**some, **others}
    return {name: create(name, **values) for name, values in sorted(chosen.items())}


def on_cpu(device: torch.device, quick: bool, rounds: int | None) -> Measurements:
    brief = Effort(rounds or (3 if quick else 25))  # of what takes microseconds
    effort = Effort(rounds or (1 if quick else 7))
    one, eight = embedded(1, device), embedded(1 if quick else 8, device)
    named = of_any_model() if quick else of_scenes()
    found: Measurements = {
        "mathematics": lambda: mathematics.section(device, brief),
        "overhead": lambda: overhead.section([one, eight], named, STEPS, effort),
        "savings": lambda: savings.section(eight, STEPS, effort),
        "side by side": lambda: side_by_side.section([one], STEPS, effort),
        "passes": lambda: passes.section([one, eight], STEPS, effort),
        "start-up": lambda: start_up.section(one, effort),
        "compiled": lambda: compiled.section(one, of_scenes(), STEPS),
    }
    return {f"cpu {question}": measure for question, measure in found.items()}


def on_gpu(
    device: torch.device, quick: bool, rounds: int | None, models: Sequence[str]
) -> Measurements:
    effort = Effort(rounds or (1 if quick else 5), seconds=45.0)

    def measure(question: str, name: str) -> str:
        """One architecture in memory at a time."""
        gc.collect()
        torch.cuda.empty_cache()
        heavy = name in HEAVY
        steps = 3 if heavy or quick else 8
        subject = full_size(name, 1, device, quick or question == "compiled")
        match question:
            case "overhead":
                return overhead.section([subject], of_any_model(heavy), steps, effort)
            case "savings":
                return savings.section(subject, 4 if heavy else steps, effort, bundled=False)
            case "side by side":
                return side_by_side.section([subject], steps, effort)
            case "passes":
                return passes.section([subject], steps, effort)
        return compiled.section(subject, of_any_model(heavy=True), 4)

    return {
        f"cuda {question} / {name}": functools.partial(measure, question, name)
        for question, names in ON_GPU.items()
        for name in names
        if name in models
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), help="some questions")
    parser.add_argument("--models", nargs="+", help="architectures: the beginnings of their names")
    parser.add_argument("--rounds", type=int, help="of turns, instead of the usual number")
    parser.add_argument("--quick", action="store_true", help="try the code, write nothing")
    parser.add_argument("--full-size", action="store_true", help="with --quick: the GPU's sections")
    parser.add_argument("--out", type=Path, default=Path("BENCHMARKS.md"))
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; leave out --device for the CPU tables.")
    if given.full_size and device.type == "cpu" and not given.quick:
        parser.error("--full-size on a CPU would take days: add --quick.")
    models = [
        name for name in ARCHITECTURES if not given.models or name.startswith(tuple(given.models))
    ]
    if not models:
        parser.error(f"--models: found {given.models}, expected some of {list(ARCHITECTURES)}.")
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if device.type == "cuda" or given.full_size:
        measurements = on_gpu(device, given.quick, given.rounds, models)
    else:
        measurements = on_cpu(device, given.quick, given.rounds)
    command = " ".join(["python", "-m", "benchmarks", *sys.argv[1:]])
    failed = False
    for key, measure in measurements.items():
        question = key.partition(" ")[2].partition(" / ")[0]
        if given.only and question not in given.only:
            continue
        start = time.perf_counter()
        print(f"{key} ...", file=sys.stderr, flush=True)
        try:
            found = measure()
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            failed = True
            continue
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if given.quick:
            print(found, flush=True)
            continue
        tables = {
            key: f"{found}\n\n{when()}",
            f"{device.type} circumstances": circumstances(device, command),
        }
        write(given.out, tables, CHAPTERS)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
