"""Manifold-projected CFG: the operators by hand, the mixing, the counts."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import pytest
import torch
from steps import make_step, random_triple
from tiny import sd3_prompt, tiny_sd, tiny_sd3

from guidancekit import CFG, GuidanceError, ManifoldProjectedCFG
from guidancekit.guidance import State
from guidancekit.methods.cfgmp import fixed_point, flow_sigma
from guidancekit.step import Prediction


def field_step(velocity, x, sigma):
    """A flow step whose network is `velocity(branch, x)`; the evaluations are counted in `.log`."""
    nsr = sigma / (1 - sigma)
    step = make_step(*random_triple(*x.shape)[:2], x, "flow", nsr=nsr)
    step.log = []

    def evaluate(branch, x=x):
        step.log.append(branch)
        return Prediction(velocity(branch, x), x, step.level, "flow")

    step.evaluate = evaluate
    return step


def linear(branch, x):
    """Two linear fields that agree at x = 0.625."""
    return x - 0.5 if branch == "cond" else 0.2 * x


def gap(x):
    return float((linear("cond", x) - linear("uncond", x)).norm())


@pytest.mark.parametrize("sigma", [0.7, 0.97])
def test_one_projection_by_hand(sigma):
    x = random_triple(2, 4, 6, 5)[2]
    velocity = lambda branch, x: torch.sin(x) if branch == "cond" else torch.cos(2 * x)  # noqa: E731
    step = field_step(velocity, x, sigma)
    half = (sigma - flow_sigma(step.next_level)) / 2
    if sigma < 0.95:
        z = x + half * torch.cos(2 * x)
        expected = z - half * torch.sin(z)
    else:
        z = x - half * torch.sin(x)
        expected = z + half * torch.cos(2 * z)
    projected = ManifoldProjectedCFG(4.0, iterations=1).before_step(step, State())
    torch.testing.assert_close(projected, expected, atol=2e-5, rtol=1e-4)
    assert len(step.log) == 2


def test_equal_branches_leave_the_latent_where_it_is():
    x = random_triple(1, 4, 6, 6)[2]
    frozen = torch.ones_like(x)
    step = field_step(lambda branch, x: frozen, x, 0.8)
    torch.testing.assert_close(
        ManifoldProjectedCFG(4.0, iterations=3).before_step(step, State()), x, atol=1e-5, rtol=1e-5
    )


def test_low_noise_and_no_iterations_are_plain_cfg():
    x = random_triple(1, 4, 6, 6)[2]
    for guidance, sigma in (
        (ManifoldProjectedCFG(4.0), 0.5),
        (ManifoldProjectedCFG(4.0, iterations=0), 0.9),
    ):
        step = field_step(linear, x, sigma)
        assert guidance.before_step(step, State()) is step.x
        assert not step.log
        torch.testing.assert_close(guidance.guide(step, State()).out, step.cfg(4.0).out)


def test_one_iteration_needs_no_mixing():
    operator = lambda x: 0.9 * x + 0.3  # noqa: E731
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fixed_point(operator, x, 1, True), fixed_point(operator, x, 1, False))


def test_anderson_solves_a_scalar_linear_iteration_at_once():
    """For x <- a x + b in one unknown per sample the mixed second iterate is the fixed point."""
    operator = lambda x: 0.9 * x + 0.3  # noqa: E731
    x = torch.tensor([[0.5], [20.0]])
    mixed = fixed_point(operator, x, 2, True)
    torch.testing.assert_close(mixed, torch.full_like(x, 3.0), atol=1e-3, rtol=1e-3)
    plain = fixed_point(operator, x, 2, False)
    assert ((plain - 3).abs() > 0.1).all()


def test_the_gap_closes_and_mixing_closes_it_faster():
    start = 2 + torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    gaps = {}
    for anderson in (False, True):
        gaps[anderson] = [
            gap(
                ManifoldProjectedCFG(4.0, iterations, anderson).before_step(
                    field_step(linear, start, 0.8), State()
                )
            )
            for iterations in range(4)
        ]
    assert gaps[False] == sorted(gaps[False], reverse=True)
    assert gaps[True][:2] == gaps[False][:2]
    assert gaps[True][2] < 0.2 * gaps[False][2]


@pytest.mark.parametrize(("steps", "iterations"), [(10, 3), (10, 1), (6, 2)])
def test_evaluations_on_a_flow_pipeline(steps, iterations):
    pipe = tiny_sd3()
    with ManifoldProjectedCFG(4.0, iterations=iterations).attach(pipe) as guidance:
        latents = pipe(
            **sd3_prompt(), num_inference_steps=steps, height=32, width=32, output_type="latent"
        ).images
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    expected = [2 + 2 * iterations * (sigma > 0.6) for sigma in sigmas]
    assert guidance.report().rows_per_step == expected
    assert torch.isfinite(latents).all()


def test_a_whole_run_by_hand():
    """Projection, then the Euler step of CFG from the projected latent."""
    pipe = tiny_sd3()
    prompt, w, steps = sd3_prompt(), 4.0, 5
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with ManifoldProjectedCFG(w, iterations=1).attach(pipe):
        guided = pipe(
            **prompt,
            num_inference_steps=steps,
            latents=noise,
            height=32,
            width=32,
            output_type="latent",
        ).images

    @torch.no_grad()
    def velocity(branch, x, sigma):
        prefix = "" if branch == "cond" else "negative_"
        return pipe.transformer(
            hidden_states=x,
            timestep=torch.tensor([1000 * sigma]),
            encoder_hidden_states=prompt[f"{prefix}prompt_embeds"],
            pooled_projections=prompt[f"{prefix}pooled_prompt_embeds"],
        ).sample

    x = noise
    sigmas = pipe.scheduler.sigmas.tolist()
    for now, after in pairwise(sigmas):
        if now > 0.6:
            half = (now - after) / 2
            order = [("cond", -half), ("uncond", half)]
            for branch, length in order if now >= 0.95 else reversed(order):
                x = x + length * velocity(branch, x, now)
        cond, uncond = velocity("cond", x, now), velocity("uncond", x, now)
        x = x + (after - now) * (uncond + w * (cond - uncond))
    torch.testing.assert_close(guided, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_epsilon_models_walk_in_flow_coordinates(scheduler):
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)

    def call():
        return pipe(
            "a red star",
            num_inference_steps=5,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    plain = call()
    with ManifoldProjectedCFG(7.5, iterations=0).attach(pipe):
        assert torch.equal(call(), plain)
    with ManifoldProjectedCFG(7.5, iterations=1).attach(pipe):
        assert torch.isfinite(call()).all() and not torch.equal(call(), plain)


def test_schedulers_with_samples_of_their_own_are_refused():
    pipe = tiny_sd()
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(GuidanceError, match="UniPC"), ManifoldProjectedCFG(4.0).attach(pipe):
        pipe("a red star", num_inference_steps=3, output_type="latent")


def test_presets():
    assert ManifoldProjectedCFG.preset("sd35").iterations == 3
    assert isinstance(CFG(2.0), CFG)
