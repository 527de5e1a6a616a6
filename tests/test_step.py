"""Predictions read in any space say the same thing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import KINDS, from_x0, level_of, make_step, random_triple

from guidancekit import Prediction

NOISE = st.floats(0.02, 50)


@pytest.mark.parametrize("kind", KINDS)
@given(nsr=NOISE)
def test_spaces_recompose_the_latent(kind, nsr):
    out, _, x = random_triple(2, 4, 5, 3)
    level = level_of(kind, nsr)
    prediction = Prediction(out, x, level, kind)
    recomposed = level.alpha * prediction.x0 + level.sigma * prediction.eps
    # x0 = (x - sigma eps) / alpha amplifies float32 rounding by nsr.
    torch.testing.assert_close(recomposed, x, atol=2e-6 * (1 + nsr), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(nsr=NOISE)
def test_x0_round_trip(kind, nsr):
    x0, _, x = random_triple(2, 4, 5, 3)
    back = from_x0(x0, x, level_of(kind, nsr), kind).x0
    torch.testing.assert_close(back, x0, atol=2e-6 * (1 + nsr + 1 / nsr), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_matches_its_definition(kind):
    x0, _, x = random_triple(1, 4, 6, 6)
    level = level_of(kind, 0.7)
    p = from_x0(x0, x, level, kind)
    flow = p.eps - p.x0
    variance_preserving = level.alpha * p.eps - level.sigma * p.x0
    torch.testing.assert_close(p.v, flow if kind == "flow" else variance_preserving)


def test_difference_signs_agree_with_the_conversions():
    """delta_x0 = -(sigma/alpha) delta_eps: guidance points the same way in every space."""
    cond, uncond, x = random_triple(1, 4, 8, 8)
    step = make_step(cond, uncond, x, "v_prediction", nsr=0.8)
    delta_eps = step.cond.eps - step.uncond.eps
    torch.testing.assert_close(cond - uncond, -0.8 * delta_eps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cfg_is_the_same_in_every_space(kind):
    cond, uncond, x = random_triple(2, 4, 8, 8)
    step = make_step(cond, uncond, x, kind)
    torch.testing.assert_close(step.cfg(7.0).x0, uncond + 7 * (cond - uncond), atol=2e-5, rtol=1e-5)


def test_half_precision_is_computed_in_float32():
    out, _, x = random_triple(1, 4, 8, 8)
    prediction = Prediction(out.half(), x.half(), level_of("epsilon", 10.0), "epsilon")
    assert prediction.x0.dtype == prediction.eps.dtype == prediction.v.dtype == torch.float32
