"""Small networks that methods need beside the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from .engine.layers import grid_of
from .errors import GuidanceError


class InternalHead(ModelMixin, ConfigMixin):
    """Prediction from the hidden state of one block: norm, shift and scale by time, one layer.

    `block` names the module it reads, such as "mid_block" or "transformer_blocks.7" (at most a
    third of the depth, says the paper); `width` are its features, `channels` those of the latent,
    `patch` the latent cells per side that one hidden cell stands for. It starts from zero.

    Training: run the frozen network inside `early` and minimise the mean squared error between what
    that yields and the network's own training target. Save with `save_pretrained`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, block: str, width: int, channels: int = 4, patch: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.time = TimestepEmbedding(width, width, out_dim=2 * width)
        self.out = nn.Linear(width, channels * patch**2)
        for layer in (self.time.linear_2, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def block(self) -> str:
        return self.config.block

    def forward(self, hidden: Tensor, timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """[rows, channels, *size] from hidden [rows, width, h, w] or [rows, tokens, width]."""
        width, patch = self.config.width, self.config.patch
        tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        if tokens.shape[2] != width:
            raise GuidanceError(
                f"InternalHead({self.block!r}): found {tokens.shape[2]} features, expected {width}."
            )
        height, breadth = grid_of(size, tokens.shape[1])
        times = torch.as_tensor(timestep, device=hidden.device).expand(hidden.shape[0])
        shift, scale = self.time(get_timestep_embedding(times, width)).chunk(2, dim=1)
        out = self.out(self.norm(tokens) * (1 + scale[:, None]) + shift[:, None])
        out = out.unflatten(1, (height, breadth)).unflatten(3, (-1, patch, patch))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)

    @contextmanager
    def early(self, network: nn.Module) -> Iterator[list[Tensor]]:
        """Inside, `network` leaves the hidden state of `block` in the list that this yields."""
        kept: list[Tensor] = []
        handle = network.get_submodule(self.block).register_forward_hook(
            lambda module, args, result: kept.append(image_of(result))
        )
        try:
            yield kept
        finally:
            handle.remove()


def image_of(result: Any) -> Tensor:
    """The image's hidden state in what a block returns: joint blocks say (text, image)."""
    parts = result if isinstance(result, tuple) else (result,)
    tensors: list[Tensor] = [part for part in parts if isinstance(part, Tensor)]
    return tensors[-1]
