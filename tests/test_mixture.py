"""Guidance where the truth is known: an exact Gaussian mixture as a real pipeline's network."""

from __future__ import annotations

import pytest
import torch
from mixture import mixture_pipe, sample

from guidancekit import APG, CFG, FDG, CFGPlusPlus, Interval

LEFT, RIGHT = (-1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)
COUNT = 64


def mean(latents):
    return latents.mean(dim=(0, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return mixture_pipe([LEFT, RIGHT])


def test_no_guidance_samples_the_conditional_distribution(pipe):
    with CFG(1.0).attach(pipe):
        latents = sample(pipe, 1, COUNT)
    torch.testing.assert_close(mean(latents), torch.tensor(RIGHT), atol=0.05, rtol=0)
    assert latents.std(dim=0).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("w", [2.0, 5.0])
def test_cfg_of_two_gaussians_is_the_extrapolated_gaussian(w):
    """Equal widths: the guided score is that of N(m_u + w (m_c - m_u), s^2), so the samples are."""
    pipe = mixture_pipe([LEFT, RIGHT, (0.0, 0.0, 0.0, 0.0)])
    guided = torch.tensor([w, 0.0, 0.0, 0.0])  # from the mode at the origin through the right one
    for guidance in (CFG(w), APG(w, 1.0, 0.0, 0.0), FDG(w, w)):
        with guidance.attach(pipe):
            latents = sample(pipe, 1, COUNT, negative=2)
        torch.testing.assert_close(mean(latents), guided, atol=0.05, rtol=0)
        assert latents.std(dim=0).mean() == pytest.approx(0.5, abs=0.03)


def test_guidance_settles_the_mode_early_and_overshoots(pipe):
    """Away from the other mode CFG pushes beyond the conditional mean; more scale, further."""
    positions = []
    for w in (1.0, 3.0, 9.0):
        with CFG(w).attach(pipe):
            positions.append(float(mean(sample(pipe, 1, COUNT))[0]))
    assert positions == sorted(positions)
    assert positions[0] == pytest.approx(1.0, abs=0.05)
    assert positions[2] > 1.1


def test_interval_restores_the_conditional_distribution(pipe):
    """Guiding at high noise only: the rest of the run pulls the samples back to the truth."""
    distance = {}
    for name, guidance in {
        "cfg": CFG(9.0),
        "interval": CFG(Interval(9.0, low=0.5, high=2.0)),
    }.items():
        with guidance.attach(pipe):
            distance[name] = abs(float(mean(sample(pipe, 1, COUNT))[0]) - 1.0)
    assert distance["interval"] < distance["cfg"]


def test_projection_overshoots_less_along_the_prediction(pipe):
    """Here the difference is along the clean prediction: APG removes it, CFG saturates."""
    reached = {}
    for name, guidance in {"cfg": CFG(9.0), "apg": APG(9.0)}.items():
        with guidance.attach(pipe):
            reached[name] = float(mean(sample(pipe, 1, COUNT))[0])
    assert 0.9 < reached["apg"] < reached["cfg"]


def test_cfgpp_reaches_the_conditional_mode(pipe):
    with CFGPlusPlus(0.6).attach(pipe):
        latents = sample(pipe, 1, COUNT, steps=50)
    inside = (latents[:, 0].mean(dim=(1, 2)) > 0).float().mean()
    assert inside == 1.0
