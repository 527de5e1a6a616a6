"""Trains what some methods need beside the embedded model, within wall-clock budgets.

The model must have been exported, since its companions are made for its very weights. Run it as::

    torchrun --nproc-per-node 2 -m samples.scenes.companions weak --minutes 8
    python -m samples.scenes.companions head --minutes 3
    python -m samples.scenes.companions scorer --minutes 3
    python -m samples.scenes.companions annealing --minutes 5
    python -m samples.scenes.companions linear-ag --minutes 3
    python -m samples.scenes.companions export

An interrupted run goes on from its checkpoint in `--folder` when started again; for the last two,
`--minutes` counts from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guidancekit import InternalHead, bundled
from guidancekit.annealing import fit_annealing_file
from guidancekit.fitting import fit_linear_ag_file
from guidancekit.loading import EMBEDDED_SCALE, load_pipeline
from guidancekit.recipe import Recipe
from guidancekit.scoring import LatentScorer

from .models import LATENT_CHANNELS, TEXT_WIDTH, Denoiser, unet
from .recogniser import ABSENT, HEADS, targets
from .train import RUNS, Denoising, Noisy, train_denoiser
from .training import averaged_weights, fit, processes
from .world import COLOURS, SHAPES, Scene, caption, sample_scene

COMPANIONS = bundled.path("scenes-unet").with_name("scenes-unet-companions")
WEAK_WIDTHS = (32, 64)  # half of the model's: a quarter of its parameters
HEAD_BLOCK, HEAD_WIDTH = "down_blocks.1", 128  # a quarter of the way through the model
STEPS = 30  # of the runs that the annealing network is trained for: the command line's default
TABLES = (10, 20, 30, 50)  # numbers of steps with a LinearAG table
PROMPTS = 200  # that the tables are fitted to, as in the paper


def train_weak(folder: Path, minutes: float, device: str, compiled: bool) -> None:
    """A narrower U-Net, on the model's own text embeddings, for a fraction of the model's time."""
    pipe = embedded(device)
    model = Denoiser(pipe.text_encoder, unet(WEAK_WIDTHS))
    data = Denoising(folder, device, pipe.tokenizer)
    train_denoiser(model, data, folder / "weak.pt", minutes, device, compiled)


def train_head(folder: Path, minutes: float, device: str) -> None:
    """The noise, read from an early block of the frozen model."""
    pipe = embedded(device)
    data = Denoising(folder, device, pipe.tokenizer)

    def errors(model: nn.Module, batch: Noisy) -> dict[str, Tensor]:
        with torch.no_grad(), model.early(pipe.unet) as hidden:
            text = pipe.text_encoder(batch.tokens).last_hidden_state
            pipe.unet(batch.latents, batch.times, text)
        early = model(hidden[0].float(), batch.times, batch.latents.shape[-2:])
        return {data.asked: F.mse_loss(early.float(), batch.noise)}

    loss, check = data.objective(errors)
    path = folder / "head.pt"
    fit(head(), loss, path, minutes=minutes, rate=3e-3, decay=0.5, device=device, check=check)


def train_scorer(folder: Path, minutes: float, device: str) -> None:
    """Cross-entropy of every attribute, from imperfect latents and from captions."""
    pipe = embedded(device)
    data = Denoising(folder, device, pipe.tokenizer)
    answers = attributes(data.scenes)
    model = scorer()
    counts = [
        torch.bincount(answer, minlength=n)
        for answer, n in zip(answers.unbind(1), values(), strict=True)
    ]
    model.prior.copy_(torch.cat(counts) / len(answers))

    @torch.no_grad()
    def embeddings(chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        return pipe.text_encoder(data.tokens(chosen, rng)).last_hidden_state

    def surprise(logits: tuple[Tensor, ...], chosen: np.ndarray) -> Tensor:
        wanted = answers[chosen].to(device).unbind(1)
        each = [F.cross_entropy(a.float(), b) for a, b in zip(logits, wanted, strict=True)]
        return torch.stack(each).sum()

    def loss(model: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = data.choose(rng, 256 // processes())
        text = embeddings(chosen, rng)
        return {
            "latents": surprise(model.logits(degraded(data.clean(chosen))), chosen),
            "text": surprise(model.logits(text=text), chosen),
        }

    @torch.no_grad()
    def check(model: nn.Module) -> dict[str, float]:
        chosen = data.fixed
        latents, text = data.clean(chosen), embeddings(chosen, np.random.default_rng(0))
        found = torch.stack([each.argmax(1).cpu() for each in model.logits(latents)], dim=1)
        better = model(latents, text) > model(latents, text.roll(1, 0))
        return {
            "attributes right": float((found == answers[chosen]).float().mean()),
            "own caption above another": float(better.float().mean()),
        }

    path = folder / "scorer.pt"
    fit(model, loss, path, minutes=minutes, rate=2e-3, decay=0.5, device=device, check=check)


def degraded(latents: Tensor) -> Tensor:
    """What clean predictions look like: blurred early on, noisy, too weak or exaggerated."""
    n = len(latents)
    blur, level, gain = torch.rand(3, n, 1, 1, 1, device=latents.device)
    x = latents + blur * (F.avg_pool2d(latents, 3, 1, 1) - latents)
    return x * (0.7 + 0.8 * gain) + 0.5 * level.square() * torch.randn_like(x)


def attributes(scenes: list[Scene]) -> Tensor:
    """Every attribute of every scene as a number, (scenes, attributes); see `values`."""
    columns = [
        answer.masked_fill(answer == ABSENT, len(HEADS[name]))
        for name, answer in targets(scenes).items()
    ]
    for word in (*SHAPES, *COLOURS):
        present = [any(word in (t.shape, t.colour) for t in scene.objects) for scene in scenes]
        columns.append(torch.tensor(present).long())
    return torch.stack(columns, dim=1)


def values() -> list[int]:
    """How many values each attribute has: the recogniser's, absent where there is one thing only,
    and whether a shape or colour is anywhere in the picture, for captions without an order."""
    absent = [name == "relation" or name.endswith(" 1") for name in HEADS]
    heads = [len(words) + extra for words, extra in zip(HEADS.values(), absent, strict=True)]
    return heads + [2] * (len(SHAPES) + len(COLOURS))


class ScenePictures:
    """The scenes for training, as what the annealing network is trained on."""

    def __init__(self, data: Denoising) -> None:
        self.data = data
        self.asked = {"pictures": "scenes"}

    def __len__(self) -> int:
        return len(self.data.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        text = caption(self.data.scenes[index], np.random.default_rng(index), "train")
        return self.data.latents[index][None].float(), text


def train_annealing(folder: Path, minutes: float, device: str) -> None:
    """`guidancekit fit annealing`, on pictures of the world."""
    pipe = embedded(device)
    trained = fit_annealing_file(
        pipe,
        recipe(),
        ScenePictures(Denoising(folder, device, pipe.tokenizer)),
        folder / "annealing.safetensors",
        count=10**9,
        minutes=minutes,
    )
    print(trained)


def fit_linear_ag(folder: Path, minutes: float, device: str) -> None:
    """`guidancekit fit linear-ag`, on captions of the world."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(PROMPTS)]
    fitted = fit_linear_ag_file(
        embedded(device),
        recipe(),
        [caption(scene, rng, "train") for scene in scenes],
        folder / "linear-ag.json",
        scale=EMBEDDED_SCALE,
        steps=TABLES,
        minutes=minutes,
    )
    print(fitted)


def embedded(device: str) -> Any:
    """The exported pipeline, frozen."""
    pipe = load_pipeline(recipe(), device)
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


def recipe() -> Recipe:
    """What the companions are made for."""
    return Recipe(prompt="-", model="scenes-unet", steps=STEPS, guidance_scale=EMBEDDED_SCALE)


def head() -> InternalHead:
    return InternalHead(HEAD_BLOCK, HEAD_WIDTH, LATENT_CHANNELS, patch=2)


def scorer() -> LatentScorer:
    return LatentScorer(values(), LATENT_CHANNELS, TEXT_WIDTH)


# --- export -------------------------------------------------------------------------------------


def export(folder: Path, target: Path) -> None:
    """Write what there is in `folder` to where the methods look for it, in half precision."""
    models = {"weak": lambda: unet(WEAK_WIDTHS), "head": head, "scorer": scorer}
    for name, make in models.items():
        if (folder / f"{name}.pt").exists():
            weights = averaged_weights(folder / f"{name}.pt")
            part = "unet." if name == "weak" else ""
            model = make()
            model.load_state_dict(
                {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
            )
            model.half().save_pretrained(target / name)
    if (folder / "annealing.safetensors").exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "annealing.safetensors", target / "annealing.safetensors")
    if (folder / "linear-ag.json").exists():
        content = json.loads((folder / "linear-ag.json").read_text())
        del content["fit"]["products"], content["fit"]["asked"]["prompts"]
        (target / "linear-ag.json").write_text(json.dumps(content) + "\n")
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)
    total = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {total / 1e6:.2f} MB")


TRAINERS: dict[str, Callable[..., None]] = {
    "weak": train_weak,
    "head": train_head,
    "scorer": train_scorer,
    "annealing": train_annealing,
    "linear-ag": fit_linear_ag,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*TRAINERS, "export"))
    parser.add_argument("--minutes", type=float, help="wall-clock budget")
    parser.add_argument("--folder", type=Path, default=RUNS, help="latents and checkpoints")
    parser.add_argument("--target", type=Path, default=COMPANIONS, help="where to export to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="fuse the weak U-Net's operations (takes minutes)"
    )
    args = parser.parse_args()
    if args.what == "export":
        export(args.folder, args.target)
        return
    if args.minutes is None:
        parser.error("training needs --minutes")
    if "WORLD_SIZE" in os.environ:  # under torchrun
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    options = {"compiled": args.compile} if args.what == "weak" else {}
    TRAINERS[args.what](args.folder, args.minutes, args.device, **options)


if __name__ == "__main__":
    main()
