"""The step path does not wait for the device, but where a method needs what it has computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods import FLOW_ONLY, acting, run
from tiny import latents_of, tiny_sd
from tiny_families import FAMILIES, final_latents, pipeline
from waiting import OnPaper, watch_steps

from guidancekit import (
    APG,
    CFG,
    ICG,
    NAG,
    PAG,
    PCG,
    SEG,
    TSG,
    FeedbackGuidance,
    RectifiedCFGPlusPlus,
    SideBySide,
)
from guidancekit.engine.arguments import picked
from guidancekit.registry import methods
from guidancekit.trace import Trace

# The latch decides whether the network runs on the unconditional rows: once per step, of the step
# before.
READ_THE_DEVICE = {"adaptive"}


@pytest.fixture
def paper(monkeypatch):
    mode = OnPaper()
    watch_steps(monkeypatch, mode.strict, mode.off)
    return mode


@pytest.mark.parametrize("name", methods())
def test_steps_do_not_wait(paper, name):
    run(acting(name))
    if name in READ_THE_DEVICE:
        assert len(paper.waits) <= 2 and all("adaptive.py" in each for each in paper.waits)
    else:
        assert paper.waits == []


@pytest.mark.parametrize(
    "guidance",
    [
        SideBySide([CFG(), APG(8.0)]),
        SideBySide([CFG(), CFG(1.0), CFG() + PAG(), NAG(), ICG(3.0), CFG() + TSG(low=0.0)]),
        SideBySide(
            [
                acting(name, tiny_sd(seed=1).unet)
                for name in methods()
                if name not in {"adaptive", "embedded", *FLOW_ONLY}
            ]
        ),
    ],
    ids=["two", "several", "all"],
)
def test_side_by_side_does_not_wait(paper, guidance):
    pipe, count = tiny_sd(), len(guidance.terms)
    with guidance.attach(pipe):
        latents_of(pipe, prompt=["a red star", "a blue ring"], num_images_per_prompt=count)
    assert paper.waits == []


@pytest.mark.parametrize(
    "guidance", [CFG() + PAG(), CFG() + ICG(2.0), CFG() + SEG(), CFG() + TSG(low=0.0)], ids=repr
)
def test_joined_passes_and_traces_do_not_wait(paper, guidance):
    pipe, trace = tiny_sd(), Trace()
    with guidance.attach(pipe, watch=trace, joined=True):
        latents_of(pipe, prompt=["a red star", "a blue ring"])
    assert paper.waits == []
    assert len(trace.points) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pipeline_makes_it_wait(paper, family):
    guidance = CFG(1.0) if FAMILIES[family].calls == "one" else APG(4.0)
    pipe = pipeline(family)
    with guidance.attach(pipe):
        final_latents(family, pipe, 5.0, num_inference_steps=3)
    assert paper.waits == []


@pytest.mark.parametrize("guidance", [PCG(3.0), RectifiedCFGPlusPlus(3.0, noise=0.1)], ids=repr)
def test_evaluations_at_other_times_do_not_wait(paper, guidance):
    pipe = pipeline("sd3")
    with guidance.attach(pipe):
        final_latents("sd3", pipe, 5.0, num_inference_steps=3)
    assert paper.waits == []


def test_images_are_decoded_without_waiting(paper):
    scorers = {"bright": lambda x, *_: x.mean((1, 2, 3))}
    run(FeedbackGuidance(scorers, candidates=[1.0, 4.0], decode=True, adaptive=True))
    assert paper.waits == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_rows_are_picked_as_an_index_would(rows):
    tensor = torch.arange(30).view(10, 3)
    assert torch.equal(picked(tensor, rows), tensor[rows])


@pytest.mark.parametrize("rows", [range(2, 9, 3), range(10), [4], [3, 5, 7]])
def test_evenly_spaced_rows_are_no_copy(rows):
    tensor = torch.arange(30).view(10, 3)
    assert picked(tensor, rows).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def reads(x):
    return float(x.sum())


def masks(x):
    return x[x > 0]


def lists(x):
    x[[0, 1]] = 0


def indexes(x):
    return x[torch.arange(2)]


def makes(x):
    return torch.tensor([1.0, 2.0], device=x.device)


def copies(x):
    return torch.randn(2, 1, 1, 1).to(x.device)


def mixes(x):
    return x + torch.zeros(2, 1, 1, 1)


def keeps_on(x):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    number = float(noise.sum()) + 0 * torch.tensor(1.0).item()
    there = noise.to(x, non_blocking=True)[0:1] * torch.tensor(2.0) + number
    return torch.cat([x[::2], x[torch.zeros_like(x[:, 0, 0, 0]).long()], there])


@pytest.mark.parametrize("act", [reads, masks, lists, indexes, makes, copies, mixes])
def test_what_waits_is_noticed(paper, act):
    class Waiting(CFG):
        def guide(self, step, state):
            act(step.x.clone())
            return super().guide(step, state)

    run(Waiting())
    assert len(paper.waits) == 3, "in every step but the first"
    assert all("test_waiting.py" in each for each in paper.waits)


def test_what_does_not_wait_is_not(paper):
    class Working(CFG):
        def guide(self, step, state):
            keeps_on(step.x)
            return super().guide(step, state)

    run(Working())
    assert paper.waits == []
