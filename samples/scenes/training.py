"""The training loop all three models share: a wall-clock budget, an average, checkpoints, a log."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn

WARMUP_STEPS = 200
LOG_SECONDS = 20
SAVE_SECONDS = 240


def learning_rate(step: int, spent: float, decay: float) -> float:
    """The rate as a fraction of its peak: warm-up by steps, constant, then linearly down to 0.

    `spent` is the part of the time budget that is used up, so the final descent is complete
    however fast the machine was; `decay` is the part of the budget the descent takes.
    """
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.0, (1 - spent) / decay))


def processes() -> int:
    """How many processes share this run (``torchrun --nproc-per-node``)."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, np.random.Generator], dict[str, Tensor]],
    path: Path,
    *,
    minutes: float,
    rate: float,
    decay: float = 0.35,
    average: float = 0.999,
    device: str = "cpu",
    check: Callable[[nn.Module], dict[str, float]] | None = None,
) -> nn.Module:
    """Train for a wall-clock budget and return the exponential moving average of the weights.

    `loss` draws a batch and returns named terms; their sum is minimised, under bfloat16 autocast.
    `check` measures the averaged model and runs with every checkpoint. When `path` exists, the
    run goes on from there with its optimiser, averages, random states and time spent. Several
    processes each draw batches of their own and share gradients; the first one writes.
    """
    rank = distributed.get_rank() if processes() > 1 else 0
    model = model.to(device, memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4, fused=True)
    rng = np.random.default_rng(0)
    step, before = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"].cpu())
        step, before = state["step"], state["seconds"]
        print(f"resumed at step {step}, {before / 60:.1f} minutes in", flush=True)
    if rank:
        rng = np.random.default_rng((rank, step))
        torch.manual_seed(int(rng.integers(2**31)))

    start = logged = saved = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    while True:
        now = time.monotonic()
        seconds = before + now - start
        spent = _agreed(seconds / (60 * minutes))
        finished = spent >= 1
        if rank == 0 and count and (finished or now - logged > LOG_SECONDS):
            terms = "  ".join(f"{name} {value / count:.4f}" for name, value in sums.items())
            print(
                f"{seconds / 60:6.1f} min  step {step:6d}  {(now - logged) / count:.3f} s/step  "
                f"rate {optimiser.param_groups[0]['lr']:.1e}  {terms}",
                flush=True,
            )
            logged, sums, count = now, {}, 0
        if rank == 0 and (finished or now - saved > SAVE_SECONDS):
            if check:
                figures = check(averaged)
                print("   ", "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
            _save(path, model, averaged, optimiser, rng, step, seconds)
            saved = time.monotonic()
        if finished:
            return averaged

        for group in optimiser.param_groups:
            group["lr"] = rate * learning_rate(step, spent, decay)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            terms = loss(model, rng)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        if step == 9:  # by then, what starts from zero has moved
            _check_gradients(model)
        _share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(average, step / (step + 10))  # follow closely at first
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)
            for mean, value in zip(averaged.buffers(), model.buffers(), strict=True):
                mean.copy_(value)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        count += 1


def _agreed(value: float) -> float:
    """The first process's value, in all of them."""
    if processes() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(shared, 0)
    return float(shared)


def _check_gradients(model: nn.Module) -> None:
    """Every weight must have a part in the loss: a broken backward pass is silent."""
    dead = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and (p.grad is None or not p.grad.any())
    ]
    if dead:
        raise RuntimeError(f"{len(dead)} weights get no gradient, the first of them {dead[0]}")


def _share_gradients(model: nn.Module) -> None:
    """Replace the gradients by their mean over the processes, in one message."""
    if processes() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _save(path, model, averaged, optimiser, rng, step, seconds) -> None:
    """Write a checkpoint; an interrupted write leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimiser": optimiser.state_dict(),
            "rng": rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "step": step,
            "seconds": seconds,
        },
        part,
    )
    part.replace(path)


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint; FileNotFoundError when it is not there."""
    return torch.load(path, map_location="cpu", weights_only=False)["averaged"]
