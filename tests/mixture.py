"""Exact Gaussians of equal width as a pipeline's network, on latents [B, 4, 4, 4].

The mixture, its network and its pipeline are the laboratory's (`guidancekit.lab.mixture`, tested in
`test_lab_mixture.py`). Here every condition is one Gaussian, whose mean is constant over the grid,
and no condition is all of them: what guidance should do is then known in closed form.
"""

from __future__ import annotations

import torch

from guidancekit.lab.mixture import Labelled, MixturePipeline, pipeline, scheduler

__all__ = ["mixture_pipe", "sample", "scheduler"]


def mixture_pipe(means, spread=0.5) -> MixturePipeline:
    """Condition k is the Gaussian with means[k] [4] in every cell, and deviation `spread`."""
    centres = torch.tensor(means).repeat_interleave(16, dim=1)
    covariances = (spread**2 * torch.eye(64)).expand(len(means), 64, 64)
    mixture = Labelled.of(torch.eye(len(means)), centres, covariances)
    return pipeline(mixture, "vp", shape=(4, 4, 4))


def sample(pipe, mode: int, count: int, negative: int | None = None, steps=100, seed=0, **options):
    """Latents [count, 4, 4, 4] conditioned on `mode`, away from `negative` (None: the mixture)."""
    return pipe(
        mode,
        count,
        negative,
        guidance_scale=2.0,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
