"""torch.compile on the denoiser: after the second step of a run nothing is compiled any more."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_methods import acting
from tiny import LATENT_SIZE, TEXT_WIDTH, latents_of, tiny_sd

from benchmarks.compiled import graphs
from guidancekit import CFG, PAG, TSG, InternalHead, SideBySide

STEPS = 4


class Small:
    """The smallest UNet that has all kinds of layers, and how it is called."""

    def __init__(self):
        self.pipe = tiny_sd()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = self.pipe.unet = UNet2DConditionModel(
                sample_size=LATENT_SIZE,
                block_out_channels=(8,),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                cross_attention_dim=TEXT_WIDTH,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
            ).eval()

    def draw(self, steps, **options):
        with torch.no_grad():
            latents_of(self.pipe, steps=steps, height=32, width=32, **options)


# All that reach into the network, whose closures and contexts are new in every step; a method that
# only combines predictions shows the network nothing but rows, as CFG does.
INSIDE = {
    "pag": acting("pag"),
    "seg": acting("seg"),
    "sag": acting("sag"),
    "nag": acting("nag"),
    "nasa": acting("nasa"),
    "tsg": acting("tsg"),
    "internal": acting("internal", head=InternalHead("mid_block", 8, 4, 1)),
    "cfg": CFG(),
    "icg": acting("icg"),
    "side by side": SideBySide([CFG(), CFG() + PAG()]),
}


@pytest.mark.parametrize("name", INSIDE)
def test_nothing_is_compiled_after_the_second_step(name):
    options = {"num_images_per_prompt": 2} if name == "side by side" else {}
    subject = Small()
    draw, subject.draw = subject.draw, lambda steps, **more: draw(steps, **options, **more)
    counted = graphs(subject, INSIDE[name], STEPS)
    assert len(counted) == STEPS and counted[0] > 0
    assert counted[-1] == counted[1], f"graphs at the end of each step: {counted}"


@pytest.mark.parametrize("guidance", [CFG() + PAG(), CFG() + TSG(low=0.0)], ids=repr)
def test_nor_when_passes_are_joined(guidance, monkeypatch):
    attach = type(guidance).attach
    monkeypatch.setattr(
        type(guidance), "attach", lambda self, pipe: attach(self, pipe, joined=True)
    )
    counted = graphs(Small(), guidance, STEPS)
    assert 0 < counted[-1] == counted[1]
