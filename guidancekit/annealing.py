"""Training the network of `AnnealingGuidance` on a model, from pictures and their prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from .engine.run import denoiser
from .errors import GuidanceError
from .files import written_whole
from .fitting import check_same_fit
from .generate import refusals
from .guidance import Guidance, State
from .methods.annealing import AnnealingGuidance, ScaleNetwork, difference, divisor_for
from .methods.cads import CADS
from .pictures import Pictures, encode
from .recipe import Recipe
from .step import Branch, Moment, Prediction, Step
from .tensors import norm

SAVE_SECONDS = 60


class AnnealingTrainer:
    """Trains a `ScaleNetwork` for one pipeline: for each picture one random step of its grid.

    >>> trainer = AnnealingTrainer(pipe, steps=50)
    >>> for image, prompt in pictures:
    ...     trainer.train(trainer.encode(image), prompt)
    >>> guidance = trainer.save("annealing.safetensors")

    A noisy picture takes one guided, annealed step; `alignment` (lambda, drawn anew each time)
    trades that the branches agree after it, L_delta, for that the guided noise is the true one,
    L_eps: (1 - lambda) L_eps + r lambda L_delta. The model itself stays as it is, but must be
    differentiable by its input.

    Known second-hand only (a third party's training code): r = EMA(L_eps) / EMA(L_delta), where
    both are weighted by lambda, the condition noise (that of CADS, from 0 to 1 with 0.025), AdamW
    at 1e-3 with decay 0.01, gradients clipped at 1, sums of 16 pictures, up to 20,000 pictures.
    Cost: 4 network evaluations and one backward pass per picture.
    """

    def __init__(
        self,
        pipe: Any,
        steps: int = 50,
        *,
        divisor: float | None = None,
        accumulate: int = 16,
        learning_rate: float = 1e-3,
        condition_noise: float = 0.025,
        seed: int = 0,
    ) -> None:
        self.pipe, self.steps, self.accumulate = pipe, steps, accumulate
        self.condition_noise = condition_noise
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ScaleNetwork(divisor).to(denoiser(pipe).device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=learning_rate, weight_decay=0.01
        )
        self.seen = 0
        self.averages: list[float] = []

    def encode(self, image: Any) -> Tensor:
        """The clean latent [1, C, h, w] of a picture: an image, or a tensor [3, H, W] in [0, 1]."""
        return encode(self.pipe, image)

    def train(
        self, latents: Tensor, prompt: str | Mapping[str, Any], alignment: float | None = None
    ) -> dict[str, float]:
        """One picture: its clean latent [1, C, h, w], and its prompt or arguments of the pipeline.

        Every `accumulate` pictures the network takes an optimiser step. Returns the two losses.
        """
        if latents.ndim != 4 or latents.shape[0] != 1:
            raise GuidanceError(
                f"train: found latents {list(latents.shape)}, expected one picture [1, C, h, w]."
            )
        if self.network.divisor is None:
            self.network.divisor = divisor_for(latents)
        chosen = int(torch.randint(self.steps - 1, (), generator=self.generator))
        if alignment is None:
            alignment = float(torch.rand((), generator=self.generator))
        item = _Item(self, latents.to(denoiser(self.pipe).device), alignment, chosen)
        factor = getattr(self.pipe, "vae_scale_factor", 8)
        with _frozen(denoiser(self.pipe)), item.attach(self.pipe):
            self.pipe(
                **(prompt if isinstance(prompt, Mapping) else {"prompt": prompt}),
                num_inference_steps=self.steps,
                guidance_scale=2.0,  # so that both branches exist
                height=factor * latents.shape[-2],
                width=factor * latents.shape[-1],
                output_type="latent",
                callback_on_step_end=item.stop,
            )
        self.seen += 1
        if self.seen % self.accumulate == 0:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return item.losses

    def balance(self, noise_loss: float, delta_loss: float) -> float:
        """r, from running means of the two losses."""
        now = [noise_loss, delta_loss]
        pairs = zip(self.averages or now, now, strict=True)
        self.averages = [0.999 * before + 0.001 * after for before, after in pairs]
        return min(self.averages[0] / max(self.averages[1], 1e-12), 1e4)

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on changes: give it to `load_state_dict` to train on."""
        gradients = {k: p.grad for k, p in self.network.named_parameters() if p.grad is not None}
        return {
            "network": self.network.state_dict(),
            "divisor": self.network.divisor,
            "optimizer": self.optimizer.state_dict(),
            "gradients": gradients,
            "generator": self.generator.get_state(),
            "averages": list(self.averages),
            "seen": self.seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.network.divisor = state["divisor"]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.network.named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.clone().to(parameter.device)
        self.generator.set_state(state["generator"])
        self.averages, self.seen = list(state["averages"]), state["seen"]

    def save(self, file: str | Path) -> AnnealingGuidance:
        """Write the network to a .safetensors file; the guidance that uses it."""
        if Path(file).suffix != ".safetensors":
            raise GuidanceError(f"save: found {str(file)!r}, expected a name in .safetensors.")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        metadata = {"divisor": repr(self.network.divisor).replace("None", "null")}
        metadata |= {"steps": str(self.steps), "pictures": str(self.seen)}
        with written_whole(Path(file)) as opened:
            opened.write(serialize(weights, metadata=metadata))
        return AnnealingGuidance(str(file))


class _Item(Guidance):
    """A run in which one step is a training step; the others evaluate nothing."""

    evaluates = ("uncond",)

    def __init__(self, *given: Any) -> None:
        self.trainer, self.latents, self.alignment, self.chosen = given
        self.losses: dict[str, float] = {}

    def __repr__(self) -> str:
        return "AnnealingTrainer"

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return ()

    def guide(self, step: Step, state: State) -> Prediction:
        if step.index == self.chosen and step.stage == 0:
            self.losses = self._train(step)
        return step.predict(out=torch.zeros_like(step.x))

    def stop(self, pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out the steps after the training step."""
        if self.losses:
            pipe._interrupt = True
        return values

    def _train(self, step: Step) -> dict[str, float]:
        trainer, lam = self.trainer, self.alignment
        seed = int(torch.randint(2**31, (), generator=trainer.generator))
        noise = torch.randn(self.latents.shape, generator=trainer.generator).to(self.latents)
        x = step.alpha * self.latents + step.sigma * noise
        given = step.conditions("cond")
        if trainer.condition_noise:
            annealed = CADS(1.0, 0.0, 1.0, trainer.condition_noise, seed=seed)
            given = annealed.condition(step, "cond", given, SimpleNamespace())
        cond = step.evaluate("cond", x=x, conditions=given or None)
        uncond = step.evaluate("uncond", x=x)
        delta = difference(cond, uncond)
        after = step.next_level
        timestep = step.flow_timestep(after.sigma) if step.kind == "flow" else step.next_timestep
        there = {"timestep": timestep, "level": after}
        with torch.enable_grad():
            w = trainer.network(step.time, norm(delta) / trainer.network.divisor, lam)
            x0 = uncond.x0 + w * (cond.x0 - uncond.x0)
            guided = Prediction.from_x0(x0, x, step.level, step.kind)
            truth = Prediction.from_x0(self.latents, x, step.level, step.kind)
            moved = after.alpha * x0 + after.sigma * uncond.eps
            agreed = difference(
                step.evaluate("cond", x=moved, **there), step.evaluate("uncond", x=moved, **there)
            )
            noise_loss = (1 - lam) * difference(guided, truth).square().mean()
            delta_loss = lam * agreed.square().mean()
            r = trainer.balance(noise_loss.item(), delta_loss.item())
            ((noise_loss + r * delta_loss) / trainer.accumulate).backward()
        return {"noise": noise_loss.item(), "delta": delta_loss.item(), "w": w.item()}


@contextmanager
def _frozen(network: torch.nn.Module) -> Iterator[None]:
    """The network's parameters without gradients, inside."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Trained:
    """A file with an annealing network, and what it was trained on so far."""

    path: Path
    pictures: int
    means: dict[str, float]
    """Over this call, of the losses "noise" and "delta" (times their weights), and of "w"."""


def fit_annealing_file(
    pipe: Any,
    base: Recipe,
    pictures: Pictures,
    out: Path,
    *,
    count: int = 2000,
    accumulate: int = 16,
    minutes: float | None = None,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Trained:
    """Train on `count` pictures, again and again the same if there are fewer; write a file.

    `base` says which model, scheduler and number of steps `pipe` was loaded for. The file and its
    sibling in .training.pt, from which an interrupted training goes on when it is started again,
    are written every minute and at the end, Ctrl-C included. `minutes` limits this call. Calls
    `advance` for each picture. Raises `GuidanceError` if the files belong to another training.
    """
    trainer = AnnealingTrainer(pipe, base.steps, accumulate=accumulate, seed=seed)
    of_model = {name: getattr(base, name) for name in ("model", "scheduler", "steps")}
    asked = {**of_model, **pictures.asked, "seed": seed}
    kept = out.with_suffix(".training.pt")
    if kept.exists():
        _resume(trainer, kept, asked)
    for _ in range(trainer.seen):
        advance()

    def save() -> None:
        trainer.save(out)
        with written_whole(kept) as file:
            torch.save({"asked": asked, **trainer.state_dict()}, file)

    started = saved = time.monotonic()
    losses: list[dict[str, float]] = []
    try:
        while trainer.seen < count:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
            with refusals(pipe):
                losses.append(trainer.train(*pictures[trainer.seen % len(pictures)]))
            advance()
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        if losses:
            save()
    names = losses[0] if losses else ()
    means = {name: sum(one[name] for one in losses) / len(losses) for name in names}
    return Trained(out, trainer.seen, means)


def _resume(trainer: AnnealingTrainer, kept: Path, asked: Mapping[str, Any]) -> None:
    """Go on from a file; raises `GuidanceError` if it belongs to another training."""
    try:
        state = torch.load(kept, map_location="cpu", weights_only=True)
        before = dict(state["asked"])
        if before == asked:
            trainer.load_state_dict(state)
    except Exception as error:  # of several libraries
        raise GuidanceError(
            f"{kept} is not what `guidancekit fit annealing` wrote: delete it, or give another "
            "--out."
        ) from error
    check_same_fit(kept, before, asked)
