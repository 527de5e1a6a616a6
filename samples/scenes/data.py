"""Pools of rendered scenes, made in parallel and the same for the same seed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .render import render_batch
from .world import Scene, sample_scene

SHARD = 500  # scenes drawn from one seed


def render_pool(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """`count` random scenes and their pictures, uint8 of shape (count, 64, 64, 3).

    Shard i comes from the generator of (seed, i), whatever the number of processors.
    """
    shards = [(min(SHARD, count - start), seed, start // SHARD) for start in range(0, count, SHARD)]
    scenes: list[Scene] = []
    pictures = np.empty((count, 64, 64, 3), np.uint8)

    def collect(results: Iterable[tuple[list[Scene], np.ndarray]]) -> None:
        for part, images in results:
            pictures[len(scenes) : len(scenes) + len(part)] = images
            scenes.extend(part)

    if len(shards) <= 4:  # sooner done than processes are started
        collect(map(_render_shard, shards))
    else:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
            collect(processes.map(_render_shard, shards))
    return scenes, pictures


def kept_pool(folder: Path, count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """The same, kept in a file of the folder for the next time (12 kB a picture)."""
    path = folder / f"scenes-{count}-{seed}.pickle"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(render_pool(count, seed), protocol=5))
    return pickle.loads(path.read_bytes())


def _render_shard(shard: tuple[int, int, int]) -> tuple[list[Scene], np.ndarray]:
    count, seed, index = shard
    rng = np.random.default_rng((seed, index))
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, render_batch(scenes, rng)
