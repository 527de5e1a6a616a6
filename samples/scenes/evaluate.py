"""Measures the figures of the model card.

Run it as ``python -m samples.scenes.evaluate --json figures.json``; `--model` takes the name of an
embedded model or the folder of another pipeline for scenes.

Held-out captions of one and of two objects, plain classifier-free guidance at several scales,
scored by the recogniser; and the autoencoder's PSNR on fresh scenes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from guidancekit import bundled
from guidancekit.loading import load_pipeline
from guidancekit.recipe import Recipe

from .data import render_pool
from .recogniser import Recogniser, load
from .train import psnr, to_tensor
from .world import caption, parse, sample_scene

SEED = 3  # of the scenes behind the captions; training used others


def held_out_captions(count: int, things: int, seed: int = SEED) -> list[str]:
    """`count` different captions of scenes with that many things, all of them held out."""
    rng = np.random.default_rng((seed, things))
    captions: dict[str, None] = {}
    while len(captions) < count:
        with contextlib.suppress(ValueError):  # a scene without any held-out caption
            captions[caption(sample_scene(rng, things), rng, "held-out")] = None
    return list(captions)


def generate(
    pipe: DiffusionPipeline,
    captions: Sequence[str],
    scale: float,
    steps: int,
    batch: int,
    **options: Any,
) -> np.ndarray:
    """One picture per caption, floats in [0, 1] of shape (n, 64, 64, 3)."""
    generator = torch.Generator().manual_seed(SEED)
    parts = [
        pipe(
            list(captions[i : i + batch]),
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=generator,
            output_type="np",
            **options,
        ).images
        for i in range(0, len(captions), batch)
    ]
    return np.concatenate(parts)


def accuracy(
    recogniser: Recogniser, pictures: np.ndarray, captions: Sequence[str]
) -> dict[str, float]:
    """How often each attribute is right, among the pictures whose caption names it."""
    marks = recogniser.score(pictures, captions)
    names = dict.fromkeys(name for mark in marks for name in mark)
    return {name: float(np.mean([mark[name] for mark in marks if name in mark])) for name in names}


@torch.no_grad()
def autoencoder_psnr(pipe: DiffusionPipeline, count: int = 1000) -> float:
    """Mean PSNR in dB over fresh scenes."""
    pictures = to_tensor(render_pool(count, SEED)[1])
    decoded = [pipe.vae.decode(pipe.vae.encode(x).latents).sample for x in pictures.split(250)]
    return psnr(torch.cat(decoded), pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-unet", help="its name or folder")
    parser.add_argument("--count", type=int, default=512, help="captions of each kind")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()

    pipe = load_pipeline(Recipe(prompt="-", model=args.model), "cpu")
    options = bundled.CALL.get(args.model, {})
    recogniser = load()
    figures: dict = {"model": args.model, "autoencoder psnr": autoencoder_psnr(pipe)}
    print(f"autoencoder PSNR on fresh scenes: {figures['autoencoder psnr']:.2f} dB", flush=True)
    figures |= {"count": args.count, "steps": args.steps, "captions": {}}
    pipe.to(args.device)
    for things, kind in ((1, "one object"), (2, "two objects")):
        captions = held_out_captions(args.count, things)
        related = [i for i, text in enumerate(captions) if parse(text).relation]
        figures["captions"][kind] = {}
        for scale in args.scales:
            start = time.monotonic()
            pictures = generate(pipe, captions, scale, args.steps, args.batch, **options)
            row = accuracy(recogniser, pictures, captions)
            if related:
                asked = [captions[i] for i in related]
                row["all, relation named"] = accuracy(recogniser, pictures[related], asked)["all"]
            figures["captions"][kind][f"{scale:g}"] = row
            cells = "  ".join(f"{name} {100 * value:.1f}" for name, value in row.items())
            print(f"{kind}, w = {scale:g}: {cells}  ({time.monotonic() - start:.0f} s)", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
