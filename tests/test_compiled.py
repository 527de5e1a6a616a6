"""torch.compile on the denoiser: after the second step of a run nothing is compiled any more."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_methods import FLOW_ONLY, acting
from tiny import LATENT_SIZE, TEXT_WIDTH, latents_of, tiny_sd

from benchmarks.compiled import graphs
from benchmarks.models import embedded
from guidancekit import CFG, PAG, TSG, InternalHead, SideBySide
from guidancekit.registry import create, methods

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


LATER = {"adaptive": 1}
"""Graphs for a number of rows that comes up only later, when guidance stops."""
KINDS_OF_PASSES = 3
"""Other layers or another number of rows are another graph; more of them were a broken one."""


@pytest.mark.parametrize("name", sorted({*methods()} - {*FLOW_ONLY, "embedded"}))
def test_nothing_is_compiled_after_the_second_step(name):
    head = InternalHead("mid_block", 8, 4, 1)
    counted = graphs(Small(), acting(name, Small().network, head), STEPS)
    assert len(counted) == STEPS
    assert 0 < counted[1] <= KINDS_OF_PASSES, f"graphs at the end of each step: {counted}"
    assert counted[-1] == counted[1] + LATER.get(name, 0), counted


def test_side_by_side_neither():
    subject = Small()
    subject.draw = functools.partial(subject.draw, num_images_per_prompt=2)
    counted = graphs(subject, SideBySide([CFG(), CFG() + PAG()]), STEPS)
    assert 0 < counted[-1] == counted[1], counted


@pytest.mark.parametrize("name", ["autoguidance", "internal", "feedback", "gfcg"])
def test_companions_are_loaded_beside_a_compiled_network(name):
    """Inside of its call, and unseen by the compiler."""
    subject = embedded(1, torch.device("cpu"))
    guidance = create(name, "scenes")
    if name == "gfcg":
        guidance.high = 1.0  # from the first step on
    counted = graphs(subject, guidance, 2)
    assert 0 < counted[-1] <= 3, counted


@pytest.mark.parametrize("guidance", [CFG() + PAG(), CFG() + TSG(low=0.0)], ids=repr)
def test_nor_when_passes_are_joined(guidance, monkeypatch):
    attach = type(guidance).attach
    monkeypatch.setattr(
        type(guidance), "attach", lambda self, pipe: attach(self, pipe, joined=True)
    )
    counted = graphs(Small(), guidance, STEPS)
    assert 0 < counted[-1] == counted[1]
