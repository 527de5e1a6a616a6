"""Per-sample vector algebra: every reduction runs over all dimensions but the first.

Inputs are float32 tensors of shape [B, ...]; reductions keep their dimensions ([B, 1, ...]) so that
they broadcast back. A row's result never depends on its batch mates.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-12


def combine(p: float, a: Tensor, q: float, b: Tensor) -> Tensor:
    """p a + q b, in as few passes over memory as it takes."""
    if p == 0:
        return q * b
    return torch.add(a, b, alpha=q) if p == 1 else (p * a).add_(b, alpha=q)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample."""
    if a is b:
        return norm(a).square()
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each sample."""
    return torch.linalg.vector_norm(a, dim=tuple(range(1, a.ndim)), keepdim=True)


def mean(a: Tensor) -> Tensor:
    """Mean of each sample."""
    return a.mean(dim=tuple(range(1, a.ndim)), keepdim=True)


def std(a: Tensor) -> Tensor:
    """Standard deviation of each sample."""
    return a.std(dim=tuple(range(1, a.ndim)), keepdim=True)


def on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of the dtype of `like`, on its device, which is not waited for."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


class Noise:
    """Random draws that are the same on every device; sample i of a batch has the seed `seed` + i.

    So a sample gets the same noise whoever its batch mates are. Draws of another `purpose` are
    other numbers, and none are those of a pipeline whose own generator has the same seed.
    """

    def __init__(self, seed: int, purpose: str = "") -> None:
        self.seed, self.purpose = seed, purpose
        self.generators: list[torch.Generator] = []

    def __call__(self, like: Tensor) -> Tensor:
        """The next normal draw, float32, of the shape of `like` [B, ...] and on its device."""
        # Pinned, so that the copy keeps nobody waiting.
        drawn = torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)
        for row, own in zip(drawn.unbind(), self._own(like.shape[0]), strict=True):
            row.normal_(generator=own)
        return drawn.to(like.device, non_blocking=True)

    def integers(self, high: int, count: int) -> list[int]:
        """A whole number in [0, high) for each of `count` samples."""
        return [int(torch.randint(high, (), generator=own)) for own in self._own(count)]

    def _own(self, count: int) -> list[torch.Generator]:
        for i in range(len(self.generators), count):
            seed = zlib.crc32(f"guidancekit {self.purpose} {self.seed + i}".encode())
            self.generators.append(torch.Generator().manual_seed(seed))
        return self.generators[:count]


def parallel(a: Tensor, onto: Tensor) -> Tensor:
    """The component of `a` along `onto`; zero where `onto` is zero."""
    length = norm(onto).clamp_min(TINY)
    return onto * (dot(a, onto) / length / length)


def match_std(a: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Bring the standard deviation of `a` back to that of `reference`, arXiv:2305.08891 Eq. 15-16.

    `strength` (phi) blends between `a` (0) and the rescaled tensor (1).
    """
    return a * (1 + strength * (std(reference) / std(a).clamp_min(TINY) - 1))
