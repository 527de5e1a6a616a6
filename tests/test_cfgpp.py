"""CFG++ against loops written by hand from the paper's updates, one per solver."""

from __future__ import annotations

import math
import warnings

import diffusers
import pytest
import torch
from tiny import tiny_sd

from guidancekit import CFG, CFGPlusPlus, GuidanceError, Linear, PerStep
from guidancekit.methods.cfgpp import gains, typical_gain

STEPS, LAMBDA = 6, 0.7
CALL = dict(prompt="a red star", num_inference_steps=STEPS, output_type="latent")
DPM = dict(algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")


def with_scheduler(name, **options):
    pipe = tiny_sd()
    cls = getattr(diffusers, name)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, set_alpha_to_one=True, **options)
    return pipe


def noise(pipe):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def guided(pipe, guidance, **call):
    with guidance.attach(pipe):
        return pipe(**CALL, latents=noise(pipe), guidance_scale=7.5, **call).images


class Network:
    """eps_cond and eps_uncond of a pipeline's network at (x, t), x variance-preserving."""

    def __init__(self, pipe):
        self.unet = pipe.unet
        embeddings = pipe.encode_prompt("a red star", "cpu", 1, True, "")
        self.cond, self.uncond = embeddings

    @torch.no_grad()
    def __call__(self, x, t):
        both = self.unet(torch.cat([x, x]), t, torch.cat([self.uncond, self.cond])).sample
        return both[1:], both[:1]


def ddim_by_hand(pipe):
    """Algorithm 1 for DDIM: denoise with the guided noise, re-noise with the unconditional."""
    network, scheduler = Network(pipe), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    x = noise(pipe)
    for t in scheduler.timesteps.tolist():
        before = t - 1000 // STEPS
        alpha_bar = float(scheduler.alphas_cumprod[t])
        alpha_bar_next = float(scheduler.alphas_cumprod[before]) if before >= 0 else 1.0
        cond, uncond = network(x, t)
        eps = uncond + LAMBDA * (cond - uncond)
        x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        x = math.sqrt(alpha_bar_next) * x0 + math.sqrt(1 - alpha_bar_next) * uncond
    return x


def sigma_space(pipe, update):
    """A k-diffusion style loop: x = x0 + sigma eps; `update` is one step of the solver."""
    network, scheduler = Network(pipe), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.tolist()
    x = noise(pipe) * float(scheduler.init_noise_sigma)
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        x = noise(pipe) * math.sqrt(1 + sigmas[0] ** 2)
    history: list[torch.Tensor] = []
    for i, t in enumerate(scheduler.timesteps):
        cond, uncond = network(x / math.sqrt(1 + sigmas[i] ** 2), t)
        x0_u = x - sigmas[i] * uncond
        x0_lam = x - sigmas[i] * (uncond + LAMBDA * (cond - uncond))
        x = update(x, x0_lam, x0_u, sigmas, i, history)
        history.append(x0_u)
    return x


def euler(x, x0_lam, x0_u, sigmas, i, history):
    return x0_lam + sigmas[i + 1] * (x - x0_u) / sigmas[i]


def dpmpp_2m(x, x0_lam, x0_u, sigmas, i, history):
    """Higher-order terms are unconditional ones (Eq. 14-15)."""
    now, after = sigmas[i], sigmas[i + 1]
    if after == 0 or not history:
        return x0_lam + after / now * (x - x0_u)
    h, h_before = math.log(now / after), math.log(sigmas[i - 1] / now)
    decay = math.exp(-h)
    slope = (1 - decay) / (2 * h_before / h) * (x0_u - history[-1])
    return x0_lam + decay * (x - x0_u) + slope


def test_ddim():
    pipe = with_scheduler("DDIMScheduler")
    torch.testing.assert_close(
        guided(pipe, CFGPlusPlus(LAMBDA)), ddim_by_hand(pipe), atol=1e-4, rtol=1e-4
    )


def test_euler():
    pipe = with_scheduler("EulerDiscreteScheduler")
    torch.testing.assert_close(
        guided(pipe, CFGPlusPlus(LAMBDA)), sigma_space(pipe, euler), atol=1e-3, rtol=1e-4
    )


def test_dpmpp_2m():
    pipe = with_scheduler("DPMSolverMultistepScheduler", **DPM)
    # diffusers keeps variance-preserving latents; at the end alpha = 1 and both are the image.
    torch.testing.assert_close(
        guided(pipe, CFGPlusPlus(LAMBDA)), sigma_space(pipe, dpmpp_2m), atol=1e-3, rtol=1e-4
    )


def test_euler_ancestral():
    pipe = with_scheduler("EulerAncestralDiscreteScheduler")
    result = guided(pipe, CFGPlusPlus(LAMBDA), generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)

    def update(x, x0_lam, x0_u, sigmas, i, history):
        now, after = sigmas[i], sigmas[i + 1]
        up = math.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = math.sqrt(after**2 - up**2)
        fresh = torch.randn(x.shape, generator=generator)
        return x0_lam + down * (x - x0_u) / now + up * fresh

    torch.testing.assert_close(result, sigma_space(pipe, update), atol=1e-3, rtol=1e-4)


FIRST_ORDER = ["DDIMScheduler", "EulerDiscreteScheduler"]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_equals_cfg_at_the_equivalent_scales(name):
    """Fact: on a first-order deterministic step, CFG++ is CFG with w = lambda / (1 - nsr'/nsr)."""
    pipe = with_scheduler(name)
    guidance = CFGPlusPlus(LAMBDA)
    plusplus = guided(pipe, guidance)
    scales = guidance.report().effective_scale
    torch.testing.assert_close(plusplus, guided(pipe, CFG(PerStep(scales))), atol=1e-3, rtol=1e-4)
    assert scales[-1] == pytest.approx(LAMBDA)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lambda_zero_is_unconditional_and_correction_is_not_lost(name, prediction_type):
    pipe = with_scheduler(name, prediction_type=prediction_type)

    def run(scale):
        return guided(pipe, CFGPlusPlus(scale), generator=torch.Generator().manual_seed(1))

    with CFG(0.0).attach(pipe):
        unconditional = pipe(
            **CALL,
            latents=noise(pipe),
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(1),
        ).images
    torch.testing.assert_close(run(0.0), unconditional, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(0.7), unconditional, atol=1e-2)


@pytest.mark.parametrize(
    "name",
    [
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
        "KDPM2DiscreteScheduler",
        "DPMSolverSinglestepScheduler",
        "PNDMScheduler",
    ],
)
def test_other_schedulers_are_refused_before_the_first_step(name):
    pipe = with_scheduler(name)
    steps = []
    with pytest.raises(GuidanceError, match=name):
        guided(pipe, CFGPlusPlus(LAMBDA), callback_on_step_end=lambda *a: steps.append(a) or a[-1])
    assert not steps


def test_both_passes_run_at_every_scale():
    pipe = with_scheduler("DDIMScheduler")
    guidance = CFGPlusPlus(1.0)
    guided(pipe, guidance)
    assert guidance.report().rows_per_step == [2] * STEPS


@pytest.mark.parametrize(
    ("steps", "gain"), [(4, 1.7), (8, 2.7), (10, 3.2), (20, 5.5), (30, 8.0), (50, 12.8)]
)
def test_typical_gain_of_stable_diffusion(steps, gain):
    """Published: lambda acts like a CFG scale of 12.5 lambda at 50 steps; R(N) on the SD grid."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    times = [1 + i * (1000 // steps) for i in reversed(range(steps))]
    levels = [float(alpha_bar[t]) for t in (*times, 0)]  # SD ends at the first training timestep
    grid = tuple(math.sqrt((1 - level) / level) for level in levels)
    assert typical_gain(grid) == pytest.approx(gain, abs=0.07)
    assert gains((*grid[:-1], 0.0))[-1] == 1


@pytest.mark.parametrize(
    ("steps", "gain"), [(4, 1.25), (8, 2.0), (10, 2.4), (20, 4.25), (28, 5.75), (50, 9.9)]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_typical_gain_of_flow_models(steps, gain, shift):
    linear = [1 - i / steps for i in range(steps)]
    times = [shift * t / (1 + (shift - 1) * t) for t in linear]
    grid = [t / (1 - t) if t < 1 else math.inf for t in times] + [0.0]
    assert typical_gain(tuple(grid)) == pytest.approx(gain, abs=0.4)


def test_equivalent_strength_does_not_depend_on_the_number_of_steps():
    pipe = with_scheduler("DDIMScheduler")
    for guidance in (CFGPlusPlus(5.0, strength="equivalent_cfg"), CFGPlusPlus()):
        for steps in (5, 20):
            with guidance.attach(pipe):
                pipe("a star", num_inference_steps=steps, guidance_scale=5.0, output_type="latent")
            scales = sorted(guidance.report().effective_scale)
            assert scales[steps // 2] == pytest.approx(5.0, rel=0.25)


def test_a_cfg_scale_given_as_lambda_warns():
    pipe = with_scheduler("DDIMScheduler")
    guidance = CFGPlusPlus(30.0)
    with pytest.warns(UserWarning, match="equivalent_cfg"):
        guided(pipe, guidance)
    assert len(guidance.report().warnings) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided(pipe, CFGPlusPlus(0.6))


def test_lambda_may_be_a_schedule():
    pipe = with_scheduler("DDIMScheduler")
    guidance = CFGPlusPlus(Linear(1.5))
    guided(pipe, guidance)
    gain = gains((*(record.nsr for record in guidance.report().steps), 0.0))
    lambdas = [w / g for w, g in zip(guidance.report().effective_scale, gain, strict=True)]
    assert lambdas == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0], rel=1e-4)


def test_inversion_and_the_way_back_are_each_other_s_inverse():
    """With a network that says the same wherever it is asked, as the card's algebra has it."""
    pipe = with_scheduler("DDIMScheduler", timestep_spacing="trailing", clip_sample=False)
    call = {**CALL, "num_inference_steps": 5, "guidance_scale": 7.5}  # 5 steps divide the schedule
    said = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    watch = pipe.unet.conv_out.register_forward_hook(lambda *_: said)
    try:
        start = noise(pipe)
        forwards, backwards = pipe.scheduler, diffusers.DDIMInverseScheduler
        pipe.scheduler = backwards.from_config(forwards.config)
        with CFGPlusPlus(LAMBDA).attach(pipe) as guidance:
            noised = pipe(**call, latents=start).images
        there = guidance.report().effective_scale
        pipe.scheduler = forwards
        with CFGPlusPlus(LAMBDA).attach(pipe) as guidance:
            back = pipe(**call, latents=noised).images
    finally:
        watch.remove()
    assert not torch.allclose(noised, start, atol=0.1)
    torch.testing.assert_close(back, start, atol=1e-3, rtol=1e-3)
    assert there == pytest.approx(guidance.report().effective_scale[::-1], rel=1e-3)
