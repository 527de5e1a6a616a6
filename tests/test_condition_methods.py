"""ICG, TSG, CADS, NLG, autoguidance, internal guidance and Perp-Neg, against loops by hand."""

from __future__ import annotations

import copy
import functools
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from steps import make_step, random_triple
from tiny import TEXT_WIDTH, latents_of, sd3_prompt, tiny_sd, tiny_sd3, tiny_sdxl

from guidancekit import (
    APG,
    CADS,
    CFG,
    ICG,
    NLG,
    TSG,
    AutoGuidance,
    Guidance,
    GuidanceError,
    InternalGuidance,
    InternalHead,
    Interval,
    Linear,
    PerpNeg,
    Prediction,
)
from guidancekit.guidance import State
from guidancekit.step import Level
from guidancekit.tensors import Noise

STEPS = 3
shared_sd, shared_sdxl = functools.cache(tiny_sd), functools.cache(tiny_sdxl)
MAKERS = [pytest.param(shared_sd, id="sd"), pytest.param(shared_sdxl, id="sdxl")]
CLOSE = dict(atol=1e-4, rtol=1e-4)


call = partial(latents_of, steps=STEPS)


def guided(pipe, guidance, guidance_scale=5.0, **options):
    with guidance.attach(pipe):
        return call(pipe, guidance_scale, **options)


def rows(pipe, guidance, guidance_scale=5.0, **options):
    with guidance.attach(pipe):
        call(pipe, guidance_scale, **options)
        return guidance.report().rows_per_step


def modules_state(pipe):
    return [list(vars(module)) for module in pipe.unet.modules()]


@pytest.fixture
def sd():
    """One pipeline for many tests: whatever they attach must come off without a trace."""
    return shared_sd()


@pytest.fixture
def watched(monkeypatch):
    """A function that lists the (x, t, text, pooled text) of every evaluation of a network."""

    def watch(pipe):
        seen, forward = [], pipe.unet.forward

        def spy(sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **kwargs):
            pooled = (added_cond_kwargs or {}).get("text_embeds")
            seen.append((sample, timestep, encoder_hidden_states, pooled))
            return forward(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
                **kwargs,
            )

        monkeypatch.setattr(pipe.unet, "forward", spy)
        return seen

    return watch


class Loop:
    """A sampling loop of our own around a pipeline's network and scheduler."""

    def __init__(self, pipe, negative="", prompt="a red star"):
        self.pipe, self.unet = pipe, pipe.unet
        encoded = pipe.encode_prompt(
            prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative or None,
        )
        self.text = {"cond": encoded[0], "uncond": encoded[1]}
        self.pooled = dict(zip(("cond", "uncond"), encoded[2:], strict=False))
        self.x = self.t = self.index = None

    @torch.no_grad()
    def __call__(self, branch="cond", text=None, pooled=None, x=None, unet=None):
        """The network's prediction."""
        added = None
        if self.pooled:
            sizes = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])
            pooled = self.pooled[branch] if pooled is None else pooled
            added = {"text_embeds": pooled, "time_ids": sizes}
        return (unet or self.unet)(
            self.x if x is None else x,
            self.t,
            self.text[branch] if text is None else text,
            added_cond_kwargs=added,
        ).sample

    def cfg(self, w, **changes):
        cond, uncond = self("cond", **changes), self("uncond", **changes)
        return uncond + w * (cond - uncond)

    def noise(self):
        """The initial latents; the scheduler is at its first step."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(STEPS)
        self.t = scheduler.timesteps[0]
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return noise * scheduler.init_noise_sigma

    def run(self, rule, start=None):
        """Latents after all steps of `rule()`, from noise or `start`, in the network's scale."""
        scheduler = self.pipe.scheduler
        latents = self.noise()
        if start is not None:
            latents = start / scheduler.scale_model_input(torch.ones(()), self.t)
            scheduler.set_timesteps(STEPS)
        for self.index, self.t in enumerate(scheduler.timesteps):
            self.x = scheduler.scale_model_input(latents, self.t)
            latents = scheduler.step(rule(), self.t, latents).prev_sample
        return latents


# --- what all of them owe ------------------------------------------------------------------------


def a_head(block="mid_block", width=16, patch=2, seed=0):
    """A head with random weights in place of trained ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = InternalHead(block, width, 4, patch).eval()
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return head


def weak_unet(make):
    return make(seed=1).unet


NEUTRAL = {
    "icg": (lambda make: ICG(1.0), 1.0),
    "tsg": (lambda make: TSG(1.0), 1.0),
    "tsg, no noise": (lambda make: TSG(4.0, strength=0.0), 1.0),
    "tsg, window": (lambda make: TSG(4.0, low=999.5, high=999.9), 1.0),
    "autoguidance": (lambda make: AutoGuidance(1.0, weak_unet(make)), 1.0),
    "internal": (lambda make: InternalGuidance(1.0, cfg=1.0), 1.0),
    "internal, cfg": (lambda make: InternalGuidance(1.0), 6.0),
    "perp-neg": (lambda make: PerpNeg(), 6.0),
    "nlg": (lambda make: NLG(refinements=0), 6.0),
}


@pytest.mark.filterwarnings("ignore:.*guides none")
@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("make", MAKERS)
def test_neutral_settings_are_the_plain_pipeline_to_the_last_bit(make, name):
    guidance, scale = NEUTRAL[name]
    guidance, pipe = guidance(make), make()
    plain = call(pipe, scale)
    with guidance.attach(pipe):
        assert torch.equal(call(pipe, scale), plain)
        assert guidance.report().rows_per_step == [1 if scale == 1 else 2] * STEPS


ACTIVE = {
    "icg": (lambda make: ICG(3.0), [2] * STEPS),
    "tsg": (lambda make: TSG(low=0.0), [2] * STEPS),
    "autoguidance": (lambda make: AutoGuidance(2.0, weak_unet(make)), [2] * STEPS),
    "internal": (lambda make: InternalGuidance(1.5, a_head()), [2] * STEPS),
    "internal alone": (lambda make: InternalGuidance(1.5, a_head(), cfg=1.0), [1] * STEPS),
    "perp-neg": (lambda make: PerpNeg(["blue", "a ring"]), [4] * STEPS),
    "cads": (lambda make: CADS(), [2] * STEPS),
    "nlg": (lambda make: NLG(refinements=3), [8, 2, 2]),
}


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("make", MAKERS)
def test_cost_change_repeatability_and_nothing_left_behind(make, name):
    guidance, expected = ACTIVE[name]
    guidance, pipe = guidance(make), make()
    plain, before = call(pipe), modules_state(pipe)
    with guidance.attach(pipe):
        first, second = call(pipe), call(pipe)
        assert guidance.report().rows_per_step == expected
        assert guidance.report().active_steps == list(range(STEPS))
    assert torch.equal(first, second), "random draws start afresh in every run"
    assert torch.isfinite(first).all() and not torch.allclose(first, plain, atol=1e-4)
    assert modules_state(pipe) == before
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("name", ACTIVE)
def test_nothing_is_left_behind_after_an_exception(sd, name):
    guidance = ACTIVE[name][0](shared_sd)
    plain, before = call(sd), modules_state(sd)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")

    handle = sd.unet.up_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        guided(sd, guidance)
    handle.remove()
    assert modules_state(sd) == before
    assert torch.equal(call(sd), plain)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    """Sample i of a batch with seed s is the only sample of a batch with seed s + i."""
    pipe, guidance = shared_sdxl(), ACTIVE[name][0](shared_sdxl)
    prompts = ["a red star", "a blue ring"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    together = guided(pipe, guidance, prompt=prompts, latents=noise)
    for row, prompt in enumerate(prompts):
        again = copy.deepcopy(guidance)
        if hasattr(again, "seed"):
            again.seed += row
        alone = guided(pipe, again, prompt=prompt, latents=noise[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@functools.cache
def half_sd(dtype):
    return tiny_sd().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVE)
def test_half_precision_pipelines(name, dtype):
    guidance = copy.deepcopy(ACTIVE[name][0](shared_sd))
    if name == "autoguidance":
        guidance.network.to(dtype)
    latents = guided(half_sd(dtype), guidance, num_inference_steps=2)
    assert latents.dtype == dtype and torch.isfinite(latents).all()


@pytest.mark.parametrize("guidance", [ICG(3.0), TSG(low=0.0), CADS()], ids=["icg", "tsg", "cads"])
def test_draws_are_made_once_per_solver_step(guidance, monkeypatch):
    """Heun evaluates twice per step, with the same random numbers."""
    pipe, draws = tiny_sd(), []
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    original = Noise.__call__
    monkeypatch.setattr(Noise, "__call__", lambda self, y: draws.append(1) or original(self, y))
    with guidance.attach(pipe):
        assert torch.isfinite(call(pipe)).all()
        steps = len(guidance.report().steps)
    assert 0 < len(draws) <= steps


@pytest.mark.parametrize("guidance", [ICG, TSG, CADS, functools.partial(NLG, refinements=2)])
def test_other_seeds_are_other_pictures(sd, guidance):
    first, second = (guided(sd, guidance(seed=seed), num_inference_steps=2) for seed in (0, 7))
    assert not torch.allclose(first, second, atol=1e-4)


def test_own_numbers_are_not_those_of_the_pipelines_generator():
    like = torch.zeros(2, 4, 8, 8)
    theirs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = [Noise(0, purpose)(like) for purpose in ("icg", "cads", "nlg")]
    draws = [theirs.flatten(), *(each[row].flatten() for each in draws for row in (0, 1))]
    cosines = torch.corrcoef(torch.stack(draws)) - torch.eye(7)
    assert cosines.abs().max() < 0.25
    assert torch.equal(Noise(3, "icg")(like)[1], Noise(4, "icg")(like)[0])


# --- ICG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_icg_equals_a_loop_with_its_draws(make, watched):
    pipe = make()
    seen = watched(pipe)
    result = guided(pipe, ICG(3.0), guidance_scale=1.0)  # there is no unconditional pass
    clean, random = seen[0::2], seen[1::2]
    assert len(clean) == len(random) == STEPS
    for (x, t, text, pooled), (x2, t2, text2, pooled2) in zip(clean, random, strict=True):
        assert torch.equal(x, x2) and t == t2
        assert torch.equal(text, clean[0][2])
        assert text2.std() == pytest.approx(float(text.std()), rel=0.2)
        assert abs(text2.mean()) < 0.2 * text.std()
        if pooled is not None:
            assert torch.equal(pooled, clean[0][3]) and not torch.allclose(pooled, pooled2)
    for i in range(1, STEPS):
        assert not torch.allclose(random[i][2], random[0][2], atol=0.1), "a new draw every step"

    loop = Loop(pipe)

    def rule():
        weak = loop(text=random[loop.index][2], pooled=random[loop.index][3])
        return weak + 3.0 * (loop() - weak)

    torch.testing.assert_close(result, loop.run(rule), **CLOSE)


@pytest.mark.parametrize("make", MAKERS)
def test_icg_with_one_text_is_cfg_with_that_negative_prompt(make):
    pipe = make()
    result = guided(pipe, ICG(6.0, texts=["a blue ring"]), guidance_scale=1.0)
    plain = call(pipe, 6.0, negative_prompt="a blue ring")
    torch.testing.assert_close(result, plain, **CLOSE)


def test_icg_draws_texts_per_sample_and_step(sd, watched):
    seen = watched(sd)
    texts = ["a blue ring", "a green heart", "small moon"]
    guided(sd, ICG(6.0, texts=texts), guidance_scale=1.0, num_images_per_prompt=6)
    drawn = {tuple(text[:, 2, 0].round(decimals=4).tolist()) for _, _, text, _ in seen[1::2]}
    assert len(drawn) > 1
    assert all(1 < len(set(rows)) <= 3 for rows in drawn)


def labelled_step(given, seen):
    step = make_step(*random_triple(2, 4, 8, 8))
    evaluate = step.evaluate
    step.conditions = lambda branch: given
    step.evaluate = lambda branch, conditions: seen.append(conditions) or evaluate(branch)
    return step


def test_icg_draws_class_labels():
    seen, state = [], State()
    for _ in range(300):
        step = labelled_step({"class_labels": torch.tensor([3, 7])}, seen)
        ICG(2.0, classes=10).guide(step, state)
    drawn = torch.stack([conditions["class_labels"] for conditions in seen])
    assert drawn.dtype == torch.int64 and drawn.shape == (300, 2)
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert len(counts) == 10 and counts.min() > 30
    assert (drawn[:, 0] == drawn[:, 1]).float().mean() < 0.2, "each sample draws for itself"


def test_icg_leaves_whole_numbers_alone_when_there_is_text():
    """Upscalers pass their noise level as class labels."""
    seen, given = [], {"class_labels": torch.tensor([20, 20]), "text_embeds": torch.ones(2, 8)}
    ICG(2.0).guide(labelled_step(given, seen), State())
    assert set(seen[0]) == {"text_embeds"}
    assert torch.equal(seen[0]["text_embeds"], torch.zeros(2, 8)), "noise in units of its deviation"


@pytest.mark.parametrize(
    ("guidance", "given"),
    [
        (ICG(2.0), {"class_labels": torch.tensor([1, 2])}),
        (ICG(2.0, classes=10), {"text_embeds": torch.ones(2, 8)}),
        (ICG(2.0), {}),
    ],
)
def test_icg_says_what_to_change(guidance, given):
    with pytest.raises(GuidanceError, match=r"classes=\.\.\."):
        guidance.guide(labelled_step(given, []), State())


def test_icg_under_a_schedule_guides_and_does_not_warn(sd):
    with ICG(Linear(4.0)).attach(sd) as guidance:
        call(sd)
        assert guidance.report().rows_per_step == [1, 2, 2]  # w = 1 at first
        assert guidance.report().warnings == []


# --- TSG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_tsg_equals_a_loop_with_its_embeddings(make):
    pipe, outputs = copy.deepcopy(make()), {"time_embedding": [], "add_embedding": []}
    for name, kept in outputs.items():
        if getattr(pipe.unet, name, None) is not None:
            getattr(pipe.unet, name).register_forward_hook(lambda m, a, e, k=kept: k.append(e))
    result = guided(pipe, TSG(4.0, low=0.0, strength=1.0, power=0.5))
    clean, noisy = outputs["time_embedding"][0::2], outputs["time_embedding"][1::2]
    assert len(clean) == len(noisy) == STEPS
    times = pipe.scheduler.timesteps.tolist()
    draws = [
        (b - a) / (a.std() * math.sqrt(t / 1000))
        for a, b, t in zip(clean, noisy, times, strict=True)
        if t > 0
    ]
    draws = torch.cat(draws)
    assert draws.std() == pytest.approx(1, abs=0.25) and abs(draws.mean()) < 0.3
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.6, "a new draw every step"
    sizes = outputs["add_embedding"]
    assert all(torch.equal(each, sizes[0]) for each in sizes), "sizes are not times"

    loop = Loop(pipe)

    def rule():
        strong = loop()
        handle = pipe.unet.time_embedding.register_forward_hook(lambda *_: noisy[loop.index])
        weak = loop()
        handle.remove()
        return weak + 4.0 * (strong - weak)

    torch.testing.assert_close(result, loop.run(rule), **CLOSE)


def test_tsg_noise_at_the_first_timestep():
    """tau is t/1000: at t = 1000, S = 2 and power 1 the noise is 2 standard deviations."""
    e, found = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), []
    for time, expected in ((1000.0, 2.0), (250.0, 0.5)):
        step = make_step(*random_triple(3, 4, 8, 8))
        step.time = time

        def around(matches, wrapper, what):
            found.append((wrapper(lambda: e) - e) / e.std(dim=1, keepdim=True))
            return pytest.MonkeyPatch.context()

        step.around = around
        TSG(3.0, low=0.0, strength=2.0, power=1.0).guide(step, State())
        torch.testing.assert_close(found[-1], expected * Noise(0, "tsg")(e))


def test_tsg_window(sd):
    assert rows(sd, TSG(low=300, high=700), num_inference_steps=10) == [1] * 3 + [2] * 4 + [1] * 3
    times = sd.scheduler.timesteps.tolist()
    assert [300 <= t <= 700 for t in times] == [False] * 3 + [True] * 4 + [False] * 3
    with pytest.warns(UserWarning, match="none of the 3 steps"):
        guided(sd, TSG(low=990, high=1000))


def test_tsg_on_a_transformer():
    pipe = tiny_sd3()
    options = dict(sd3_prompt(), prompt=None, height=32, width=32)
    plain = call(pipe, 1.0, **options)
    with TSG(low=0.0).attach(pipe) as guidance:
        result = call(pipe, 1.0, **options)
        assert guidance.report().rows_per_step == [2] * STEPS
    assert torch.isfinite(result).all() and not torch.allclose(result, plain, atol=1e-5)


def test_tsg_without_a_time_embedding():
    from mixture import mixture_pipe, sample

    pipe = mixture_pipe([(1.0, 0.0, 0.0, 0.0)])
    with TSG(low=0.0).attach(pipe), pytest.raises(GuidanceError, match="no time embedding"):
        sample(pipe, 0, 1, steps=4)


# --- CADS ----------------------------------------------------------------------------------------


def test_cads_anneals_from_noise_to_clean():
    cads = CADS(tau1=0.5, tau2=0.9)
    g = [cads.clean(make_step(*random_triple(1, 4, 8, 8), index=i, total=11)) for i in range(11)]
    expected = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]  # tau falls from 1 by 0.1
    assert g == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_cads_noises_by_its_formula(rescale):
    """Sample by sample in NumPy, halfway between noise and the clean condition."""
    y = 3 + 2 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2))
    step = make_step(*random_triple(2, 4, 8, 8), index=3, total=11)  # tau 0.7 of 0.5 to 0.9
    cads = CADS(tau1=0.5, tau2=0.9, noise=0.25, rescale=rescale, seed=4)
    found = cads.condition(step, "cond", {"text": y}, State())["text"]
    for row, n in enumerate(Noise(4, "cads")(y).numpy()):
        clean = y[row].numpy()
        noised = np.sqrt(0.5) * clean + 0.25 * np.sqrt(0.5) * n
        restored = (noised - noised.mean()) / noised.std() * clean.std() + clean.mean()
        expected = rescale * restored + (1 - rescale) * noised
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_cads_equals_cfg_under_its_conditions(make, watched):
    pipe = make()
    seen = watched(pipe)
    result = guided(pipe, CADS(), 6.0)
    (_, _, text, pooled), loop = seen[-1], Loop(pipe)
    uncond, clean = text
    distances = []
    for _, _, text, _ in seen:
        assert torch.equal(text[0], uncond), "only the condition is noised"
        torch.testing.assert_close(text[1].mean(), clean.mean(), **CLOSE)
        torch.testing.assert_close(text[1].std(), clean.std(), **CLOSE)
        distances.append(float((text[1] - clean).norm()))
    assert distances == sorted(distances, reverse=True) and distances[0] > 0.5 * clean.norm()
    assert torch.equal(clean, loop.text["cond"][0]), "clean at the end"
    if pooled is not None:
        assert not torch.allclose(seen[0][3][1], pooled[1], atol=0.1)

    def rule():
        _, _, text, pooled = seen[loop.index]
        cond = loop(text=text[1:], pooled=None if pooled is None else pooled[1:])
        return loop("uncond") + 6.0 * (cond - loop("uncond"))

    torch.testing.assert_close(result, loop.run(rule), **CLOSE)


def test_cads_first_condition_says_nothing_of_the_prompt(watched):
    texts = []
    for prompt in ("a red star", "a blue ring"):
        pipe = tiny_sd()
        seen = watched(pipe)
        guided(pipe, CADS(), prompt=prompt)
        first = seen[0][2][1]
        texts.append((first - first.mean()) / first.std())
    torch.testing.assert_close(texts[0], texts[1], atol=1e-4, rtol=1e-3)


def test_cads_on_both_branches_draws_twice(sd, watched):
    seen = watched(sd)
    guided(sd, CADS(branches="both", rescale=0.0, noise=0.3))
    both = seen[0][2]
    assert both.std() == pytest.approx(0.3, rel=0.15)
    assert abs(torch.corrcoef(both.flatten(1))[0, 1]) < 0.3


def test_cads_without_noise_is_finite(sd):
    assert torch.isfinite(guided(sd, CADS(noise=0.0))).all()


@pytest.mark.parametrize("companion", [CADS(), NLG(refinements=2)], ids=["cads", "nlg"])
def test_companions_leave_the_guiding_to_others(sd, companion):
    alone = type(companion)
    same = alone(scale=3.0, **({} if alone is CADS else {"refinements": 2}))
    assert torch.equal(guided(sd, CFG(3.0) + companion), guided(sd, same))
    assert torch.equal(guided(sd, companion, 3.0), guided(sd, same, 8.0))
    assert torch.equal(
        guided(sd, companion + CFG(1.0)), guided(sd, alone(**{**same.config, "scale": 1.0}))
    )
    projected = guided(sd, APG(9.0) + companion)
    assert not torch.allclose(projected, guided(sd, APG(9.0)), atol=1e-4)


def test_two_companions_guide_once(sd):
    both = guided(sd, CADS() + NLG(refinements=1), 3.0)
    assert torch.equal(both, guided(sd, CADS() + NLG(refinements=1) + CFG(3.0), 8.0))


def test_cads_with_icg_needs_no_unconditional_pass(sd):
    assert rows(sd, ICG(1.4) + CADS.preset("dit"), guidance_scale=1.0) == [2] * STEPS


def test_cads_refuses_what_has_no_embedding():
    step = make_step(*random_triple(1, 4, 8, 8), index=0)
    cads, state = CADS(), State()
    labels = {"class_labels": torch.tensor([1])}
    assert cads.condition(step, "cond", labels, state) == labels
    with pytest.raises(GuidanceError, match="text embeddings"):
        cads.before_step(step, state)


# --- NLG -----------------------------------------------------------------------------------------


def refined(loop, moves, noise=0.0, clip=0.5, g=None):
    """The initial noise after `moves` moves, by hand."""
    z, draw = loop.noise(), Noise(0, "nlg")
    z = loop.pipe.scheduler.scale_model_input(z, loop.t)
    for _ in range(moves):
        d = loop("cond", x=z) - loop("uncond", x=z) if g is None else g(z)
        d = d * min(1.0, clip / float(d.norm()))
        z = z - d + math.sqrt(noise) * draw(z)
        z = z / z.norm() * 16  # 4 * 8 * 8 = 16^2 elements
    return z


@pytest.mark.parametrize(("make", "noise"), [(shared_sd, 0.0), (shared_sdxl, 0.001)])
def test_nlg_equals_a_loop_from_noise_refined_by_hand(make, noise):
    pipe = make()
    loop = Loop(pipe)
    start = refined(loop, 3, noise)
    expected = loop.run(lambda: loop.cfg(6.0), start)
    # Euler's first latents are sqrt(1 + sigma^2) times what the network sees.
    result = guided(pipe, NLG(6.0, refinements=3, noise=noise))
    torch.testing.assert_close(result, expected, atol=5e-4, rtol=1e-3)


def test_nlg_with_velocity_prediction():
    pipe = tiny_sd()
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    loop = Loop(pipe)
    alpha = None

    def g(z):
        alpha = pipe.scheduler.alphas_cumprod[loop.t].sqrt()
        return alpha * (loop("cond", x=z) - loop("uncond", x=z))

    start = refined(loop, 4, clip=0.01, g=g)
    assert alpha is None
    result = guided(pipe, NLG(6.0, refinements=4, noise=0.0, clip=0.01))
    torch.testing.assert_close(result, loop.run(lambda: loop.cfg(6.0), start), **CLOSE)


def test_nlg_on_flow_moves_along_the_clean_predictions():
    step = make_step(*random_triple(2, 4, 8, 8), "flow", nsr=1e6, index=0)
    step.x = step.x * 16 / step.x.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    cond, uncond = step.cond.x0, step.uncond.x0
    z = NLG(refinements=1, noise=0.0, clip=0.0).before_step(step, State())
    moved = step.x + (cond - uncond)
    moved = moved * 16 / moved.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    torch.testing.assert_close(z, moved, atol=1e-3, rtol=1e-3)


def test_nlg_stays_on_the_shell_and_caps_its_moves(sd, watched):
    seen = watched(sd)
    guided(sd, NLG(refinements=6, noise=0.0, clip=0.2))
    zs = [x for x, *_ in seen[: 2 * 6 : 2]] + [seen[12][0][:1]]
    for before, after in pairwise(zs[1:]):
        assert after.norm() == pytest.approx(16, rel=1e-5)
        assert (after - before).norm() <= 0.2 * 1.02
    assert not torch.allclose(zs[0], zs[-1], atol=1e-3)


def test_nlg_raises_the_probability_of_the_condition():
    """Two modes at -1 and 1: the noise moves to the side of the one that is asked for."""
    from mixture import mixture_pipe, sample

    pipe, start = mixture_pipe([(-1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)]), {}

    class Looking(NLG):
        def before_step(self, step, state):
            z = super().before_step(step, state)
            start.setdefault("moves", (z - step.x)[:, 0].mean())
            return z

    with Looking(refinements=10, noise=0.0, step_size=100.0).attach(pipe):
        sample(pipe, 1, 8, steps=10)
    assert start["moves"] > 0.01


def test_nlg_refuses_a_start_from_an_image(sd):
    other = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    image = Image.new("RGB", (32, 32), "red")
    with pytest.raises(GuidanceError, match="starts from an image"):
        guided(other, NLG(), image=image, strength=0.3, num_inference_steps=10)


def test_nlg_needs_the_unconditional_pass_even_at_scale_one(sd):
    with pytest.raises(GuidanceError, match="guidance_scale above 1"):
        guided(sd, NLG(1.0), guidance_scale=1.0)
    assert rows(sd, NLG(1.0, refinements=2)) == [5, 1, 1]


# --- autoguidance --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_autoguidance_equals_a_loop_with_two_networks(make):
    pipe, weak = make(), weak_unet(make)
    loop = Loop(pipe)

    def rule():
        early = loop(unet=weak)
        return early + 2.5 * (loop() - early)

    result = guided(pipe, AutoGuidance(2.5, weak), guidance_scale=1.0)
    torch.testing.assert_close(result, loop.run(rule), **CLOSE)


def test_autoguidance_with_cfg_is_equation_6(sd):
    weak = weak_unet(shared_sd)
    loop = Loop(sd)

    def rule():
        main, uncond, early = loop(), loop("uncond"), loop(unet=weak)
        return main + 2.0 * (main - uncond) + 1.5 * (main - early)

    result = guided(sd, CFG(3.0) + AutoGuidance(2.5, weak))
    torch.testing.assert_close(result, loop.run(rule), **CLOSE)


@pytest.mark.parametrize("w", [0.0, 2.0, 30.0])
def test_autoguidance_away_from_a_copy_changes_nothing(sd, w):
    result = guided(sd, AutoGuidance(w, copy.deepcopy(sd.unet)), guidance_scale=1.0)
    torch.testing.assert_close(result, call(sd, 1.0), **CLOSE)


@pytest.mark.parametrize("part", ["", "unet"])
def test_autoguidance_from_a_folder(sd, tmp_path, part):
    weak = tiny_sd(seed=1)
    weak.save_pretrained(tmp_path / "weak")
    guidance = AutoGuidance(2.0, str(tmp_path / "weak" / part))
    result = guided(sd, guidance)
    assert torch.equal(result, guided(sd, AutoGuidance(2.0, weak.unet)))
    guidance.save_config(tmp_path)
    again = Guidance.from_config(AutoGuidance.load_config(tmp_path))
    assert again == guidance and torch.equal(guided(sd, again), result)
    assert not hasattr(copy.deepcopy(guidance), "_loaded"), "copies carry settings only"
    half = guided(half_sd(torch.float16), guidance)
    assert half.dtype == torch.float16 and torch.isfinite(half).all()


def test_autoguidance_with_a_weaker_network_of_another_kind(sd):
    """The same prediction, said as a velocity."""
    weak = weak_unet(shared_sd)

    class Velocity(torch.nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states, **_):
            eps = weak(sample, timestep, encoder_hidden_states).sample
            squared = float(sd.scheduler.alphas_cumprod[timestep])
            level = Level(math.sqrt(squared), math.sqrt(1 - squared))
            return (Prediction(eps, sample, level, "epsilon").v,)

    same = guided(sd, AutoGuidance(2.0, Velocity(), prediction="v_prediction"))
    torch.testing.assert_close(same, guided(sd, AutoGuidance(2.0, weak)), atol=1e-3, rtol=1e-3)


def test_autoguidance_says_what_is_wrong(sd, tmp_path):
    with pytest.raises(GuidanceError, match="needs a weaker network"):
        guided(sd, AutoGuidance(2.0))
    with pytest.raises(GuidanceError, match="itself guided"):
        guided(sd, AutoGuidance(2.0, sd.unet))
    with pytest.raises(GuidanceError, match="no denoiser in that folder"):
        guided(sd, AutoGuidance(2.0, str(tmp_path)))
    with pytest.raises(GuidanceError, match="cannot be called"):
        guided(sd, AutoGuidance(2.0, weak_unet(shared_sdxl)))
    with pytest.raises(GuidanceError, match="a module or a folder"):
        AutoGuidance(2.0, 3)
    with pytest.raises(GuidanceError, match="folder's name"):
        AutoGuidance(2.0, sd.unet).save_config(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Nothing"}')
    with pytest.raises(GuidanceError, match="AutoGuidance"):
        guided(sd, AutoGuidance(2.0, str(tmp_path)))

    class Small(torch.nn.Module):
        def forward(self, sample, *args, **kwargs):
            return (sample[:, :, ::2],)

    with pytest.raises(GuidanceError, match=r"put out \[1, 4, 4, 8\]"):
        guided(sd, AutoGuidance(2.0, Small()))
    assert len(repr(AutoGuidance(2.0, sd.unet))) < 160


# --- internal guidance ---------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("make", MAKERS)
def test_internal_equals_a_loop_with_the_same_head(make, cfg):
    """Away from the head in each branch, then between the branches."""
    pipe, head, hidden = make(), a_head(), []
    result = guided(pipe, InternalGuidance(1.9, head, cfg=cfg))
    handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, h: hidden.append(h))
    loop = Loop(pipe)

    @torch.no_grad()
    def away(branch):
        final = loop(branch)
        early = head(hidden[-1], loop.t, (8, 8))
        return early + 1.9 * (final - early)

    def rule():
        return away("uncond") + cfg * (away("cond") - away("uncond"))

    expected = loop.run(rule)
    handle.remove()
    torch.testing.assert_close(result, expected, **CLOSE)


def test_internal_scale_and_cfg_have_their_own_intervals(sd):
    with InternalGuidance(
        Interval(1.5, low=2.0, high=100.0), a_head(), cfg=Interval(4.0, low=0.0, high=2.0)
    ).attach(sd) as guidance:
        call(sd)
        nsr = [step.nsr for step in guidance.report().steps]
        assert guidance.report().rows_per_step == [1 if level > 2.005 else 2 for level in nsr]


def test_internal_head_on_joint_blocks():
    pipe, options = tiny_sd3(), dict(sd3_prompt(), prompt=None, height=32, width=32)
    plain = call(pipe, 4.0, **options)
    with InternalGuidance(1.5, a_head("transformer_blocks.0", 16, 2)).attach(pipe) as guidance:
        result = call(pipe, 4.0, **options)
        assert guidance.report().rows_per_step == [2] * STEPS
    assert torch.isfinite(result).all() and not torch.allclose(result, plain, atol=1e-5)


def test_internal_head_arranges_its_patches():
    """One hidden cell makes a square of latent cells; tokens and images are read alike."""
    head = InternalHead("mid_block", 12, 3, patch=2)
    with torch.no_grad():
        head.out.bias.copy_(torch.arange(12.0))
    out = head(torch.zeros(2, 12, 4, 3), torch.tensor(5), (8, 6))
    assert out.shape == (2, 3, 8, 6)
    assert out[0, 1, 2:4, 4:6].tolist() == [[4, 5], [6, 7]]
    assert torch.equal(out, head(torch.zeros(2, 12, 12), torch.tensor(5), (8, 6)))


def test_internal_head_starts_from_zero_and_learns(sd):
    head = InternalHead("mid_block", 16, 4, 2)
    x, t, text = torch.randn(8, 4, 8, 8), torch.arange(8) * 120, torch.randn(8, 16, TEXT_WIDTH)
    assert torch.equal(head(torch.randn(8, 16, 4, 4), t, (8, 8)), torch.zeros(8, 4, 8, 8))
    with torch.no_grad(), head.early(sd.unet) as kept:
        target = sd.unet(x, t, text).sample
    assert len(kept) == 1 and not sd.unet.mid_block._forward_hooks
    optimizer, losses = torch.optim.Adam(head.parameters(), 0.03), []
    for _ in range(40):
        loss = torch.nn.functional.mse_loss(head(kept[0], t, (8, 8)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_internal_head_from_a_folder(sd, tmp_path):
    head = a_head()
    head.save_pretrained(tmp_path / "head")
    assert (tmp_path / "head" / "diffusion_pytorch_model.safetensors").is_file()
    guidance = InternalGuidance(1.5, str(tmp_path / "head"))
    result = guided(sd, guidance)
    assert torch.equal(result, guided(sd, InternalGuidance(1.5, head)))
    guidance.save_config(tmp_path)
    assert Guidance.from_config(InternalGuidance.load_config(tmp_path)) == guidance


def test_internal_says_what_is_wrong(sd, tmp_path):
    with pytest.raises(GuidanceError, match="needs a head"):
        guided(sd, InternalGuidance(1.5))
    with pytest.raises(GuidanceError, match="no block 'nowhere'"):
        guided(sd, InternalGuidance(1.5, a_head("nowhere")))
    with pytest.raises(GuidanceError, match="found 16 features, expected 8"):
        guided(sd, InternalGuidance(1.5, a_head(width=8)))
    with pytest.raises(GuidanceError, match=r"\[1, 4, 4, 4\].*expected \[1, 4, 8, 8\]"):
        guided(sd, InternalGuidance(1.5, a_head(patch=1)))
    with pytest.raises(GuidanceError, match="nothing there"):
        guided(sd, InternalGuidance(1.5, str(tmp_path / "nothing there")))
    with pytest.raises(GuidanceError, match="attribute `block`"):
        InternalGuidance(1.5, torch.nn.Identity())
    with pytest.raises(GuidanceError, match="folder's name"):
        (CFG(3.0) + InternalGuidance(1.5, a_head())).save_config(tmp_path)


# --- Perp-Neg ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_perpneg_equals_a_loop_by_hand(make):
    pipe = make()
    negatives = {"blue": 0.5, "a small ring": -1.2}
    encoded = [Loop(pipe, prompt=negative) for negative in negatives]
    loop = Loop(pipe)

    def rule():
        uncond = loop("uncond").double()
        d = loop("cond").double() - uncond
        total = d.clone()
        for other, weight in zip(encoded, negatives.values(), strict=True):
            e = loop(text=other.text["cond"], pooled=other.pooled.get("cond")).double() - uncond
            perpendicular = e - (e * d).sum() / (d * d).sum() * d
            assert abs((perpendicular * d).sum()) < 1e-6
            total -= weight * perpendicular
        return (uncond + 6.0 * total).float()

    result = guided(pipe, PerpNeg(list(negatives), list(negatives.values()), 6.0))
    torch.testing.assert_close(result, loop.run(rule), **CLOSE)


def test_perpneg_update_is_perpendicular_per_sample():
    cond, uncond, x = random_triple(2, 4, 8, 8)
    step = make_step(cond, uncond, x)
    third = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    step.evaluate = lambda branch, conditions: step.predict(x0=third)
    guided_ = PerpNeg(["blue"], scale=4.0).guide(step, State()).x0
    difference = guided_ - step.cfg(4.0).x0
    d = cond - uncond
    cosine = torch.nn.functional.cosine_similarity(difference.flatten(1), d.flatten(1))
    assert cosine.abs().max() < 1e-4
    assert (difference.flatten(1).norm(dim=1) > 1).all()


def test_perpneg_against_the_prompt_itself_is_cfg(sd):
    result = guided(sd, PerpNeg(["a red star"]), 6.0)
    torch.testing.assert_close(result, call(sd, 6.0), **CLOSE)


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_perpneg_at_the_ends_of_the_scale(sd, w):
    assert rows(sd, PerpNeg(["blue"], scale=w)) == [1 if w == 0 else 3] * STEPS


def test_perpneg_takes_one_text():
    assert PerpNeg("blue").negatives == ["blue"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ICG(classes=1), "classes"),
        (lambda: ICG(texts="a star"), "a list of prompts"),
        (lambda: ICG(texts=[3]), "a list of prompts"),
        (lambda: TSG(low=500, high=400), "must not be above"),
        (lambda: TSG(high=2000), "from 0 to 1000"),
        (lambda: CADS(tau1=0.9, tau2=0.5), "must be below"),
        (lambda: CADS(branches="uncond"), "cond"),
        (lambda: CADS(seed=-1), "seed"),
        (lambda: NLG(refinements=-1), "refinements"),
        (lambda: NLG(refinements=2.5), "whole number"),
        (lambda: PerpNeg(["a", "b"], [1.0]), "1 weights for 2"),
        (lambda: PerpNeg([1]), "expected texts"),
        (lambda: PerpNeg(["a"], ["b"]), "weights"),
        (lambda: AutoGuidance(prediction="flow"), "prediction"),
        (lambda: InternalGuidance("much"), "scale"),
    ],
)
def test_bad_input_is_refused_with_a_clear_message(make, message):
    with pytest.raises(GuidanceError, match=message):
        make()
