"""Trains what some methods need beside an embedded model, within wall-clock budgets.

The model must have been exported, since its companions are made for its very weights. Run it as::

    torchrun --nproc-per-node 2 -m samples.scenes.companions weak --minutes 8
    python -m samples.scenes.companions head --minutes 3
    python -m samples.scenes.companions scorer --minutes 3
    python -m samples.scenes.companions annealing --minutes 5
    python -m samples.scenes.companions linear-ag --minutes 3
    python -m samples.scenes.companions export

with `--model scenes-flow` for those of the flow model. An interrupted run goes on from its
checkpoint in `--folder` when started again; for the last two, `--minutes` counts from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guidancekit import InternalHead, bundled
from guidancekit.annealing import fit_annealing_file
from guidancekit.engine.run import denoiser
from guidancekit.fitting import fit_linear_ag_file
from guidancekit.loading import EMBEDDED_SCALE, load_pipeline
from guidancekit.recipe import Recipe
from guidancekit.scoring import LatentScorer

from .models import LATENT_CHANNELS, TEXT_WIDTH, Denoiser, FlowDenoiser, transformer, unet
from .recogniser import ABSENT, HEADS, targets
from .train import (
    RUNS,
    Denoising,
    FlowDenoising,
    Noisy,
    train_denoiser,
    train_flow_denoiser,
)
from .training import averaged_weights, fit, processes
from .world import COLOURS, SHAPES, Scene, caption, sample_scene

STEPS = 30  # of the runs that the annealing network is trained for: the command line's default
TABLES = (10, 20, 30, 50)  # numbers of steps with a LinearAG table
PROMPTS = 200  # that the tables are fitted to, as in the paper


@dataclass(frozen=True)
class Model:
    """An embedded model, and what its companions are made from.

    `together` makes one module of a pipeline's text encoders and a network, `weak` a weaker
    network, `train` trains the two; `head` reads from a block early in the model's own network.
    """

    name: str
    data: type[Denoising]
    together: Callable[[Any, nn.Module], nn.Module]
    weak: Callable[[], nn.Module]
    train: Callable[..., None]
    head: Callable[[], InternalHead]
    text_width: int

    @property
    def companions(self) -> Path:
        """Where the methods look for them."""
        return bundled.path(self.name).with_name(f"{self.name}-companions")

    @property
    def recipe(self) -> Recipe:
        """What the companions are made for."""
        return Recipe(prompt="-", model=self.name, steps=STEPS, guidance_scale=EMBEDDED_SCALE)

    def kept(self, folder: Path) -> Path:
        """Where their checkpoints are."""
        (folder / self.name).mkdir(parents=True, exist_ok=True)
        return folder / self.name

    def load(self, device: str) -> Any:
        """The exported pipeline, frozen."""
        pipe = load_pipeline(self.recipe, device)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        return pipe


MODELS = {
    model.name: model
    for model in (
        Model(
            "scenes-unet",
            Denoising,
            lambda pipe, network: Denoiser(pipe.text_encoder, network),
            lambda: unet((32, 64)),  # half of the model's widths: a quarter of its parameters
            train_denoiser,
            lambda: InternalHead("down_blocks.1", 128, LATENT_CHANNELS, patch=2),
            TEXT_WIDTH,
        ),
        Model(
            "scenes-flow",
            FlowDenoising,
            lambda pipe, network: FlowDenoiser(pipe.text_encoder, pipe.text_encoder_2, network),
            lambda: transformer(layers=3, heads=3),  # a quarter of the parameters too
            train_flow_denoiser,
            lambda: InternalHead("transformer_blocks.1", 160, LATENT_CHANNELS, patch=2),
            2 * TEXT_WIDTH,
        ),
    )
}


def train_weak(model: Model, folder: Path, minutes: float, device: str, compiled: bool) -> None:
    """A smaller network, on the model's own text embeddings, for a fraction of its time."""
    pipe = model.load(device)
    data = model.data(folder, device, pipe.tokenizer)
    both = model.together(pipe, model.weak())
    model.train(both, data, model.kept(folder) / "weak.pt", minutes, device, compiled)


def train_head(model: Model, folder: Path, minutes: float, device: str) -> None:
    """The model's answer, read from an early block of its frozen network."""
    pipe = model.load(device)
    data = model.data(folder, device, pipe.tokenizer)
    network = denoiser(pipe)
    both = model.together(pipe, network)

    def errors(head: nn.Module, batch: Noisy) -> dict[str, Tensor]:
        with torch.no_grad(), head.early(network) as hidden:
            both(batch.latents, batch.times, batch.tokens)
        early = head(hidden[0].float(), batch.times, batch.latents.shape[-2:])
        return {data.asked: F.mse_loss(early.float(), data.answer(batch))}

    loss, check = data.objective(errors)
    path = model.kept(folder) / "head.pt"
    fit(model.head(), loss, path, minutes=minutes, rate=3e-3, decay=0.5, device=device, check=check)


def train_scorer(model: Model, folder: Path, minutes: float, device: str) -> None:
    """Cross-entropy of every attribute, from imperfect latents and from captions."""
    pipe = model.load(device)
    data = model.data(folder, device, pipe.tokenizer)
    both = model.together(pipe, denoiser(pipe))
    answers = attributes(data.scenes)
    new = scorer(model)
    counts = [
        torch.bincount(answer, minlength=n)
        for answer, n in zip(answers.unbind(1), values(), strict=True)
    ]
    new.prior.copy_(torch.cat(counts) / len(answers))

    @torch.no_grad()
    def embeddings(chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        return both.text(data.tokens(chosen, rng))

    def surprise(logits: tuple[Tensor, ...], chosen: np.ndarray) -> Tensor:
        wanted = answers[chosen].to(device).unbind(1)
        each = [F.cross_entropy(a.float(), b) for a, b in zip(logits, wanted, strict=True)]
        return torch.stack(each).sum()

    def loss(scorer: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = data.choose(rng, 256 // processes())
        text = embeddings(chosen, rng)
        return {
            "latents": surprise(scorer.logits(degraded(data.clean(chosen))), chosen),
            "text": surprise(scorer.logits(text=text), chosen),
        }

    @torch.no_grad()
    def check(scorer: nn.Module) -> dict[str, float]:
        chosen = data.fixed
        latents, text = data.clean(chosen), embeddings(chosen, np.random.default_rng(0))
        found = torch.stack([each.argmax(1).cpu() for each in scorer.logits(latents)], dim=1)
        better = scorer(latents, text) > scorer(latents, text.roll(1, 0))
        return {
            "attributes right": float((found == answers[chosen]).float().mean()),
            "own caption above another": float(better.float().mean()),
        }

    path = model.kept(folder) / "scorer.pt"
    fit(new, loss, path, minutes=minutes, rate=2e-3, decay=0.5, device=device, check=check)


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

    def __init__(self, data: Denoising, call: Mapping[str, Any]) -> None:
        self.data = data
        self.call = call
        self.asked = {"pictures": "scenes"}

    def __len__(self) -> int:
        return len(self.data.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        text = caption(self.data.scenes[index], np.random.default_rng(index), "train")
        return self.data.latents[index][None].float(), {"prompt": text, **self.call}


def train_annealing(model: Model, folder: Path, minutes: float, device: str) -> None:
    """`guidancekit fit annealing`, on pictures of the world."""
    pipe = model.load(device)
    data = model.data(folder, device, pipe.tokenizer)
    trained = fit_annealing_file(
        pipe,
        model.recipe,
        ScenePictures(data, bundled.CALL.get(model.name, {})),
        model.kept(folder) / "annealing.safetensors",
        count=10**9,
        minutes=minutes,
    )
    print(trained)


def fit_linear_ag(model: Model, folder: Path, minutes: float, device: str) -> None:
    """`guidancekit fit linear-ag`, on captions of the world."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(PROMPTS)]
    fitted = fit_linear_ag_file(
        model.load(device),
        model.recipe,
        [caption(scene, rng, "train") for scene in scenes],
        model.kept(folder) / "linear-ag.json",
        scale=EMBEDDED_SCALE,
        steps=TABLES,
        minutes=minutes,
    )
    print(fitted)


def scorer(model: Model) -> LatentScorer:
    return LatentScorer(values(), LATENT_CHANNELS, model.text_width)


# --- export -------------------------------------------------------------------------------------


def export(model: Model, folder: Path, target: Path) -> None:
    """Write what there is to `target`, in half precision."""
    kept = model.kept(folder)
    for name, new in {"weak": model.weak(), "head": model.head(), "scorer": scorer(model)}.items():
        if (kept / f"{name}.pt").exists():
            weights = averaged_weights(kept / f"{name}.pt")
            if name == "weak":  # without the text encoders, which are the model's own
                weights = {
                    key.partition(".")[2]: value
                    for key, value in weights.items()
                    if key.startswith(("unet.", "transformer."))
                }
            new.load_state_dict(weights)
            new.half().save_pretrained(target / name)
    if (kept / "annealing.safetensors").exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept / "annealing.safetensors", target / "annealing.safetensors")
    if (kept / "linear-ag.json").exists():
        content = json.loads((kept / "linear-ag.json").read_text())
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
    parser.add_argument("--model", choices=MODELS, default="scenes-unet")
    parser.add_argument("--minutes", type=float, help="wall-clock budget")
    parser.add_argument("--folder", type=Path, default=RUNS, help="latents and checkpoints")
    parser.add_argument("--target", type=Path, help="where to export to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="fuse the weak network's operations (takes minutes)"
    )
    args = parser.parse_args()
    model = MODELS[args.model]
    if args.what == "export":
        export(model, args.folder, args.target or model.companions)
        return
    if args.minutes is None:
        parser.error("training needs --minutes")
    if "WORLD_SIZE" in os.environ:  # under torchrun
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    options = {"compiled": args.compile} if args.what == "weak" else {}
    TRAINERS[args.what](model, args.folder, args.minutes, args.device, **options)


if __name__ == "__main__":
    main()
