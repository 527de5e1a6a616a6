"""How predictions are combined, when, and how the step is made: each rule against its own oracle.

The references are written from the published formulas, one sample or one number at a time; the
loops use nothing of guidancekit but its source of random numbers.
"""

from __future__ import annotations

import itertools
import json
import math

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import KINDS, guide, make_step, random_triple
from tiny import sd3_prompt, tiny_sd, tiny_sd3

from guidancekit import (
    CFG,
    MAMBOG,
    PCG,
    TCFG,
    AdaptiveGuidance,
    BetaCFG,
    CFGZeroStar,
    DynamicThresholding,
    GuidanceError,
    LinearAG,
    RectifiedCFGPlusPlus,
    RescaledCFG,
)
from guidancekit.fitting import fit_linear_ag, table
from guidancekit.guidance import State
from guidancekit.methods.tcfg import dominant
from guidancekit.methods.thresholding import quantile_of
from guidancekit.tensors import Noise

STEPS = 8
FEW = settings(max_examples=25)


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3()


def latents(count=1, seed=3):
    """Starting noise; sample i is the same in a batch of any size."""
    draws = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return torch.stack([torch.randn(4, 8, 8, generator=draw) for draw in draws])


def rows_of(prompt, rows):
    return {name: tensor[rows] for name, tensor in prompt.items()}


def run_sd3(pipe, guidance, count=1, steps=STEPS, rows=slice(None), **call):
    """Latents of a guided run of SD3 on `rows` of `count` prompts."""
    call = {"guidance_scale": 4.0, "num_inference_steps": steps, **call}
    with guidance.attach(pipe):
        return pipe(
            **rows_of(sd3_prompt(count), rows),
            latents=latents(count)[rows].clone(),
            output_type="latent",
            **call,
        ).images


class Flow:
    """v_cond and v_uncond of the tiny SD3 at (x, sigma), and its noise levels."""

    def __init__(self, pipe, steps=STEPS):
        self.network, self.prompt = pipe.transformer, sd3_prompt(1)
        pipe.scheduler.set_timesteps(steps)
        self.sigmas = pipe.scheduler.sigmas.tolist()

    @torch.no_grad()
    def __call__(self, x, sigma):
        return [
            self.network(
                hidden_states=x,
                timestep=torch.tensor([1000 * sigma]),
                encoder_hidden_states=self.prompt[f"{prefix}prompt_embeds"],
                pooled_projections=self.prompt[f"{prefix}pooled_prompt_embeds"],
            ).sample
            for prefix in ("", "negative_")
        ]

    def integrate(self, velocity):
        """Euler's method along velocity(i, x, sigma, next sigma)."""
        x = latents()
        for i, (now, after) in enumerate(itertools.pairwise(self.sigmas)):
            x = x + (after - now) * velocity(i, x, now, after)
        return x


# --- CFG-Zero* -----------------------------------------------------------------------------------


@FEW
@given(w=st.floats(0, 15), kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
def test_cfgzero_equals_its_formula(w, kind, seed):
    step = make_step(*random_triple(2, 4, 6, 5, seed=seed), kind, nsr=1.7)
    guided = guide(CFGZeroStar(w, zero_init=0), step)
    for row in range(2):
        c, u = (p.v[row].flatten().double() for p in (step.cond, step.uncond))
        k = float(c @ u) / (float(u @ u) + 1e-8)
        expected = [k * b + w * (a - k * b) for a, b in zip(c.tolist(), u.tolist(), strict=True)]
        expected = torch.tensor(expected if w != 1 else c.tolist())
        torch.testing.assert_close(guided.v[row].flatten(), expected, atol=3e-4, rtol=1e-4)


def test_cfgzero_equals_a_loop_on_sd3(sd3):
    flow = Flow(sd3)

    def velocity(i, x, now, after):
        if i < 2:
            return torch.zeros_like(x)
        c, u = flow(x, now)
        k = (c * u).sum() / ((u * u).sum() + 1e-8)
        return k * u + 3.0 * (c - k * u)

    guidance = CFGZeroStar(3.0, zero_init=2)
    result = run_sd3(sd3, guidance)
    torch.testing.assert_close(result, flow.integrate(velocity), atol=1e-4, rtol=1e-4)
    assert guidance.report().rows_per_step == [0, 0] + [2] * (STEPS - 2)


@pytest.mark.parametrize(("steps", "zeroed"), [(4, 0), (12, 0), (13, 1), (28, 1), (50, 2)])
def test_cfgzero_rests_for_four_percent_of_the_steps(steps, zeroed):
    resting = [
        CFGZeroStar()._at_rest(make_step(*random_triple(1, 2, 2, 2), index=i, total=steps))
        for i in range(steps)
    ]
    assert resting == [True] * zeroed + [False] * (steps - zeroed)


def test_cfgzero_special_cases():
    cond, uncond, x = random_triple(2, 4, 6, 6)
    step = make_step(cond, uncond, x, "flow")
    step.evaluated["uncond"] = step.predict(v=torch.zeros_like(x))
    guided = guide(CFGZeroStar(5.0, zero_init=0), step).v
    torch.testing.assert_close(guided, 5.0 * step.cond.v, atol=1e-4, rtol=1e-4)
    assert guide(CFGZeroStar(1.0, zero_init=0), step) is step.cond
    assert CFGZeroStar(1.0, zero_init=0).needs(step, State()) == ("cond",)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_cfgzero_costs_nothing_at_rest_on_stable_diffusion(rescale):
    pipe, guidance = tiny_sd(), CFGZeroStar(5.0, zero_init=2)
    with guidance.attach(pipe):
        result = pipe(
            "a star",
            num_inference_steps=5,
            guidance_scale=5.0,
            guidance_rescale=rescale,
            output_type="latent",
        ).images
    assert guidance.report().rows_per_step == [0, 0, 2, 2, 2]
    assert torch.isfinite(result).all()


# --- TCFG ----------------------------------------------------------------------------------------


@FEW
@given(w=st.floats(0, 15), closeness=st.sampled_from([1.0, 0.1, 1e-3, 1e-5]))
def test_tcfg_equals_a_singular_value_decomposition(w, closeness):
    """Also for the nearly parallel predictions of a real network, where float32 Gram matrices of
    the two predictions themselves have nothing left."""
    cond, other, x = random_triple(3, 4, 8, 8)
    step = make_step(cond, cond, x)
    step.evaluated["uncond"] = step.predict(out=step.cond.out + closeness * other)
    guided = guide(TCFG(w), step).out
    for row in range(3):
        u, c = (p.out[row].flatten().double() for p in (step.uncond, step.cond))
        v = torch.linalg.svd(torch.stack([u, c]), full_matrices=False).Vh[0]
        kept = (u @ v) * v
        expected = kept + w * (c - kept)
        torch.testing.assert_close(guided[row].flatten().double(), expected, atol=5e-4, rtol=1e-4)


def test_tcfg_equals_a_loop_on_sd3(sd3):
    flow = Flow(sd3)

    def velocity(i, x, now, after):
        c, u = flow(x, now)
        v = torch.linalg.svd(torch.stack([u.flatten(), c.flatten()]), full_matrices=False).Vh[0]
        kept = ((u.flatten() @ v) * v).reshape(u.shape)
        return kept + 3.0 * (c - kept)

    result = run_sd3(sd3, TCFG(3.0))
    torch.testing.assert_close(result, flow.integrate(velocity), atol=1e-3, rtol=1e-3)


def test_tcfg_direction_of_opposites_and_of_nothing():
    a = torch.randn(1, 4, 4, 4)
    cosine = torch.nn.functional.cosine_similarity(dominant(a, -a).flatten(), a.flatten(), 0)
    assert abs(float(cosine)) == pytest.approx(1.0, abs=1e-6)
    assert not dominant(0 * a, 0 * a).any()
    parallel = make_step(a, 3 * a, torch.zeros_like(a))
    torch.testing.assert_close(guide(TCFG(6.0), parallel).out, parallel.cfg(6.0).out)
    assert guide(TCFG(1.0), parallel) is parallel.cond


# --- rescaled CFG --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(w=st.floats(1.5, 15), phi=st.floats(0, 1))
def test_rescaled_equals_its_formula(kind, w, phi):
    step = make_step(*random_triple(2, 4, 6, 5), kind, nsr=0.6)
    for space, read in (("v", lambda p: p.v), ("output", lambda p: p.out)):
        guided = read(guide(RescaledCFG(w, phi, space), step))
        for row in range(2):
            c, u = read(step.cond)[row].double(), read(step.uncond)[row].double()
            e = u + w * (c - u)
            expected = phi * e * (c.std() / e.std()) + (1 - phi) * e
            torch.testing.assert_close(guided[row].double(), expected, atol=2e-3, rtol=1e-4)


def test_rescaled_output_equals_the_pipelines_own():
    pipe = tiny_sd()
    rescaled = run_sd(pipe, RescaledCFG(7.0, 0.6, "output"))
    call = {"num_inference_steps": 6, "guidance_scale": 7.0, "guidance_rescale": 0.6}
    plain = pipe("a red star", latents=latents(), output_type="latent", **call).images
    torch.testing.assert_close(rescaled, plain, atol=1e-4, rtol=1e-4)


def test_rescaled_is_what_cfg_does_with_the_networks_output():
    step = make_step(*random_triple(2, 4, 8, 8))
    ours, theirs = RescaledCFG(7.0, 0.6, "output"), CFG(7.0, rescale=0.6)
    torch.testing.assert_close(guide(ours, step).out, guide(theirs, step).out)
    flat = torch.full((1, 4, 8, 8), 2.0)
    constant = make_step(flat, flat, flat, "v_prediction")
    assert torch.isfinite(guide(RescaledCFG(7.0), constant).out).all()


# --- dynamic thresholding ------------------------------------------------------------------------


@FEW
@given(w=st.floats(0, 15), quantile=st.floats(0.5, 1), ceiling=st.none() | st.floats(1, 5))
def test_thresholding_equals_its_formula(w, quantile, ceiling):
    step = make_step(*random_triple(2, 3, 9, 7))
    guided = guide(DynamicThresholding(w, quantile, ceiling=ceiling), step).x0
    for row in range(2):
        x0 = step.cfg(w).x0[row]
        q = max(1.0, float(torch.quantile(x0.abs().flatten(), quantile)))
        q = q if ceiling is None else min(q, ceiling)
        torch.testing.assert_close(guided[row], x0.clamp(-q, q) / q, atol=1e-4, rtol=1e-4)
    assert guided.abs().max() <= 1 + 1e-4


@pytest.mark.parametrize("ceiling", [1.5, 100.0])
def test_thresholding_equals_that_of_diffusers_scheduler(ceiling):
    """Whose quantile and clipping are its own; its ceiling has to be a number."""
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=ceiling
    )
    step = make_step(*(3 * tensor for tensor in random_triple(2, 3, 8, 6)))
    guided = guide(DynamicThresholding(4.0, 0.9, ceiling=ceiling), step).x0
    expected = scheduler._threshold_sample(step.cfg(4.0).x0)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_thresholding_leaves_what_is_in_range():
    cond, uncond, x = (0.01 * tensor for tensor in random_triple(2, 3, 8, 8))
    step = make_step(cond, uncond, x)
    torch.testing.assert_close(guide(DynamicThresholding(5.0), step).x0, step.cfg(5.0).x0)
    far = make_step(100 * cond, 100 * uncond, x)
    static = guide(DynamicThresholding(5.0, ceiling=1.0), far).x0
    torch.testing.assert_close(static, far.cfg(5.0).x0.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_thresholding_quantile_of_more_elements_than_torch_takes():
    big = torch.arange(2**24 + 3, dtype=torch.float32).expand(1, -1)
    assert float(quantile_of(big, 0.5)) == 2**23 + 1


# --- beta-CFG ------------------------------------------------------------------------------------


def beta_density(p, a, b):
    return p ** (a - 1) * (1 - p) ** (b - 1) * math.gamma(a + b) / math.gamma(a) / math.gamma(b)


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (2.0, 3.0), (3.0, 2.0)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_beta_equals_its_formula_over_a_run(a, b, gamma):
    cond, uncond, x = random_triple(2, 4, 8, 8)
    for index in range(9):
        step = make_step(cond, uncond, x, index=index, total=9)
        guided = guide(BetaCFG(7.5, a, b, gamma, radius=1.0), step).out
        for row in range(2):
            c, u = step.cond.out[row].double(), step.uncond.out[row].double()
            d = c - u
            length = math.sqrt(sum(value**2 for value in d.flatten().tolist()))
            expected = u + 7.5 * beta_density(index / 8, a, b) * d / length**gamma
            torch.testing.assert_close(guided[row].double(), expected, atol=1e-4, rtol=1e-4)


def test_beta_ends_and_length():
    cond, uncond, x = random_triple(1, 4, 8, 8)
    first, last = (make_step(cond, uncond, x, index=i, total=5) for i in (0, 4))
    for step in (first, last):
        assert guide(BetaCFG(7.5), step) is step.uncond
        assert guide(BetaCFG(7.5, base="cond"), step) is step.cond
        assert BetaCFG(7.5).needs(step, State()) == ("uncond",)
        assert BetaCFG(7.5, base="cond").needs(step, State()) == ("cond",)
    middle = make_step(cond, uncond, x, index=2, total=5)
    push = guide(BetaCFG(7.5, radius=1.0), middle).out - middle.uncond.out
    assert float(push.norm()) == pytest.approx(7.5 * 1.5, rel=1e-4)
    size_free = guide(BetaCFG(7.5), middle).out - middle.uncond.out
    assert float(size_free.norm()) == pytest.approx(7.5 * 1.5 / 8, rel=1e-4)  # 256 of 16384
    one = guide(BetaCFG(1.0, base="cond"), middle)
    torch.testing.assert_close(one.out, middle.cond.out)
    equal = make_step(cond, cond, x, index=2, total=5)
    torch.testing.assert_close(guide(BetaCFG(7.5), equal).out, equal.uncond.out)


def test_beta_costs_one_evaluation_at_the_ends(sd3):
    guidance = BetaCFG(7.5)
    run_sd3(sd3, guidance, count=2)
    assert guidance.report().rows_per_step == [2] + [4] * (STEPS - 2) + [2]


# --- MAMBO-G -------------------------------------------------------------------------------------


@FEW
@given(w=st.floats(1.5, 15), damping=st.floats(0, 20))
def test_mambo_equals_its_formula(w, damping):
    step = make_step(*random_triple(2, 4, 6, 5), "flow", nsr=1.3)
    guided = guide(MAMBOG(w, damping), step).v
    for row in range(2):
        c, u = step.cond.v[row].double(), step.uncond.v[row].double()
        scale = 1 + (w - 1) * math.exp(-damping * float((c - u).norm() / u.norm()))
        expected = u + scale * (c - u)
        torch.testing.assert_close(guided[row].double(), expected, atol=2e-4, rtol=1e-4)


def test_mambo_at_no_difference_and_no_unconditional_velocity():
    cond, _, x = random_triple(1, 4, 6, 6)
    step = make_step(cond, x, x, "flow")  # v_uncond = (x - x0) / sigma = 0
    assert torch.isfinite(guide(MAMBOG(9.0), step).out).all()


# --- adaptive guidance ---------------------------------------------------------------------------


def cosine_by_hand(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def adaptive_by_hand(flow, threshold, minimum, w, crossing="guided"):
    """The latch of one sample; how many steps were guided."""
    latched, guided = False, []

    def velocity(i, x, now, after):
        nonlocal latched
        c, u = flow(x, now)
        if latched:
            return c
        guided.append(i)
        crosses = cosine_by_hand(x - now * c, x - now * u) >= threshold and i + 1 >= minimum
        latched = latched or crosses
        return c if crosses and crossing == "cond" else u + w * (c - u)

    return flow.integrate(velocity), len(guided)


@pytest.mark.parametrize("threshold", [0.9991, 0.9995, 2.0, -1.0])
@pytest.mark.parametrize("minimum", [1, 3])
@pytest.mark.parametrize("crossing", ["guided", "cond"])
def test_adaptive_equals_a_loop_and_counts(sd3, threshold, minimum, crossing):
    guidance = AdaptiveGuidance(4.0, threshold, minimum_steps=minimum, crossing=crossing)
    expected, guided = adaptive_by_hand(Flow(sd3), threshold, minimum, 4.0, crossing)
    torch.testing.assert_close(run_sd3(sd3, guidance), expected, atol=1e-4, rtol=1e-4)
    assert guidance.report().rows_per_step == [2] * guided + [1] * (STEPS - guided)


def test_adaptive_above_one_is_cfg_to_the_last_bit(sd3):
    assert torch.equal(run_sd3(sd3, AdaptiveGuidance(4.0, 2.0)), run_sd3(sd3, CFG(4.0)))


def test_adaptive_samples_latch_alone(sd3):
    """Each sample as in a run of its own; rows are dropped once all of the batch are latched."""
    count, guidance = 4, AdaptiveGuidance(4.0, 0.9995)
    together = run_sd3(sd3, guidance, count)
    rows = guidance.report().rows_per_step
    alone = []
    for i in range(count):
        result = run_sd3(sd3, guidance, count, rows=slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], result, atol=1e-4, rtol=1e-4)
        alone.append(guidance.report().rows_per_step.count(2))
    assert len(set(alone)) > 1, "the test needs samples that latch at different steps"
    assert rows == [2 * count] * max(alone) + [count] * (STEPS - max(alone))


@pytest.mark.parametrize(("space", "latches"), [("eps", True), ("x0", False), ("v", False)])
def test_adaptive_noise_predictions_agree_at_once(space, latches):
    """Eight Gaussians in 1024 dimensions at high noise: the published trap of the eps space."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(8, 4, 16, 16, generator=generator)
    cond, uncond = modes[:1], modes.mean(0, keepdim=True)
    x = 0.05 * cond + torch.randn(1, 4, 16, 16, generator=generator)
    step, state = make_step(cond, uncond, x, nsr=20.0, index=0), State()
    guidance = AdaptiveGuidance(3.0, 0.99, space=space, minimum_steps=1)
    guide(guidance, step, state)
    assert bool(state.after.all()) == latches


def test_adaptive_reads_the_device_only_until_all_are_latched():
    cond, uncond, x = random_triple(2, 4, 6, 6)
    guidance, state = AdaptiveGuidance(4.0, 0.0, minimum_steps=1), State()
    asked = []
    for index in range(4):
        step = make_step(cond, uncond, x, index=index)
        asked.append(guidance.needs(step, state))
        guidance.needs(step, state)  # a second stage of the same step
        guide(guidance, step, state)
    assert asked == [("uncond", "cond"), *[("cond",)] * 3]


# --- LinearAG ------------------------------------------------------------------------------------


def linear_by_hand(flow, rows, w):
    conds, unconds = [], []

    def velocity(i, x, now, after):
        c, u = flow(x, now)
        if rows[i] is None:
            return c
        if rows[i]:
            k = len(conds)
            b, of_cond, of_uncond = rows[i][0], rows[i][1 : k + 2], rows[i][k + 2 :]
            u = b + sum(f * past for f, past in zip(of_cond, [*conds, c], strict=True))
            u = u + sum(f * past for f, past in zip(of_uncond, unconds, strict=True))
        conds.append(c)
        unconds.append(u)
        return u + w * (c - u)

    return flow.integrate(velocity)


ROWS = [[], [0.01, 0.2, 0.1, 0.65], [], [0.0, 0.1, -0.2, 0.1, 0.3, 0.1, -0.1, 0.7], *[None] * 4]


def test_linear_ag_equals_a_loop_and_counts(sd3):
    guidance = LinearAG(3.0, ROWS)
    result = run_sd3(sd3, guidance)
    torch.testing.assert_close(result, linear_by_hand(Flow(sd3), ROWS, 3.0), atol=1e-4, rtol=1e-4)
    assert guidance.report().rows_per_step == [2, 1, 2, 1, 1, 1, 1, 1]
    assert guidance.report().effective_scale == pytest.approx([3] * 4 + [1] * 4, rel=1e-3)


def test_linear_ag_does_not_mix_samples(sd3):
    together = run_sd3(sd3, LinearAG(3.0, ROWS), count=2)
    for i in range(2):
        alone = run_sd3(sd3, LinearAG(3.0, ROWS), 2, rows=slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_linear_ag_keeps_away_from_wild_estimates(sd3):
    wild = [[], [1e9, 0.0, 0.0, 0.0], *[None] * (STEPS - 2)]
    previous = [[], [0.0, 0.0, 0.0, 1.0], *[None] * (STEPS - 2)]
    wild, previous = (run_sd3(sd3, LinearAG(3.0, rows)) for rows in (wild, previous))
    torch.testing.assert_close(wild, previous)


def test_fit_recovers_exact_linear_relations():
    """Paths made by known coefficients: every row comes back, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    conds = torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    unconds = torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    unconds[1] = 0.25 + 0.5 * conds[0] - 0.125 * conds[1] + 0.75 * unconds[0]
    unconds[1] += 1e-3 * torch.randn(5000, generator=generator, dtype=torch.float64)
    unconds[3] = conds[3] - 2.0 * unconds[2]
    columns = torch.cat([torch.ones(1, 5000, dtype=torch.float64), conds, unconds])
    rows = table(columns @ columns.T, guided=4, steps=8, ridge=0.0)
    assert rows[0] == rows[2] == [] and rows[4:] == [None] * 4
    assert rows[1] == pytest.approx([0.25, 0.5, -0.125, 0.75], abs=1e-4)
    assert rows[3] == pytest.approx([0, 0, 0, 0, 1, 0, 0, -2], abs=1e-4)


def test_fit_linear_ag_comes_closer_to_cfg_than_dropping_guidance(sd3, tmp_path):
    prompts = [rows_of(sd3_prompt(6), slice(i, i + 1)) for i in range(1, 6)]
    fitted = fit_linear_ag(sd3, prompts, STEPS, 3.0, height=32, width=32)
    assert [row and len(row) for row in fitted.table] == [[], 4, [], 8, *[None] * 4]
    cfg_then_cond = LinearAG(3.0, [[]] * 4 + [None] * 4)  # what every estimate stands in for
    dropped = LinearAG(3.0, [[], [0.0, 0.0, 1.0, 0.0], [], [0, 0, 0, 0, 1.0, 0, 0, 0], *[None] * 4])
    target, close, far = (run_sd3(sd3, each) for each in (cfg_then_cond, fitted, dropped))
    assert (close - target).norm() < 0.25 * (far - target).norm()

    fitted.save_config(tmp_path)
    again = LinearAG.from_config(LinearAG.load_config(tmp_path))
    named = LinearAG(3.0, str(tmp_path / "guidance_config.json"))
    assert again.table == named.table == fitted.table
    assert json.loads((tmp_path / "guidance_config.json").read_text())["table"] == fitted.table


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 1.0]], "step 0"),
        ([[], [0.0, 1.0]], "4 finite numbers"),
        ([[], [0.0, 1.0, math.nan, 0.0]], "step 1"),
        ([[], None, [0.0] * 6], "step 2"),
        ([[], "abc"], "step 1"),
        (3, "step 0"),
        ("no/such/file.json", "expected a JSON file"),
    ],
)
def test_linear_ag_refuses_a_wrong_table(rows, message):
    with pytest.raises(GuidanceError, match=message):
        LinearAG(3.0, rows)


def test_linear_ag_refuses_another_number_of_steps_and_no_table(sd3):
    with pytest.raises(GuidanceError, match="fitted for 8 steps, but the run has 5"):
        run_sd3(sd3, LinearAG(3.0, ROWS), steps=5)
    with pytest.raises(GuidanceError, match="fit_linear_ag"):
        run_sd3(sd3, LinearAG(3.0))
    with pytest.raises(GuidanceError, match="found no prompts"):
        fit_linear_ag(sd3, [], STEPS, 3.0)


# --- Rectified-CFG++ -----------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.5, 1.0, 0.0])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_rectified_equals_algorithm_1(sd3, fraction, gamma):
    flow = Flow(sd3)

    def velocity(i, x, now, after):
        v, _ = flow(x, now)
        part = 0.5 if after == 0 and fraction == 1.0 else fraction
        there = now + part * (after - now)
        v_cond, v_uncond = flow(x + part * (after - now) * v, there)
        return v + 3.5 * (1 - now) ** gamma * (v_cond - v_uncond)

    guidance = RectifiedCFGPlusPlus(4.5, predictor_fraction=fraction, gamma=gamma)
    result = run_sd3(sd3, guidance)
    torch.testing.assert_close(result, flow.integrate(velocity), atol=2e-4, rtol=2e-4)
    assert guidance.report().rows == 3 * STEPS - (gamma > 0) * 2  # at sigma = 1 the weight is 0


def test_rectified_without_strength_is_conditional_and_at_the_latent_it_is_cfg(sd3):
    conditional = run_sd3(sd3, CFG(1.0))
    torch.testing.assert_close(run_sd3(sd3, RectifiedCFGPlusPlus(1.0)), conditional)
    here = RectifiedCFGPlusPlus(4.5, predictor_fraction=0.0)
    torch.testing.assert_close(run_sd3(sd3, here), run_sd3(sd3, CFG(4.5)), atol=1e-4, rtol=1e-4)


def test_rectified_noise_is_seeded_per_sample(sd3):
    guidance = RectifiedCFGPlusPlus(4.5, noise=0.05, seed=7)
    both = run_sd3(sd3, guidance, count=2)
    torch.testing.assert_close(both, run_sd3(sd3, guidance, count=2))
    second = RectifiedCFGPlusPlus(4.5, noise=0.05, seed=8)
    for row, own in ((0, guidance), (1, second)):
        alone = run_sd3(sd3, own, 2, rows=slice(row, row + 1))
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, run_sd3(sd3, RectifiedCFGPlusPlus(4.5), count=2), atol=1e-3)


def test_rectified_refuses_what_it_is_not_for(sd3):
    with pytest.raises(GuidanceError, match="CFGPlusPlus"):
        run_sd(tiny_sd(), RectifiedCFGPlusPlus(4.0))
    with pytest.raises(GuidanceError, match="guidance_scale above 1"):
        run_sd3(sd3, RectifiedCFGPlusPlus(4.0), guidance_scale=1.0)


# --- PCG -----------------------------------------------------------------------------------------


def run_sd(pipe, guidance, **call):
    call = {"num_inference_steps": 6, "guidance_scale": 5.0, **call}
    with guidance.attach(pipe):
        return pipe("a red star", latents=latents(), output_type="latent", **call).images


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_pcg_without_corrections_is_conditional(name):
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    guidance = PCG(5.0, corrections=0)
    torch.testing.assert_close(run_sd(pipe, guidance), run_sd(pipe, CFG(1.0)))
    assert guidance.report().rows_per_step == [1] * 6


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pcg_equals_a_ddim_loop(prediction_type):
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction_type
    )
    assert pipe.scheduler.config.prediction_type == prediction_type
    guidance = PCG(3.0, corrections=2, step_cap=0.8, seed=5)
    result = run_sd(pipe, guidance)
    assert guidance.report().rows_per_step == [5] * 5 + [1]

    prompt = pipe.encode_prompt("a red star", "cpu", 1, True, "")
    bars, draw = pipe.scheduler.alphas_cumprod.tolist(), Noise(5, "pcg")

    def eps(x, t, which):
        out = pipe.unet(x, t, prompt[which]).sample
        if prediction_type == "epsilon":
            return out
        return math.sqrt(bars[t]) * out + math.sqrt(1 - bars[t]) * x

    x = latents()
    times = [1 + 166 * i for i in reversed(range(6))]
    for now, after in itertools.pairwise([*times, None]):
        bar, bar_after = bars[now], bars[after or 0]
        noise = eps(x, now, 0)
        clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        x = math.sqrt(bar_after) * clean + math.sqrt(1 - bar_after) * noise
        if after is None:
            break
        beta = min(1 - bar / bar_after, 0.8 * (1 - bar_after))
        for _ in range(2):
            c, u = eps(x, after, 0), eps(x, after, 1)
            score = -(u + 5.0 * (c - u)) / math.sqrt(1 - bar_after)
            x = x + beta / 2 * score + math.sqrt(beta) * draw(x)
    torch.testing.assert_close(result, x, atol=1e-3, rtol=1e-3)


def test_pcg_equals_a_flow_loop(sd3):
    flow, draw = Flow(sd3), Noise(0, "pcg")
    x = latents()
    for now, after in itertools.pairwise(flow.sigmas):
        x = x + (after - now) * flow(x, now)[0]
        if after == 0:
            break
        e = min(now**2 - ((1 - now) / (1 - after) * after) ** 2, after**2)
        c, u = (x + (1 - after) * v for v in flow(x, after))
        x = x - e / (2 * after) * (u + 5.0 * (c - u)) + math.sqrt(e) * draw(x)
    guidance = PCG(3.0)
    torch.testing.assert_close(run_sd3(sd3, guidance), x, atol=1e-3, rtol=1e-3)
    assert guidance.report().rows_per_step == [3] * (STEPS - 1) + [1]


def test_pcg_samples_do_not_depend_on_their_batch_mates(sd3):
    both = run_sd3(sd3, PCG(3.0, seed=7), count=2)
    for row in range(2):
        alone = run_sd3(sd3, PCG(3.0, seed=7 + row), 2, rows=slice(row, row + 1))
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"],
)
def test_pcg_refuses_other_schedulers(name):
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    with pytest.raises(GuidanceError, match=f"first-order.*{name}"):
        run_sd(pipe, PCG(5.0))


def test_pcg_needs_both_branches():
    with pytest.raises(GuidanceError, match="guidance_scale above 1"):
        run_sd(tiny_sd(), PCG(5.0), guidance_scale=1.0)


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact noise prediction of N(0, 2) without and N(0, 1) with the condition, everywhere."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.register_buffer("bars", long_schedule().alphas_cumprod.double())
        self.register_to_config(in_channels=4, sample_size=8, time_cond_proj_dim=None)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        bar = self.bars[timestep.long()]
        given = encoder_hidden_states[:, 0, 0].reshape(-1, 1, 1, 1)  # 1 with the condition, 0
        variance = bar * (2 - given) + 1 - bar
        eps = ((1 - bar).sqrt() * sample.double() / variance).to(sample.dtype)
        return (eps,) if not return_dict else {"sample": eps}


def long_schedule(steps=1000):
    return DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=0.1 / steps,
        beta_end=20 / steps,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def final_variance(guidance, steps=300, count=4, side=24, **call):
    parts = {**tiny_sd().components, "unet": GaussianUNet(), "scheduler": long_schedule()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with guidance.attach(pipe):
        samples = pipe(
            prompt_embeds=torch.ones(count, 16, 16),
            negative_prompt_embeds=torch.zeros(count, 16, 16),
            num_inference_steps=steps,
            guidance_scale=2.0,
            height=4 * side,
            width=4 * side,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **call,
        ).images
    return float(samples.double().var())


@pytest.mark.parametrize(
    ("guidance", "variance", "tolerance"),
    [
        (CFG(3.0), 2.0 ** (1 - 3), 0.02),  # DDIM: not the powered density
        (PCG(3.0), (2 - 2.0 ** (2 - 2 * 3)) / (2 * 3 - 1), 0.04),  # equals CFG with DDPM at w = 3
        (PCG(2.0), (2 - 2.0 ** (2 - 2 * 2)) / (2 * 2 - 1), 0.04),
        (PCG(2.0, corrections=5), 0.513, 0.03),  # towards power q = 3, whose variance is 1/2
        (PCG(1.0), 1.0, 0.03),  # power 1: the conditional distribution itself
    ],
    ids=lambda value: repr(value),
)
def test_pcg_samples_the_variance_of_the_exact_gaussian(guidance, variance, tolerance):
    """p(x) = N(0, 2), p(x|c) = N(0, 1): the final variance of each sampler is known."""
    assert final_variance(guidance) == pytest.approx(variance, rel=tolerance)


# --- all of them ---------------------------------------------------------------------------------

OPTIONS = [
    (CFGZeroStar, dict(zero_init=[None, 0, 2], optimize=[True, False])),
    (RescaledCFG, dict(phi=[0.0, 1.0], space=["v", "output"])),
    (DynamicThresholding, dict(quantile=[0.0, 1.0], data_range=[1.0, 4.0], ceiling=[None, 1.0])),
    (BetaCFG, dict(a=[1.0, 3.0], gamma=[0.0, 2.0], radius=[None, 0.0], base=["uncond", "cond"])),
    (MAMBOG, dict(damping=[0.0, 20.0])),
    (
        AdaptiveGuidance,
        dict(
            threshold=[-1.0, 0.999],
            space=["x0", "v", "eps"],
            minimum_steps=[1, 3],
            crossing=["guided", "cond"],
        ),
    ),
    (RectifiedCFGPlusPlus, dict(predictor_fraction=[0.0, 1.0], gamma=[0.0, 2.0], noise=[0.0, 0.1])),
    (PCG, dict(corrections=[0, 2], step_cap=[0.0, 4.0])),
]
PAIRS = [
    pytest.param(cls, dict(zip(names, values, strict=True)), id=f"{cls.name} {names} {values}")
    for cls, options in OPTIONS
    for names in itertools.combinations(options, min(2, len(options)))
    for values in itertools.product(*(options[name] for name in names))
]


@pytest.mark.parametrize(("cls", "options"), PAIRS)
def test_every_pair_of_options_is_finite_and_deterministic(sd3, cls, options):
    runs = [run_sd3(sd3, cls(scale=6.0, **options), count=2, steps=3) for _ in range(2)]
    assert torch.isfinite(runs[0]).all()
    torch.testing.assert_close(*runs, atol=0, rtol=0)


@pytest.mark.parametrize("guidance", [TCFG(4.0), CFGZeroStar(4.0), AdaptiveGuidance(4.0, 0.9995)])
def test_they_add_up_with_others(sd3, guidance):
    once = guidance + CFG(1.0)
    torch.testing.assert_close(
        run_sd3(sd3, once, steps=12), run_sd3(sd3, guidance, steps=12), atol=1e-4, rtol=1e-4
    )
