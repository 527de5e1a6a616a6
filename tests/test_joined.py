"""attach(joined=True): a further pass joins the batch of the pass before it."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import latents_of, sd3_prompt, tiny_sd, tiny_sd3
from tiny_families import final_latents, fresh

from guidancekit import APG, CFG, ICG, NAG, PAG, SAG, SEG, SLG, TSG, Interval, PerStep

BLOCK = "transformer_blocks.0"
ALWAYS = dict(start=0.0, end=1.0)  # but for step 0
ON_UNET = [
    CFG() + PAG(),
    PAG(),
    APG() + SEG(blur_sigma=1.0),
    SEG() + CFG(),
    ICG(3.0),
    CFG() + ICG(3.0),
    TSG(low=0.0),
    CFG() + TSG(low=0.0),
    CFG(Interval(None, low=0.5, high=3.0)) + PAG(),
]


@functools.cache
def unet():
    return tiny_sd()


@functools.cache
def transformer():
    return tiny_sd3()


def both(guidance, draw, pipe):
    """Latents and reports, one pass after the other and joined."""
    found = []
    for joined in (False, True):
        with guidance.attach(pipe, joined=joined):
            found.append((draw(), guidance.report()))
    (apart, first), (together, second) = found
    return apart, first, together, second


def on_unet(**options):
    return latents_of(unet(), prompt=["a red star", "a blue ring"], **options)


def on_transformer():
    return transformer()(
        **sd3_prompt(2),
        guidance_scale=5.0,
        num_inference_steps=4,
        height=32,
        width=32,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def calls(report):
    return [step.calls for step in report.steps]


@pytest.mark.parametrize("guidance", ON_UNET, ids=repr)
def test_same_prediction_and_rows_in_fewer_calls(guidance):
    apart, first, together, second = both(guidance, on_unet, unet())
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(apart, latents_of(unet()), atol=1e-3), "nothing was perturbed"
    assert second.rows_per_step == first.rows_per_step
    assert calls(first) == [2] * 4 and calls(second) == [1] * 4
    assert second.effective_scale == pytest.approx(first.effective_scale, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "guidance",
    [
        CFG() + PAG(layers=BLOCK),
        CFG() + PAG(layers=BLOCK, strength=0.5),
        CFG() + SEG(layers=BLOCK, blur_sigma=1.0),
        CFG() + SLG(layers=BLOCK, **ALWAYS),
        CFG() + SLG(layers="transformer_blocks.1", **ALWAYS),  # the last one
        ICG(3.0) + CFG(),
        CFG() + TSG(low=0.0),
    ],
    ids=repr,
)
def test_on_joint_attention(guidance):
    apart, first, together, second = both(guidance, on_transformer, transformer())
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert second.rows_per_step == first.rows_per_step
    idle = int("SLG" in repr(guidance))  # step 0
    assert calls(second) == [1] * 4 and calls(first) == [1] * idle + [2] * (4 - idle)


@pytest.mark.parametrize("guidance", [CFG() + PAG() + SEG(), CFG() + PAG() + ICG(2.0)], ids=repr)
def test_only_the_first_of_several_joins(guidance):
    apart, first, together, second = both(guidance, on_unet, unet())
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert second.rows_per_step == first.rows_per_step
    assert calls(first) == [3] * 4 and calls(second) == [2] * 4


@pytest.mark.parametrize(
    "guidance", [CFG(), CFG() + SAG(), CFG() + SAG() + PAG(), CFG() + NAG() + PAG()], ids=repr
)
def test_what_cannot_join_is_left_as_it_is(guidance):
    """A pass that depends on the one before it, or one inside which others are at work."""
    options = {"negative_prompt": ["a green heart"] * 2}
    apart, first, together, second = both(guidance, lambda: on_unet(**options), unet())
    assert torch.equal(together, apart)
    assert calls(second) == calls(first)


def test_a_step_without_a_further_pass():
    guidance = CFG() + TSG(scale=PerStep([4.0, 1.0, 4.0, 1.0]), low=0.0)
    apart, first, together, second = both(guidance, on_unet, unet())
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert second.rows_per_step == first.rows_per_step == [6, 4, 6, 4]
    assert calls(first) == [2, 1, 2, 1] and calls(second) == [1, 1, 1, 1]


def test_pipelines_that_call_for_each_branch_go_on_so():
    pipe = fresh("flux")
    guidance = CFG() + PAG(layers=BLOCK)
    apart, first, together, second = both(guidance, lambda: final_latents("flux", pipe, 5.0), pipe)
    assert torch.equal(together, apart)
    assert calls(second) == calls(first)


def test_other_networks_rows_stay_apart_too():
    """Linear attention (Sana) and a distilled model with one branch."""
    for family, guidance in (("sana", CFG() + PAG(layers=BLOCK)), ("flux-distilled", TSG(low=0.0))):
        pipe = fresh(family)
        apart, first, together, second = both(
            guidance, functools.partial(final_latents, family, pipe, 5.0), pipe
        )
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
        assert second.rows_per_step == first.rows_per_step
        assert sum(calls(second)) < sum(calls(first))
