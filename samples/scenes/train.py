"""Trains the four models of the scenes sample, each within a wall-clock budget.

Run it as::

    python -m samples.scenes.train autoencoder --minutes 25
    python -m samples.scenes.train recogniser --minutes 8
    python -m samples.scenes.train unet --minutes 90
    python -m samples.scenes.train flow --minutes 90

or, with one process per core, which a compiled network on a CPU prefers to one of many threads::

    torchrun --nproc-per-node 2 -m samples.scenes.train unet --minutes 90 --compile

A run that was interrupted goes on from its checkpoint in `--folder` when started again.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from .data import kept_pool, render_pool
from .models import (
    MIDDLE,
    Denoiser,
    FlowDenoiser,
    autoencoder,
    flow_denoiser,
    fold_normalisation,
    scheduler,
    text_encoder,
    tokenizer,
    unet,
)
from .recogniser import ABSENT, HEADS, Recogniser, targets
from .recogniser import load as load_recogniser
from .training import averaged_weights, fit, processes
from .world import Scene, caption

RUNS = Path("samples/out/scenes")  # checkpoints
TRAIN_SEED, CHECK_SEED = 1, 2
CHECK_COUNT = 512
EMPTY = 0.1  # captions replaced by "": what classifier-free guidance extrapolates from
POOL = 80_000  # scenes to learn from
ALIGNMENT = 0.5  # weight of the likeness to what the recogniser sees, as in the paper
UNIFORM = 0.2  # of the flow model's noise levels, see `FlowDenoising`
RELATED = 0.3  # of the captions of two things name the relation, see `Denoising.tokens`
UNKNOWN = 0.01  # words replaced by the unknown token, so that it has a meaning
BATCH = 96  # for the denoisers, over all processes


def to_tensor(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 (n, 64, 64, 3) to float (n, 3, 64, 64) in [-1, 1], laid out channels last."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def train_autoencoder(folder: Path, minutes: float, device: str) -> None:
    """L1 on pixels and on their differences; noise on the latents makes the decoder forgiving.

    L1 alone is content to draw a black background in dark green; a squared error of the picture
    at an eighth of its size is not.

    A small penalty keeps the latents near zero mean and unit deviation per channel; what is left
    is folded into the encoder's last convolution at export.
    """
    _, pictures = render_pool(30_000, TRAIN_SEED)
    fresh = to_tensor(render_pool(CHECK_COUNT, CHECK_SEED)[1], device)

    def loss(model: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
        x = to_tensor(pictures[rng.integers(len(pictures), size=16)], device)
        z = model.encoder(x).float()
        y = model.decoder(z + 0.05 * torch.randn_like(z)).float()
        error = y - x
        variance, mean = torch.var_mean(z, dim=(0, 2, 3))
        return {
            "pixels": error.abs().mean(),
            "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
            "colours": 10 * F.avg_pool2d(error, 8).square().mean(),
            "spread": 0.02 * (mean.square() + (variance.sqrt() - 1).square()).mean(),
        }

    @torch.no_grad()
    def check(model: nn.Module) -> dict[str, float]:
        z = model.encoder(fresh)
        spread = z.std(dim=(0, 2, 3))
        return {
            "psnr": psnr(model.decoder(z), fresh),
            "least std": float(spread.min()),
            "most std": float(spread.max()),
        }

    fit(
        autoencoder(),
        loss,
        folder / "autoencoder.pt",
        minutes=minutes,
        rate=3e-3,
        decay=0.5,
        device=device,
        check=check,
    )


def degrade(pictures: Tensor, vae: nn.Module, rng: np.random.Generator) -> Tensor:
    """What a recogniser has to see through: decoded, blurred and noisy pictures, wrong exposure.

    A quarter of the batch goes through the autoencoder with noisy latents, a quarter is blurred;
    all get some noise, brightness and contrast.
    """
    n = len(pictures) // 4
    x = pictures.clone()
    z = vae.encoder(x[:n])
    x[:n] = vae.decoder(z + rng.uniform(0, 0.35) * torch.randn_like(z)).float().clamp(-1, 1)
    x[n : 2 * n] += rng.uniform(0, 1) * (F.avg_pool2d(x[n : 2 * n], 3, 1, 1) - x[n : 2 * n])
    level, gain, shift = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x * (0.92 + 0.16 * gain) + 0.08 * (shift - 0.5)
    return x + 0.08 * level.square() * torch.randn_like(x)


def train_recogniser(folder: Path, minutes: float, device: str) -> None:
    """Cross-entropy per attribute, on degraded pictures."""
    vae = load_autoencoder(folder, device)
    scenes, pictures = kept_pool(folder, POOL, TRAIN_SEED)
    answers = targets(scenes)
    fresh_scenes, fresh_pictures = render_pool(3 * CHECK_COUNT, CHECK_SEED)
    fresh, fresh_answers = to_tensor(fresh_pictures, device), targets(fresh_scenes)

    def loss(model: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = rng.integers(len(pictures), size=128)
        with torch.no_grad():
            x = degrade(to_tensor(pictures[chosen], device), vae, rng)
        logits = model(x)
        return {
            head: F.cross_entropy(logits[head].float(), answers[head][chosen].to(device))
            for head in HEADS
        }

    @torch.no_grad()
    def check(model: nn.Module) -> dict[str, float]:
        figures = {}
        for kind in ("", " decoded"):
            parts = fresh.split(64)  # small ones: full resolution features are large
            if kind:
                parts = [vae.decoder(vae.encoder(x)) for x in parts]
            found = [model(x) for x in parts]
            for head in HEADS:
                known = fresh_answers[head] != ABSENT
                seen = torch.cat([logits[head].argmax(1) for logits in found]).cpu()
                right = seen[known] == fresh_answers[head][known]
                figures[head + kind] = float(right.float().mean())
        return figures

    fit(
        Recogniser(),
        loss,
        folder / "recogniser.pt",
        minutes=minutes,
        rate=2e-3,
        decay=0.6,
        device=device,
        check=check,
    )


class Noisy(NamedTuple):
    """A batch to denoise: latents (n, 8, 16, 16) at timesteps, captions, and what was mixed."""

    latents: Tensor
    times: Tensor
    tokens: Tensor
    noise: Tensor
    clean: Tensor


class Denoising:
    """What denoisers learn from: noisy latents of the scenes, with captions drawn anew each time.

    `words` is the tokenizer. The last `CHECK_COUNT` scenes are for checks. This is the process of
    the U-Net's scheduler, and the noise is asked for.
    """

    asked = "noise"

    def __init__(self, folder: Path, device: str, words: Any) -> None:
        self.words, self.device = words, device
        self.scenes, latents = latent_pool(folder, device)
        self.latents = latents.to(device)
        self.fixed = np.arange(len(self.scenes) - CHECK_COUNT, len(self.scenes))

    @functools.cached_property
    def signal(self) -> Tensor:
        """The share of the picture in the variance, per timestep."""
        return scheduler().alphas_cumprod.to(self.device)

    def times(self, count: int) -> Tensor:
        """Random timesteps."""
        return torch.randint(len(self.signal), (count,), device=self.device)

    def spread_times(self) -> Tensor:
        """Timesteps for the scenes for checks, evenly spread."""
        return torch.linspace(0, len(self.signal) - 1, CHECK_COUNT, device=self.device).long()

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of picture and noise."""
        signal = self.signal[times]
        return signal.sqrt(), (1 - signal).sqrt()

    def answer(self, batch: Noisy) -> Tensor:
        """What a network should predict."""
        return batch.noise

    def draw(self, rng: np.random.Generator, count: int) -> Noisy:
        """A batch of scenes at random timesteps."""
        chosen = self.choose(rng, count)
        times = self.times(count)
        noise = torch.randn(count, *self.latents.shape[1:], device=self.device)
        return self._noisy(chosen, times, noise, self.tokens(chosen, rng))

    def fresh(self) -> Noisy:
        """The scenes for checks, always the same batch."""
        fixed_draws = torch.Generator().manual_seed(0)
        noise = torch.randn(CHECK_COUNT, *self.latents.shape[1:], generator=fixed_draws)
        ids = self.tokens(self.fixed, np.random.default_rng(0))
        return self._noisy(self.fixed, self.spread_times(), noise.to(self.device), ids)

    def objective(
        self, errors: Callable[[nn.Module, Noisy], dict[str, Tensor]]
    ) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, float]]]:
        """What `fit` takes as loss and check: the errors, on new and kept scenes."""

        def loss(model: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
            return errors(model, self.draw(rng, BATCH // processes()))

        @torch.no_grad()
        def check(model: nn.Module) -> dict[str, float]:
            found = errors(model, self.fresh())
            return {f"fresh {name}": float(value) for name, value in found.items()}

        return loss, check

    def errors(self, model: nn.Module, batch: Noisy) -> dict[str, Tensor]:
        """The mean squared error of what is asked for."""
        predicted = model(batch.latents, batch.times, batch.tokens)
        return {self.asked: F.mse_loss(predicted.float(), self.answer(batch))}

    def choose(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Numbers of scenes to learn from."""
        return rng.integers(len(self.scenes) - CHECK_COUNT, size=count)

    def clean(self, chosen: np.ndarray) -> Tensor:
        """Latents of scenes, float32."""
        return self.latents[chosen].float().contiguous(memory_format=torch.channels_last)

    def tokens(self, chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Captions of scenes as token numbers, some of them empty, some words unknown.

        Most are silent on the relation. Such a caption leaves it to the picture which thing goes
        where, and is the hardest to learn: the two ends of the picture have to agree.
        """
        texts = [
            caption(self.scenes[i], rng, "train", RELATED) if rng.random() >= EMPTY else ""
            for i in chosen
        ]
        ids = self.words(texts, padding="max_length", return_tensors="pt").input_ids
        unknown = self.words.unk_token_id
        lost = torch.from_numpy(rng.random(ids.shape) < UNKNOWN) & (ids > unknown)
        return ids.masked_fill(lost, unknown).to(self.device)

    def _noisy(self, chosen: np.ndarray, times: Tensor, noise: Tensor, tokens: Tensor) -> Noisy:
        x = self.clean(chosen)
        alpha, sigma = (level[:, None, None, None] for level in self.levels(times))
        return Noisy(alpha * x + sigma * noise, times, tokens, noise, x)


class FlowDenoising(Denoising):
    """The same for rectified flow: x + sigma (noise - x), timestep 1000 sigma; asks for noise - x.

    Sigma is logit-normal, the best of the densities in arXiv:2403.03206, but uniform for a fifth:
    by itself the logit-normal one leaves the first of 30 steps to one sample in 2700, and there
    guidance decides on the background and on how many things there are.
    """

    asked = "velocity"

    def times(self, count: int) -> Tensor:
        normal = torch.randn(count, device=self.device).sigmoid()
        uniform, lot = torch.rand(2, count, device=self.device)
        return 1000 * torch.where(lot < UNIFORM, uniform, normal)

    def spread_times(self) -> Tensor:
        return torch.linspace(1, 1000, CHECK_COUNT, device=self.device)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times / 1000
        return 1 - sigma, sigma

    def answer(self, batch: Noisy) -> Tensor:
        return batch.noise - batch.clean


class AlignedFlowDenoising(FlowDenoising):
    """The same with a second thing asked for.

    Patches learn colours at once and shapes late, for there is little squared error in an edge. So
    the middle of the network has to say, too, what the recogniser sees at each patch of the clean
    picture (representation alignment, arXiv:2410.06940).
    """

    def __init__(self, folder: Path, device: str, words: Any) -> None:
        super().__init__(folder, device, words)
        self.decoder = load_autoencoder(folder).to(device).decoder
        self.recogniser = load_recogniser().to(device).layers[:5]
        seen = self._seen(self.clean(self.fixed))
        self.usual = torch.std_mean(seen, (0, 1))

    @torch.no_grad()
    def _seen(self, clean: Tensor) -> Tensor:
        features = self.recogniser(self.decoder(clean))
        return features.float().flatten(2).transpose(1, 2)

    def errors(self, model: nn.Module, batch: Noisy) -> dict[str, Tensor]:
        """That of the velocity, and how unlike the middle is to what is seen (n, patches, SEEN)."""
        with model.middle() as hidden:
            found = super().errors(model, batch)
        deviation, mean = self.usual
        seen = (self._seen(batch.clean) - mean) / deviation
        alike = F.cosine_similarity(model.projector(hidden[0]).float(), seen, dim=-1)
        return {**found, "unlike": ALIGNMENT * (1 - alike.mean())}


def train_unet(folder: Path, minutes: float, device: str, compiled: bool = False) -> None:
    """Predict the noise in latents from them, the timestep and a caption."""
    words = tokenizer()
    model = Denoiser(text_encoder(len(words)), unet())
    data = Denoising(folder, device, words)
    train_denoiser(model, data, folder / "unet.pt", minutes, device, compiled)


def train_denoiser(
    model: Denoiser, data: Denoising, path: Path, minutes: float, device: str, compiled: bool
) -> None:
    """Train with a U-Net; parts of the model may be frozen."""
    # Over this few positions, the backward pass of fused attention is the slower one by far.
    model.unet.set_attn_processor(AttnProcessor())
    model.text_encoder.set_attn_implementation("eager")
    if compiled:
        compile_unet(model.unet)
    fit_denoiser(model, data, path, minutes, device)


def train_flow(folder: Path, minutes: float, device: str, compiled: bool = False) -> None:
    """Predict the velocity of latents on their way to noise, from them, sigma and a caption."""
    words = tokenizer()
    model = flow_denoiser(len(words))
    data = AlignedFlowDenoising(folder, device, words)
    train_flow_denoiser(model, data, folder / "flow.pt", minutes, device, compiled)


def train_flow_denoiser(
    model: FlowDenoiser,
    data: FlowDenoising,
    path: Path,
    minutes: float,
    device: str,
    compiled: bool,
) -> None:
    """Train with a joint transformer; parts of the model may be frozen."""
    model.text_encoder.set_attn_implementation("eager")
    model.text_encoder_2.set_attn_implementation("eager")
    if compiled:
        blocks = model.transformer.transformer_blocks
        for block in (*blocks[:MIDDLE], *blocks[MIDDLE + 1 :]):  # alike, so this compiles two
            block.compile()
    fit_denoiser(model, data, path, minutes, device)


def fit_denoiser(
    model: nn.Module, data: Denoising, path: Path, minutes: float, device: str
) -> None:
    """To say what `data` asks for, given noisy latents, times and tokens."""
    loss, check = data.objective(data.errors)
    fit(
        model,
        loss,
        path,
        minutes=minutes,
        rate=1e-3,
        decay=0.4,
        device=device,
        check=check,
    )


def compile_unet(unet: UNet2DConditionModel) -> None:
    """Compile a U-Net, with upsampling written out.

    The compiled backward pass of `interpolate` (bfloat16, CPU, torch 2.13) is zero: everything
    below it would never learn.
    """
    for layer in unet.modules():
        if isinstance(layer, Upsample2D):
            layer.forward = functools.partial(upsample, layer)
    unet.compile()


def upsample(layer: Upsample2D, x: Tensor, output_size: int | None = None) -> Tensor:
    """What `layer` makes of x, (n, c, h, w), at twice the size."""
    n, c, h, w = x.shape
    doubled = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(n, c, 2 * h, 2 * w)
    return layer.conv(doubled)


@torch.no_grad()
def load_autoencoder(folder: Path, device: str = "cpu") -> AutoencoderTiny:
    """The trained autoencoder, its latents normalised per channel over fresh scenes."""
    vae = autoencoder().eval().requires_grad_(False)
    vae.load_state_dict(averaged_weights(folder / "autoencoder.pt"))
    pictures = to_tensor(render_pool(2000, CHECK_SEED)[1])
    latents = torch.cat([vae.encoder(part) for part in pictures.split(250)])
    fold_normalisation(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    return vae.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def latent_pool(folder: Path, device: str) -> tuple[list[Scene], Tensor]:
    """Scenes and their latents, float16 of shape (POOL, 8, 16, 16); made once, then read back."""
    path = folder / "latents.pt"
    if not path.exists():
        vae = load_autoencoder(folder, device)
        scenes, pictures = kept_pool(folder, POOL, TRAIN_SEED)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            parts = [
                vae.encoder(to_tensor(pictures[i : i + 50], device)).half().cpu()
                for i in range(0, POOL, 50)
            ]
        torch.save((scenes, torch.cat(parts)), path)
    return torch.load(path, weights_only=False)


DENOISERS = {"unet": train_unet, "flow": train_flow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("autoencoder", "recogniser", *DENOISERS))
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock budget")
    parser.add_argument("--folder", type=Path, default=RUNS, help="checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="fuse a denoiser's operations first (takes minutes)"
    )
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # under torchrun
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    if args.model == "autoencoder":
        train_autoencoder(args.folder, args.minutes, args.device)
    elif args.model == "recogniser":
        train_recogniser(args.folder, args.minutes, args.device)
    else:
        DENOISERS[args.model](args.folder, args.minutes, args.device, args.compile)


if __name__ == "__main__":
    main()
