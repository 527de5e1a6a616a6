"""Measure everything and write BENCHMARKS.md: python -m benchmarks [--device cuda] [--only ...]

`--quick` tries the code in a minute and writes nothing: few rounds, and full-size architectures
shrunk. It runs the GPU sections on whatever device there is.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from guidancekit import Guidance
from guidancekit.registry import create, methods

from . import compiled, mathematics, overhead, passes, savings, side_by_side
from .models import ARCHITECTURES, embedded, full_size
from .report import circumstances, write

CPU = {
    "mathematics": "The mathematics alone, against Diffusers' guiders",
    "overhead": "Overhead of a step",
    "savings": "Promised savings",
    "side by side": "Eight methods side by side",
    "passes": "Further passes, joined or apart",
    "compiled": "Graphs of torch.compile",
}
GPU = {name: title for name, title in CPU.items() if name != "mathematics"}
TITLES = {
    "cpu circumstances": "On a CPU",
    **{f"cpu {name}": f"{title} (CPU)" for name, title in CPU.items()},
    "cuda circumstances": "On a GPU, at full size with random weights in bfloat16",
    **{f"cuda {name}": f"{title} (GPU)" for name, title in GPU.items()},
}
STEPS = 10  # LinearAG has a table for them
NOT_FOR_SCENES = {"rectified-cfg++", "embedded"}
"""For flow models, and for distilled ones."""


def of_scenes() -> dict[str, Guidance]:
    """Every method at its preset for the embedded model, or its defaults."""
    return {name: create(name, "scenes") for name in methods() if name not in NOT_FOR_SCENES}


def of_any_model() -> dict[str, Guidance]:
    """Methods that run on every architecture, without text encoders."""
    return {
        name: create(name, **values)
        for name, values in {
            "cfg": {},
            "apg": {},
            "cfg-zero*": {"zero_init": 0},
            "tcfg": {},
            "rescaled-cfg": {},
            "pag": {"layers": "mid"},
            "sag": {"layers": "mid"},
            "tsg": {"low": 0.0},
            "icg": {},
        }.items()
    }


def on_cpu(device: torch.device, quick: bool, rounds: int | None) -> dict[str, Callable[[], str]]:
    often = rounds or (3 if quick else 25)  # what takes microseconds
    rounds, steps = rounds or (1 if quick else 7), STEPS
    one, eight = embedded(1, device), embedded(1 if quick else 8, device)
    named = of_any_model() if quick else of_scenes()
    return {
        "mathematics": lambda: mathematics.section(device, often),
        "overhead": lambda: overhead.section([one, eight], named, steps, rounds),
        "savings": lambda: savings.section(eight, steps, rounds),
        "side by side": lambda: side_by_side.section([one], steps, rounds),
        "passes": lambda: passes.section([one, eight], steps, rounds),
        "compiled": lambda: compiled.section(one, named, 4),
    }


def on_gpu(device: torch.device, quick: bool, rounds: int | None) -> dict[str, Callable[[], str]]:
    rounds, steps = rounds or (1 if quick else 5), 3 if quick else 8

    def each(measure: Callable[..., str], *rest: object) -> str:
        """One architecture in memory at a time."""
        return "\n\n".join(
            f"**{name}**\n\n{measure([full_size(name, 1, device, quick)], *rest)}"
            for name in ARCHITECTURES
        )

    sd15 = next(iter(ARCHITECTURES))
    return {
        "overhead": lambda: each(overhead.section, of_any_model(), steps, rounds),
        "savings": lambda: each(
            lambda subjects: savings.section(subjects[0], steps, rounds, bundled=False)
        ),
        "side by side": lambda: side_by_side.section(
            [full_size(sd15, 1, device, quick)], steps, rounds
        ),
        "passes": lambda: each(passes.section, steps, rounds),
        "compiled": lambda: each(lambda subjects: compiled.section(subjects[0], of_any_model(), 4)),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", choices=tuple(CPU), help="some questions")
    parser.add_argument("--rounds", type=int, help="of turns, instead of the usual number")
    parser.add_argument("--quick", action="store_true", help="try the code, write nothing")
    parser.add_argument("--full-size", action="store_true", help="with --quick: the GPU's sections")
    parser.add_argument("--out", type=Path, default=Path("BENCHMARKS.md"))
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; leave out --device for the CPU tables.")
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    on_full_size = device.type == "cuda" or given.full_size
    sections = (on_gpu if on_full_size else on_cpu)(device, given.quick, given.rounds)
    found = {}
    for name, measure in sections.items():
        if given.only and name not in given.only:
            continue
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[f"{device.type} {name}"] = measure()
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if given.quick:
            print(found[f"{device.type} {name}"], flush=True)
        else:
            command = " ".join(["python", "-m", "benchmarks", *sys.argv[1:]])
            found[f"{device.type} circumstances"] = circumstances(device, command)
            write(given.out, found, TITLES)


if __name__ == "__main__":
    main()
