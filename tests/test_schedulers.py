"""Every scheduler of Diffusers: noise levels, solver steps, and which ways of stepping are correct.

`CASES` has one row per scheduler and configuration; the laws below run over all of them, and
`make compatibility` writes what they have shown into the README.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import sys
import types
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from compatibility import REFUSED, YES, record
from diffusers import ConfigMixin, ModelMixin, StableDiffusionImg2ImgPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from PIL import Image
from test_methods import FLOW_ONLY, OWN_SPACE, acting
from tiny import sd3_prompt, tiny_sd, tiny_sd3

from guidancekit import (
    APG,
    CFG,
    PCG,
    AdaptiveGuidance,
    CFGPlusPlus,
    Guidance,
    GuidanceError,
    InternalHead,
    Interval,
    ManifoldProjectedCFG,
    Prediction,
    RectifiedCFGPlusPlus,
)
from guidancekit.engine import noise
from guidancekit.registry import methods
from guidancekit.step import COND, Level
from guidancekit.tensors import Noise

STEPS = 4
TABLE = "scheduler"

STRAIGHT = ("cfg++", "cfg-mp", "pcg")  # deterministic, reads nothing of earlier steps
ONE_STEP = ("cfg++", "cfg-mp")  # reads nothing of earlier steps
MULTISTEP = ("cfg++",)  # reads earlier predictions
ODE = ("rectified-cfg++",)  # flow models


@dataclass(frozen=True)
class Case:
    """A scheduler in one configuration, and what is true of it.

    `evaluations` are those of each solver step of a run of `STEPS`. `rules` are the ways of
    stepping that are correct on it; the others must be refused. `told`: the timestep that the
    network gets is exactly that of the noise level (some schedulers round it).
    """

    scheduler: str
    options: dict = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("epsilon", "v_prediction")
    evaluations: tuple[int, ...] = (1,) * STEPS
    noisy: bool = False
    told: bool = True
    eta: float = 0.0

    @property
    def flow(self) -> bool:
        return self.kinds == FLOW


ALL, EPS, V, FLOW = (
    ("epsilon", "v_prediction", "sample"),
    ("epsilon",),
    ("v_prediction",),
    ("flow",),
)
HEUN = (2, 2, 2, 1)
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
DDIM, EULER, LMS = "DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"
HEUN_1, KDPM2 = "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"
DPM, DPM_S = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
DEIS, UNIPC, PNDM = "DEISMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"
EDM_DPM, FLOW_EULER = "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
KARRAS = dict(use_karras_sigmas=True)
SDE = dict(algorithm_type="sde-dpmsolver++")
AS_FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")

CASES = {
    "DDIM": Case(DDIM, rules=STRAIGHT, kinds=ALL),
    "DDIM, trailing": Case(DDIM, dict(timestep_spacing="trailing"), STRAIGHT, kinds=V),
    "DDIM, linspace": Case(DDIM, dict(timestep_spacing="linspace"), ONE_STEP, kinds=EPS),
    "DDIM, ends at alpha = 1": Case(
        DDIM, dict(set_alpha_to_one=True, steps_offset=0), STRAIGHT, kinds=EPS
    ),
    "DDIM, eta > 0": Case(DDIM, rules=ONE_STEP, noisy=True, eta=0.7, kinds=EPS),
    "DDIM, zero terminal SNR": Case(DDIM, ZERO_SNR, STRAIGHT, kinds=V),
    "DDIM, parallel": Case("DDIMParallelScheduler", rules=STRAIGHT, kinds=V),
    "DDIM, inverse": Case("DDIMInverseScheduler", rules=("cfg++",), told=False, kinds=ALL),
    "DDPM": Case("DDPMScheduler", rules=ONE_STEP, kinds=ALL, noisy=True),
    "DDPM, trailing": Case(
        "DDPMScheduler", dict(timestep_spacing="trailing"), ONE_STEP, noisy=True, kinds=V
    ),
    "DDPM, parallel": Case("DDPMParallelScheduler", rules=ONE_STEP, noisy=True, kinds=EPS),
    "CogVideoX DDIM": Case("CogVideoXDDIMScheduler", rules=STRAIGHT),
    "CogVideoX DPM": Case("ChainedCogVideoXDPMScheduler", rules=MULTISTEP, noisy=True),
    "LCM": Case("LCMScheduler", rules=ONE_STEP, noisy=True),
    "TCD": Case("TCDScheduler", rules=ONE_STEP, eta=0.3, noisy=True),
    "PNDM": Case(PNDM, evaluations=(4, 4, 4, 1)),
    "PNDM, PLMS only": Case(PNDM, dict(skip_prk_steps=True), evaluations=(2, 1, 1, 1)),
    "Euler": Case(EULER, rules=STRAIGHT, kinds=ALL),
    "Euler, Karras": Case(EULER, KARRAS, STRAIGHT, kinds=V),
    "Euler, exponential": Case(EULER, dict(use_exponential_sigmas=True), STRAIGHT, kinds=EPS),
    "Euler, beta": Case(EULER, dict(use_beta_sigmas=True), STRAIGHT, kinds=V),
    "Euler, trailing": Case(EULER, dict(timestep_spacing="trailing"), STRAIGHT, kinds=EPS),
    "Euler, zero terminal SNR": Case(EULER, ZERO_SNR, STRAIGHT, kinds=V),
    "Euler, ends at sigma_min": Case(
        EULER, dict(final_sigmas_type="sigma_min"), STRAIGHT, kinds=EPS
    ),
    "Euler ancestral": Case("EulerAncestralDiscreteScheduler", rules=ONE_STEP, noisy=True),
    "LMS": Case(LMS, rules=MULTISTEP),
    "LMS, Karras": Case(LMS, KARRAS, MULTISTEP, kinds=V),
    "Heun": Case(HEUN_1, evaluations=HEUN, kinds=ALL),
    "Heun, Karras": Case(HEUN_1, KARRAS, evaluations=HEUN, kinds=V),
    "KDPM2": Case(KDPM2, evaluations=HEUN),
    "KDPM2, Karras": Case(KDPM2, KARRAS, evaluations=HEUN, told=False, kinds=V),
    "KDPM2 ancestral": Case("KDPM2AncestralDiscreteScheduler", evaluations=HEUN, noisy=True),
    "DPM++ SDE": Case(
        "DPMSolverSDEScheduler", dict(noise_sampler_seed=0), evaluations=HEUN, noisy=True, kinds=EPS
    ),
    "DPM++ 2M": Case(DPM, rules=MULTISTEP, kinds=ALL),
    "DPM++ 2M, Karras": Case(DPM, KARRAS, MULTISTEP, told=False),
    "DPM++ 2M, SDE": Case(DPM, SDE, MULTISTEP, noisy=True),
    "DPM++ 3M": Case(DPM, dict(solver_order=3), MULTISTEP, kinds=EPS),
    "DPM++ 2M, zero terminal SNR": Case(DPM, ZERO_SNR, MULTISTEP, kinds=V),
    "DPM++ 2M, inverse": Case("DPMSolverMultistepInverseScheduler", kinds=EPS),
    "DPM++ 2S": Case(DPM_S, evaluations=(2, 1, 1)),
    "DPM++ 3S": Case(DPM_S, dict(solver_order=3), evaluations=(3, 1), kinds=V),
    "DEIS": Case(DEIS, rules=MULTISTEP),
    "DEIS, Karras": Case(DEIS, KARRAS, MULTISTEP, told=False, kinds=EPS),
    "UniPC": Case(UNIPC, kinds=ALL),
    "SA-Solver": Case("SASolverScheduler", noisy=True),
    "EDM Euler": Case("EDMEulerScheduler", rules=STRAIGHT),
    "EDM Euler, exponential": Case(
        "EDMEulerScheduler", dict(sigma_schedule="exponential", sigma_data=1.0), STRAIGHT, kinds=V
    ),
    "EDM DPM++ 2M": Case(EDM_DPM, rules=MULTISTEP),
    "EDM DPM++ 2M, SDE": Case(EDM_DPM, SDE, MULTISTEP, noisy=True, kinds=EPS),
    "EDM DPM++ 2M, cosine": Case(
        "CosineDPMSolverMultistepScheduler", rules=MULTISTEP, noisy=True, kinds=V
    ),
    "flow Euler": Case(FLOW_EULER, rules=STRAIGHT + ODE, kinds=FLOW),
    "flow Euler, shift 3": Case(FLOW_EULER, dict(shift=3.0), STRAIGHT + ODE, kinds=FLOW),
    "flow Euler, dynamic shift": Case(
        FLOW_EULER, dict(use_dynamic_shifting=True), STRAIGHT + ODE, kinds=FLOW
    ),
    "flow Euler, Karras": Case(FLOW_EULER, KARRAS, STRAIGHT + ODE, kinds=FLOW),
    "flow Euler, stochastic": Case(
        FLOW_EULER, dict(stochastic_sampling=True), ONE_STEP, kinds=FLOW, noisy=True
    ),
    "flow Euler, inverted": Case(FLOW_EULER, dict(invert_sigmas=True), STRAIGHT, kinds=FLOW),
    "flow LCM": Case("FlowMatchLCMScheduler", dict(shift=3.0), ONE_STEP, kinds=FLOW, noisy=True),
    "flow Heun": Case("FlowMatchHeunDiscreteScheduler", kinds=FLOW, evaluations=HEUN),
    "flow DPM++ 2M": Case(DPM, {**AS_FLOW, "flow_shift": 3.0}, MULTISTEP + ODE, FLOW, told=False),
    "flow DPM++ 2M, SDE": Case(DPM, {**AS_FLOW, **SDE}, MULTISTEP, FLOW, noisy=True, told=False),
    "flow DPM++ 2S": Case(DPM_S, AS_FLOW, kinds=FLOW, evaluations=(2, 1, 1), told=False),
    "flow DEIS": Case(DEIS, AS_FLOW, MULTISTEP + ODE, FLOW, told=False),
    "flow UniPC": Case(UNIPC, {**AS_FLOW, "flow_shift": 3.0}, ODE, FLOW, told=False),
}
EACH = [
    pytest.param(name, kind, id=f"{name}-{kind}") for name in CASES for kind in CASES[name].kinds
]


class ChainedCogVideoXDPMScheduler(diffusers.CogVideoXDPMScheduler):
    """Called as Stable Diffusion does; CogVideoX's own pipeline hands on the last estimate."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.last = (None, None)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        clean, before = self.last
        result = super().step(
            model_output, clean, timestep, before, sample, generator=generator, return_dict=False
        )
        self.last = (result[1], timestep)
        return result


def brownian_interval(t0, t1, size, dtype, device, entropy, **_):
    """What the SDE schedulers ask of torchsde: increments that are the same for the same times."""

    def increment(a, b):
        seed = hash((entropy, round(float(a), 4), round(float(b), 4))) % 2**31
        draw = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return draw * abs(float(b) - float(a)) ** 0.5

    return increment


def scheduler_class(name: str) -> type:
    modules = {"DPMSolverSDEScheduler": "dpmsolver_sde"}
    modules["CosineDPMSolverMultistepScheduler"] = "cosine_dpmsolver_multistep"
    if name in modules:  # they need torchsde, for its noise only
        stub = types.SimpleNamespace(BrownianInterval=brownian_interval)
        with patch.dict(sys.modules, torchsde=stub):
            module = importlib.import_module(f"diffusers.schedulers.scheduling_{modules[name]}")
        return getattr(module, name)
    return globals().get(name) or getattr(diffusers, name)


def make(case: Case, kind: str):
    """The scheduler of a case; Stable Diffusion's noise schedule, unless it has its own."""
    key = (case.scheduler, repr(case.options))
    if key not in BUILT:
        common = dict(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        cls = scheduler_class(case.scheduler)
        known = {} if case.flow else inspect.signature(cls.__init__).parameters
        config = {name: value for name, value in common.items() if name in known}
        BUILT[key] = cls(**{**config, **case.options})
    scheduler = copy.deepcopy(BUILT[key])
    if not case.flow:
        scheduler.register_to_config(prediction_type=kind)
    return scheduler


BUILT: dict = {}  # some take long to make


def started(case: Case, kind: str):
    """The scheduler of a case at the start of a run of the pipeline below."""
    scheduler = make(case, kind)
    options = {}
    if scheduler.config.get("use_dynamic_shifting", False):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        options["mu"] = calculate_shift(16, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(STEPS, **options)
    return scheduler


def advance(case: Case, scheduler, out, t, x, generator=None):
    """One step of a scheduler, with the arguments that the pipelines give."""
    known = inspect.signature(type(scheduler).step).parameters
    options = dict(generator=generator, eta=case.eta)
    options = {name: value for name, value in options.items() if name in known and not case.flow}
    return scheduler.step(out, t, x, **options, return_dict=False)[0]


# --- the pipelines -------------------------------------------------------------------------------

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@cache
def pipelines():
    sd, sd3 = tiny_sd(), tiny_sd3()
    cond, uncond = sd.encode_prompt("a red star", "cpu", 1, True, "")
    prompts = {False: dict(prompt_embeds=cond, negative_prompt_embeds=uncond), True: sd3_prompt()}
    return {False: sd, True: sd3}, prompts


def run(name: str, kind: str, guidance: Guidance | None = None, scale: float = 7.5):
    """The latents at the end of a run of the tiny pipeline on this scheduler."""
    case = CASES[name]
    pipes, prompts = pipelines()
    pipe = pipes[case.flow]
    pipe.scheduler = make(case, kind)
    options = dict(prompts[case.flow], height=32, width=32, latents=X, output_type="latent")
    if not case.flow:  # SD3's pipeline has no eta, and hands no generator to the scheduler
        options.update(eta=case.eta, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    options.update(num_inference_steps=STEPS, guidance_scale=scale)
    if guidance is None:
        return pipe(**options).images
    with guidance.attach(pipe):
        return pipe(**options).images


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_cfg_equals_the_untouched_pipeline(name, kind):
    guidance, case = CFG(6.0), CASES[name]
    torch.testing.assert_close(
        run(name, kind, guidance, scale=2.0), run(name, kind, scale=6.0), atol=2e-4, rtol=1e-3
    )
    assert guidance.report().rows_per_step == [2 * n for n in case.evaluations]
    record(TABLE, name, "CFG")


# --- noise levels --------------------------------------------------------------------------------


def output(kind: str, x0, eps, level: Level):
    """What a network puts out to say x0 and eps, from the definitions."""
    alpha, sigma = level.alpha, level.sigma
    match kind:
        case "epsilon":
            return eps
        case "v_prediction" | "preconditioned":  # EDM: D = c_skip x + c_out F, c_out < 0 for v
            nsr, data = level.nsr, level.data
            squares = nsr**2 + data**2
            sign = 1 if kind == "preconditioned" else -1
            c_skip, c_out = data**2 / squares, sign * nsr * data / math.sqrt(squares)
            if math.isinf(nsr):
                return alpha * eps - sigma * x0
            return (x0 - c_skip * (x0 + nsr * eps)) / c_out
        case "flow":
            return eps - x0
        case "reverse_flow":
            return x0 - eps
        case "sample":
            return x0
    raise AssertionError(kind)


def test_v_prediction_is_edms_preconditioning_of_unit_variance():
    """The formula above, against the definition of v."""
    x0, eps = torch.randn(2, 3, 4).unbind()
    level = Level(0.6, 0.8)
    torch.testing.assert_close(output("v_prediction", x0, eps, level), 0.6 * eps - 0.8 * x0)


# PNDM averages v over two noise levels as if it were at one: its step lands at neither.
LANDING = [
    param
    for param in EACH
    if param.values not in (("PNDM", "v_prediction"), ("PNDM, PLMS only", "v_prediction"))
]


@pytest.mark.parametrize(("name", "kind"), LANDING)
def test_the_scheduler_steps_from_level_to_level(name, kind):
    """On a network that always says x0 and eps, each step leads to scale (alpha x0 + sigma eps).

    So the schedulers themselves say what their noise levels are. Noise that they add is told from
    the signal by two runs on x0 and -x0.
    """
    case = CASES[name]
    x0, eps = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).unbind()
    pair = [(1, started(case, kind)), (-1, started(case, kind))]
    scheduler = pair[0][1]
    predicted, levels = noise.kind(scheduler), noise.levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) == sum(case.evaluations)
    for i, (t, (now, after)) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        steep = 0 if case.flow else now.nsr  # float32 loses so much where noise is subtracted
        close = dict(atol=5e-5 + 2e-6 * min(steep, 5e3), rtol=1e-4)
        landed = []
        for sign, each in pair:
            seen = now.alpha * sign * x0 + now.sigma * eps
            latents = now.scale * seen
            if hasattr(each, "scale_model_input"):
                torch.testing.assert_close(each.scale_model_input(latents, t), seen, **close)
            out = output(predicted, sign * x0, eps, now)
            prediction = Prediction(out, seen, now, predicted)
            torch.testing.assert_close(prediction.x0, sign * x0, **close)
            lost = 5e-7 / now.nsr  # and so much where the signal is
            torch.testing.assert_close(prediction.eps, eps, atol=2e-5 + lost, rtol=1e-4)
            torch.manual_seed(i)
            generator = torch.Generator().manual_seed(i)
            landed.append(advance(case, each, out, t, latents, generator) / after.scale)
        signal, rest = (landed[0] - landed[1]) / 2, (landed[0] + landed[1]) / 2
        torch.testing.assert_close(signal, after.alpha * x0, **close)
        if case.noisy:  # 16384 draws: a standard error of 0.6 %
            assert float(rest.std()) == pytest.approx(after.sigma, rel=0.03, abs=1e-3)
        else:
            torch.testing.assert_close(rest, after.sigma * eps, **close)
    record(TABLE, name, "APG, FDG, SAG and others on x0")


# DDIM's stride is not the distance of its entries there.
@pytest.mark.parametrize("name", [name for name in CASES if name != "DDIM, linspace"])
def test_each_step_begins_where_the_last_one_landed(name):
    case = CASES[name]
    levels = noise.levels(started(case, case.kinds[0]))
    for (_, landed), (begun, _) in pairwise(levels):
        assert begun.nsr == pytest.approx(landed.nsr, rel=1e-5)


def told_level(scheduler, t: float) -> Level:
    """The noise level that a timestep stands for, as networks are trained: not read from levels."""
    config = scheduler.config
    if hasattr(config, "sigma_data"):
        cosine = type(scheduler).__name__.startswith("Cosine")
        nsr, data = math.tan(t * math.pi / 2) if cosine else math.exp(4 * t), config.sigma_data
        scale = math.sqrt(nsr**2 + data**2)
        return Level(1 / scale, nsr / scale, scale, data)
    if not hasattr(scheduler, "alphas_cumprod"):
        share = 1 - t / 1000 if config.get("invert_sigmas") else t / 1000
        return Level(1 - share, share)
    squares = scheduler.alphas_cumprod.double().numpy()
    if t == round(t):
        square = float(squares[round(t)])
    else:
        logs = np.log((1 - squares) / squares)
        square = 1 / (1 + math.exp(np.interp(t, np.arange(len(squares)), logs)))
    return Level(math.sqrt(square), math.sqrt(1 - square))


@pytest.mark.parametrize("name", CASES)
def test_time_falls_with_the_noise(name):
    """What curves over time see: 1000 is noise, also where the network is told something else."""
    scheduler = started(CASES[name], CASES[name].kinds[0])
    times = noise.times(scheduler)
    assert all(0 <= t <= 1000 for t in times)
    levels = [now.nsr for now, _ in noise.levels(scheduler)]
    ordered = zip(sorted(levels), sorted(times), strict=True)
    assert sorted(zip(levels, times, strict=True)) == list(ordered)


class Gaussian(ModelMixin, ConfigMixin):
    """The exact network of data x0 ~ N(mean, spread^2); it knows its noise level from t alone."""

    @register_to_config
    def __init__(self, mean=0.7, spread=0.6):
        super().__init__()
        self.register_to_config(in_channels=4, out_channels=4, sample_size=8, patch_size=2)
        self.register_to_config(time_cond_proj_dim=None, num_layers=1)
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives it a device and a dtype
        self.mean, self.variance = mean, spread**2

    def forward(self, sample=None, timestep=None, hidden_states=None, return_dict=True, **_):
        x = (hidden_states if sample is None else sample).double()
        level = told_level(self.scheduler, float(timestep.flatten()[0]))
        alpha, sigma = level.alpha, level.sigma
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        self.x0 = self.mean + gain * (x - alpha * self.mean)
        self.eps = (x - alpha * self.x0) / sigma
        out = output(noise.kind(self.scheduler), self.x0, self.eps, level)
        return (out.to(sample.dtype if hidden_states is None else hidden_states.dtype),)


class Reading(Guidance):
    """Reads what the network said, and writes it again in every space."""

    name = "reading"

    def needs(self, moment, state):
        return COND

    def guide(self, step, state):
        truth = self.truth
        p = step.cond
        close = dict(
            atol=1e-5 * (1 + min(step.level.nsr, 5e3) * (step.kind == "epsilon")), rtol=1e-4
        )
        torch.testing.assert_close(p.x0, truth.x0.float(), **close)
        torch.testing.assert_close(p.eps, truth.eps.float(), atol=1e-4, rtol=1e-3)
        for again in (step.predict(x0=p.x0), step.predict(v=p.v), step.predict(out=p.out)):
            torch.testing.assert_close(again.x0, p.x0, **close)
        self.seen = [*self.seen, (step.index, step.stage)]
        return p


TOLD = [param for param in EACH if CASES[param.values[0]].told]


@pytest.mark.parametrize(("name", "kind"), TOLD)
def test_strategies_read_the_exact_posterior_mean(name, kind):
    case = CASES[name]
    pipe = pipelines()[0][case.flow]
    part = "transformer" if case.flow else "unet"
    network, exact, guidance = getattr(pipe, part), Gaussian(), Reading()
    guidance.truth, guidance.seen = exact, []
    exact.scheduler = started(case, kind)
    setattr(pipe, part, exact)
    try:
        run(name, kind, guidance)
    finally:
        setattr(pipe, part, network)
    assert guidance.seen == [(i, s) for i, n in enumerate(case.evaluations) for s in range(n)]


# --- methods x schedulers x prediction types -----------------------------------------------------


class Speaking:
    """Lets a network that predicts eps (or a velocity) say the same as one of another kind would.

    It goes by the level of the time that it is told, as a network of that kind would.
    """

    def __init__(self, network, case: Case, kind: str):
        self.flow, self.scheduler = case.flow, started(case, kind)
        self.kind = noise.kind(self.scheduler)
        times, levels = self.scheduler.timesteps.tolist(), noise.levels(self.scheduler)
        self.levels = {t: now for t, (now, _) in zip(times, levels, strict=True)}
        self.network, self.forward = network, network.forward

    def __call__(self, *args, **given):
        given |= zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)
        x = given["hidden_states" if self.flow else "sample"]
        time = float(torch.as_tensor(given["timestep"]).flatten()[0])
        level = self.levels.get(time) or told_level(self.scheduler, time)
        if self.flow:
            given["timestep"] = torch.full_like(given["timestep"], 1000 * level.sigma)
        said, *rest = self.forward(**{**given, "return_dict": False})
        x0 = x - level.sigma * said if self.flow else (x - level.sigma * said) / level.alpha
        eps = x0 + said if self.flow else said
        return (output(self.kind, x0, eps, level), *rest)

    def __enter__(self):
        self.network.forward = self

    def __exit__(self, *exception):
        del self.network.forward


# What is the same run, if the network says the same.
MATRIX = {
    name: [(name, kind) for kind in CASES[name].kinds]
    for name in (
        *("DDIM", "DDPM", "Euler", "Euler ancestral", "DPM++ 2M", "DPM++ 2M, SDE"),
        *("DPM++ 2M, Karras", "Heun", "UniPC", "LCM", "EDM Euler", "flow Heun"),
    )
} | {"flow Euler": [("flow Euler", "flow"), ("flow Euler, inverted", "flow")]}
# Their formula, their table or their head is about what the network puts out, whatever that is.
OF_ITS_KIND = {*OWN_SPACE, "internal", "linear-ag"}
METHODS = sorted({*methods()} - {*FLOW_ONLY, "embedded"})
OF_TEXTS = {"gfcg", "nag", "nasa", "perp-neg"}  # the tiny SD3 has no text encoders


@cache
def unguided(name):
    return run(name, CASES[name].kinds[0])


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("method", METHODS)
def test_what_the_network_says_counts_and_not_how(method, name):
    """Networks of different kinds that say the same lead to the same latents, on each scheduler."""
    case, pipe = CASES[name], pipelines()[0][CASES[name].flow]
    if case.flow and method in OF_TEXTS:
        return
    network, weaker = pipe.transformer if case.flow else pipe.unet, None
    if method == "autoguidance":
        weaker = tiny_sd3(seed=1).transformer if case.flow else tiny_sd(seed=1).unet
    head = InternalHead("transformer_blocks.0", 16, 4, 2) if case.flow else None
    # Rescaling, too, is about what the network puts out.
    guidance = CFG(6.0) if method == "cfg" else acting(method, weaker, head)
    unfit = method in RULES and method not in case.rules
    if unfit or (guidance.edits_latents and "cfg++" not in case.rules):
        with pytest.raises(GuidanceError, match=case.scheduler):
            run(name, case.kinds[0], guidance)
        return
    found = []
    for each, kind in MATRIX[name]:
        with ExitStack() as stack:
            for part in filter(None, (network, weaker)):
                stack.enter_context(Speaking(part, CASES[each], kind))
            found.append(run(each, kind, guidance))
        assert len(guidance.report().steps) == len(case.evaluations)
    assert torch.isfinite(torch.stack(found)).all()
    assert not torch.allclose(found[0], unguided(name), atol=1e-4)
    for other in found[1:] if method not in OF_ITS_KIND else ():
        scale = float(found[0].abs().max())
        torch.testing.assert_close(other / scale, found[0] / scale, atol=1e-3, rtol=1e-3)


# --- solver steps --------------------------------------------------------------------------------


def true_levels(case: Case, kind: str) -> list[float]:
    """sigma/alpha at the start of each solver step."""
    scheduler = started(case, kind)
    entries = [0, *accumulate(case.evaluations)][:-1]
    times = scheduler.timesteps.tolist()
    if case.told:
        return [told_level(scheduler, times[i]).nsr for i in entries]
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.tolist()
        return [sigmas[i] / (1 - sigmas[i]) if case.flow else sigmas[i] for i in entries]
    squares = [scheduler.alphas_cumprod[max(t - 1000 // STEPS, 0)] for t in times]  # inversion
    return [float(((1 - square) / square).sqrt()) for square in squares]


@pytest.mark.parametrize("name", CASES)
def test_an_interval_acts_on_exactly_its_steps(name):
    """Its bounds are two noise levels of the run: the lower is outside, the upper inside."""
    case = CASES[name]
    truth = true_levels(case, case.kinds[0])
    _, high, *rest = sorted(truth, reverse=True)
    low = rest[0] if rest else high / 2
    tolerance = min(0.1, high * 1e-5)
    guidance = CFG(Interval(5.0, low=low, high=high, tolerance=tolerance))
    run(name, case.kinds[0], guidance)
    report = guidance.report()
    active = [nsr == high for nsr in truth]
    assert report.active_steps == [active.index(True)]
    pairs = zip(case.evaluations, active, strict=True)
    assert report.rows_per_step == [n * (1 + acts) for n, acts in pairs]
    record(TABLE, name, "Interval")


SEVERAL = [name for name in CASES if max(CASES[name].evaluations) > 1]


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("method", [APG, AdaptiveGuidance])
def test_state_advances_once_per_solver_step(name, method):
    log = []

    class Watched(method):
        def guide(self, step, state):
            before = dict(vars(state))
            result = super().guide(step, state)
            same = all(vars(state)[key] is before.get(key) for key in vars(state))
            log.append((step.index, step.stage, not same))
            return result

    run(name, CASES[name].kinds[0], Watched(8.0))
    stages = [(i, s) for i, n in enumerate(CASES[name].evaluations) for s in range(n)]
    assert [entry[:2] for entry in log] == stages
    assert not any(changed for _, stage, changed in log if stage > 0)
    if method is APG:
        assert all(changed for _, stage, changed in log if stage == 0)


class Where(Guidance):
    """Notes the time and the noise level of each evaluation."""

    name = "where"

    def guide(self, step, state):
        self.seen = [*self.seen, (step.index, step.stage, float(step.timestep), step.level.nsr)]
        return step.cond


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("DDIM", 0.5, [(0, 0), (1, 0)]),
        ("Heun", 0.5, [(0, 0), (0, 1), (1, 0)]),
        ("KDPM2", 0.5, [(0, 0), (0, 1), (1, 0)]),
        # PNDM looks twice at its first step, whichever that is; its schedule repeats 501.
        ("PNDM, PLMS only", 0.75, [(0, 0), (0, 1), (1, 0), (2, 0)]),
        ("PNDM, PLMS only", 0.5, [(0, 0), (0, 1), (1, 0)]),
        ("DPM++ 2S", 0.75, [(0, 0), (1, 0), (2, 0)]),  # the first step lost its first evaluation
        ("DPM++ 3S", 0.75, [(0, 0), (0, 1), (1, 0)]),
        ("UniPC", 0.5, [(0, 0), (1, 0)]),
    ],
)
def test_runs_that_start_late(name, strength, expected):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make(CASES[name], "epsilon")
    guidance = Where()
    guidance.seen = []
    with guidance.attach(pipe):
        pipe(
            "a red star",
            image=Image.new("RGB", (32, 32), "red"),
            strength=strength,
            num_inference_steps=STEPS,
            output_type="latent",
        )
    assert [entry[:2] for entry in guidance.seen] == expected
    for _, _, t, nsr in guidance.seen:
        assert nsr == pytest.approx(told_level(pipe.scheduler, t).nsr, rel=1e-4)


# --- ways of stepping ----------------------------------------------------------------------------

W, LAMBDA = 3.0, 0.7
RULES = {
    "cfg++": lambda: CFGPlusPlus(LAMBDA),
    "cfg-mp": lambda: ManifoldProjectedCFG(W, iterations=1, above=0.5),
    "pcg": lambda: PCG(W, seed=3),
    "rectified-cfg++": lambda: RectifiedCFGPlusPlus(W),
}
COLUMNS = {"cfg++": "CFG++", "cfg-mp": "CFG-MP", "pcg": "PCG", "rectified-cfg++": "Rectified-CFG++"}


class ByHand:
    """A sampling loop around the pipeline's network and scheduler."""

    def __init__(self, name: str, kind: str):
        self.case = CASES[name]
        pipes, prompts = pipelines()
        self.pipe, self.prompt = pipes[self.case.flow], prompts[self.case.flow]
        self.scheduler = started(self.case, kind)
        self.kind = noise.kind(self.scheduler)
        self.levels = noise.levels(self.scheduler)  # tested above
        self.noise = Noise(3, "pcg")
        self.generator = torch.Generator().manual_seed(5)

    @torch.no_grad()
    def predict(self, branch: str, x, t, level: Level) -> Prediction:
        given = {
            name.removeprefix("negative_"): value
            for name, value in self.prompt.items()
            if name.startswith("negative_") == (branch == "uncond")
        }
        if self.case.flow:
            out = self.pipe.transformer(
                hidden_states=x,
                timestep=torch.as_tensor(t).reshape(1),
                encoder_hidden_states=given["prompt_embeds"],
                pooled_projections=given["pooled_prompt_embeds"],
            ).sample
        else:
            out = self.pipe.unet(x, t, given["prompt_embeds"]).sample
        return Prediction(out, x, level, self.kind)

    def step(self, out, t, latents):
        return advance(self.case, self.scheduler, out, t, latents, self.generator)

    def sample(self, rule):
        torch.manual_seed(5)
        scheduler = self.scheduler
        latents = X * float(getattr(scheduler, "init_noise_sigma", 1.0))
        times = [*scheduler.timesteps, None]
        for i, (now, after) in enumerate(self.levels):
            x = latents
            if hasattr(scheduler, "scale_model_input"):
                x = scheduler.scale_model_input(latents, times[i])
            latents = rule(self, latents, x, now, after, times[i], times[i + 1])
        return latents


def cfgpp(hand, latents, x, now, after, t, _):
    """The solver on the unconditional prediction, then a push of the clean estimate.

    The inversion of the official code: remove the unconditional noise, add the guided one.
    """
    cond, uncond = (hand.predict(branch, x, t, now) for branch in ("cond", "uncond"))
    if after.nsr > now.nsr:
        eps = uncond.eps + LAMBDA * (cond.eps - uncond.eps)
        return after.alpha * (x - now.sigma * uncond.eps) / now.alpha + after.sigma * eps
    push = after.scale * after.alpha * LAMBDA * (cond.x0 - uncond.x0)
    return hand.step(uncond.out, t, latents) + push


def cfgmp(hand, latents, x, now, after, t, _):
    """One forward-backward iteration in flow coordinates, then CFG from there."""
    share, shared = (level.sigma / (level.alpha + level.sigma) for level in (now, after))
    if share > 0.5:
        half, stretch = (share - shared) / 2, now.alpha + now.sigma
        order = [("uncond", half), ("cond", -half)]
        for branch, length in order[::-1] if share >= 0.95 else order:
            p = hand.predict(branch, x, t, now)
            x = x + stretch * length * (p.eps - p.x0)
    cond, uncond = (hand.predict(branch, x, t, now) for branch in ("cond", "uncond"))
    return hand.step(uncond.out + W * (cond.out - uncond.out), t, now.scale * x)


def pcg(hand, latents, x, now, after, t, later):
    """The solver on the conditional prediction, then one Langevin step on the powered density."""
    latents = hand.step(hand.predict("cond", x, t, now).out, t, latents)
    if later is None or after.sigma == 0:
        return latents
    x = latents / after.scale
    cond, uncond = (hand.predict(branch, x, later, after) for branch in ("cond", "uncond"))
    g = uncond.eps + (2 * W - 1) * (cond.eps - uncond.eps)
    e = min(now.sigma**2 - (now.alpha * after.sigma / after.alpha) ** 2, after.sigma**2)
    return after.scale * (x - e / 2 * g / after.sigma + math.sqrt(e) * hand.noise(x))


def rectified(hand, latents, x, now, after, t, _):
    """The difference of the branches half a step ahead, on top of the conditional velocity."""
    cond = hand.predict("cond", x, t, now).out
    ahead = (after.sigma - now.sigma) / 2
    time = torch.as_tensor(1000 * (now.sigma + ahead)).to(t.dtype)  # some count in whole steps
    there = (x + ahead * cond, time, now)
    difference = hand.predict("cond", *there).out - hand.predict("uncond", *there).out
    return hand.step(cond + (W - 1) * difference, t, latents)


LOOPS = {"cfg++": cfgpp, "cfg-mp": cfgmp, "pcg": pcg, "rectified-cfg++": rectified}
CORRECT = [
    pytest.param(rule, name, kind, id=f"{rule}-{name}-{kind}")
    for rule in RULES
    for name, case in CASES.items()
    for kind in case.kinds
    if rule in case.rules
]
WRONG = [(rule, name) for rule in RULES for name in CASES if rule not in CASES[name].rules]


@pytest.mark.parametrize(("rule", "name", "kind"), CORRECT)
def test_a_way_of_stepping_equals_its_loop(rule, name, kind):
    guided = run(name, kind, RULES[rule]())
    expected = ByHand(name, kind).sample(LOOPS[rule])
    scale = float(expected.abs().max())
    torch.testing.assert_close(guided / scale, expected / scale, atol=2e-4, rtol=1e-3)
    record(TABLE, name, COLUMNS[rule], YES)


@pytest.mark.parametrize(("rule", "name"), WRONG)
def test_other_ways_of_stepping_are_refused_before_the_first_evaluation(rule, name):
    case, evaluations = CASES[name], []
    pipe = pipelines()[0][case.flow]
    inner = pipe.transformer.pos_embed if case.flow else pipe.unet.conv_in
    watch = inner.register_forward_pre_hook(lambda *_: evaluations.append(1))
    try:
        with pytest.raises(GuidanceError) as refused:
            run(name, case.kinds[0], RULES[rule]())
    finally:
        watch.remove()
    assert not evaluations
    message = str(refused.value)
    if rule == "rectified-cfg++" and noise.kind(make(case, case.kinds[0])) != "flow":
        assert "is for flow models" in message and "CFGPlusPlus" in message
    else:
        assert case.scheduler in message and "FlowMatchEulerDiscreteScheduler" in message
    record(TABLE, name, COLUMNS[rule], REFUSED)


def test_a_sum_is_refused_for_its_terms():
    with pytest.raises(GuidanceError, match=r"PCG\(.*but EulerAncestral"):
        run("Euler ancestral", "epsilon", CFG(2.0) + PCG(3.0))


def test_clipped_estimates_cannot_be_corrected(monkeypatch):
    monkeypatch.setitem(CASES, "clipping", Case(DDIM, dict(clip_sample=True)))
    with pytest.raises(GuidanceError, match="clip_sample and thresholding to False"):
        run("clipping", "epsilon", CFGPlusPlus(LAMBDA))
    torch.testing.assert_close(
        run("clipping", "epsilon", CFG(6.0), scale=2.0), run("clipping", "epsilon", scale=6.0)
    )


@pytest.mark.parametrize(
    ("scheduler", "guidance", "match"),
    [
        (
            diffusers.FlowMatchLCMScheduler(scale_factors=[0.5]),
            CFGPlusPlus(),
            "size of the latents",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            RectifiedCFGPlusPlus(),
            "rev",
        ),
        (diffusers.DDIMScheduler(thresholding=True), CFGPlusPlus(), "thresholding"),
        (diffusers.DPMSolverMultistepScheduler(), CFG() + (PCG() + APG()), "earlier latents"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_configuration_may_be_refused(scheduler, guidance, match):
    scheduler.set_timesteps(10)
    with pytest.raises(GuidanceError, match=match):
        noise.check(scheduler, guidance)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 20, 28, 30, 50])
def test_usual_ddim_spacings_are_straight(spacing, steps):
    """They land where the next step begins, or within a training step of it."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    noise.check(scheduler, PCG() + CFG(), eta=0.0)


def test_inversion_from_clean_latents_is_finite(monkeypatch):
    """Its first evaluation is at sigma = 0."""
    case = Case("DDIMInverseScheduler", dict(set_alpha_to_one=True), told=False)
    monkeypatch.setitem(CASES, "clean", case)
    assert torch.isfinite(run("clean", "epsilon", APG(8.0))).all()


# --- schedulers that are not known ---------------------------------------------------------------


def test_an_unknown_scheduler_serves_what_needs_no_noise_level(monkeypatch):
    monkeypatch.setitem(CASES, "unknown", Case("IPNDMScheduler"))
    assert noise.levels(started(CASES["unknown"], "epsilon")) is None
    torch.testing.assert_close(
        run("unknown", "epsilon", CFG(6.0), scale=2.0), run("unknown", "epsilon", scale=6.0)
    )


@pytest.mark.parametrize(
    ("guidance", "match"),
    [
        (APG(8.0), "noise level"),
        (CFG(Interval(5.0, 0.3, 5.0)), "noise level"),
        (CFGPlusPlus(LAMBDA), "IPNDMScheduler is not known"),
        (ManifoldProjectedCFG(W), "IPNDMScheduler is not known"),
        (PCG(W), "IPNDMScheduler is not known"),
        (RectifiedCFGPlusPlus(W), "is for flow models"),
    ],
    ids=lambda value: re.sub(r"\(.*", "", repr(value)),
)
def test_an_unknown_scheduler_is_refused_otherwise(guidance, match, monkeypatch):
    monkeypatch.setitem(CASES, "unknown", Case("IPNDMScheduler"))
    with pytest.raises(GuidanceError, match=match):
        run("unknown", "epsilon", guidance)
