"""The training loop of the scenes sample: what must not go wrong in silence."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from samples.scenes.train import upsample
from samples.scenes.training import fit


def test_upsampling_written_out_equals_the_layer():
    torch.manual_seed(0)
    layer = Upsample2D(4, use_conv=True)
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(upsample(layer, x), layer(x))


def test_a_weight_without_gradient_is_an_error(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def loss(model, rng):
        return {"loss": model[1](model[0](torch.ones(1, 2)).detach()).sum()}

    with pytest.raises(RuntimeError, match=r"no gradient, the first of them 0\.weight"):
        fit(model, loss, tmp_path / "model.pt", minutes=1, rate=1e-3)
