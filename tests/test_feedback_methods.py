"""Scales chosen by what is seen during the run: feedback, FBG, GFCG and the annealing network."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from mixture import mixture_pipe, sample
from safetensors.torch import save_file
from steps import guide, make_step, random_triple
from tiny import sd3_prompt, tiny_clip, tiny_sd, tiny_sd3

from guidancekit import CFG, FBG, GFCG, AnnealingGuidance, CFGPlusPlus, FeedbackGuidance
from guidancekit.annealing import AnnealingTrainer
from guidancekit.engine.run import decode
from guidancekit.errors import GuidanceError
from guidancekit.guidance import State
from guidancekit.methods.annealing import ScaleNetwork
from guidancekit.scoring import CLIPScore, choose, relative_rise
from guidancekit.step import Prediction

CALL = dict(
    prompt=["a red star", "a blue ring"],
    num_inference_steps=5,
    guidance_scale=4.0,
    height=32,
    width=32,
    output_type="latent",
)


@pytest.fixture(scope="module")
def sd():
    """One pipeline for all: guidance leaves it as it was."""
    return tiny_sd()


def run(pipe, guidance, rows=slice(None), **changes):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))[rows]
    call = {**CALL, "prompt": CALL["prompt"][rows], "latents": noise, **changes}
    with guidance.attach(pipe):
        return pipe(**call).images


def same(x0, noise_fraction, index):
    return torch.full((len(x0),), 0.1)


def mean(x0, noise_fraction, index):
    return x0.flatten(1).mean(1)


def nan_above(limit):
    """The score is the contrast, NaN for samples with more than `limit`."""

    def scorer(x0, noise_fraction, index):
        contrast = x0.flatten(1).std(1)
        return torch.where(contrast > limit, torch.nan, contrast)

    return scorer


# --- online feedback -----------------------------------------------------------------------------


def test_one_candidate_is_plain_cfg_to_the_last_bit(sd):
    assert torch.equal(run(sd, FeedbackGuidance({"mean": mean}, candidates=[3.0])), run(sd, CFG(3)))


def test_a_constant_scorer_gives_the_default_everywhere(sd):
    guidance = FeedbackGuidance({"same": same}, scale=5.0)
    assert torch.equal(run(sd, guidance), run(sd, CFG(5.0)))
    guidance = FeedbackGuidance({"same": same})
    assert torch.equal(run(sd, guidance), run(sd, CFG()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_choices_equal_those_made_by_hand(adaptive):
    """Three steps of two samples and two scorers, in NumPy, sample by sample."""
    candidates, state = [0.5, 2.0, 6.0], State()
    scorers = {"mean": mean, "edge": lambda x, n, i: -(x[..., 0].flatten(1) ** 2).sum(1) * n}
    guidance = FeedbackGuidance(
        scorers, 3.0, candidates, weights=[2.0, 1.0], adaptive=adaptive, high=1.0
    )
    before = {}
    for index in range(3):
        cond, uncond, x = random_triple(2, 4, 6, 6, seed=index)
        step = make_step(cond, uncond, x, index=index)
        guided = guide(guidance, step, state).x0.double().numpy()
        for b in range(2):
            c, u = (t[b].double().numpy() for t in (cond, uncond))
            tried = [u + s * (c - u) for s in candidates]
            raw = np.array(
                [
                    [t.mean() for t in tried],
                    [-(t[..., 0] ** 2).sum() * (1 - index / 3) for t in tried],
                ]
            )
            z = (raw - raw.mean(1, keepdims=True)) / (raw.std(1, keepdims=True) + 1e-6)
            weights = np.array([2.0, 1.0])
            level = raw.mean(1)
            if adaptive and index:
                rise = (level - before[b]) / (np.abs(before[b]) + 1e-6)
                weights = weights * np.maximum(rise, 0)
            before[b] = level
            s = candidates[int((weights[:, None] * z).sum(0).argmax())] if weights.any() else 3.0
            assert state.w[b] == s
            np.testing.assert_allclose(guided[b], u + s * (c - u), atol=1e-4)


def test_ties_go_to_the_nearest_and_nan_is_never_chosen():
    equal = torch.ones(1)
    chosen = lambda scores, default: choose(  # noqa: E731
        torch.tensor(scores).view(1, -1, 1), equal[None], [1.0, 3.0, 7.5, 11.0], default
    ).item()
    nan, inf = math.nan, math.inf
    assert chosen([1.0, 2.0, 2.0, 0.0], 7.0) == 7.5
    assert chosen([1.0, 2.0, 2.0, 0.0], 3.1) == 3.0
    assert chosen([2.0, 2.0, 2.0, 2.0], 5.0) == 5.0
    assert chosen([2.0, nan, 2.0, 2.0], 3.0) == 1.0
    assert chosen([2.0, 1.0, nan, inf], 7.5) == 1.0
    assert chosen([nan, nan, nan, nan], 5.0) == 5.0


def test_nan_in_one_sample_leaves_its_batch_mate_alone():
    guidance = FeedbackGuidance({"contrast": nan_above(1.5)}, scale=3.0, candidates=[3.0, 12.0])
    cond, uncond, x = random_triple(2, 4, 8, 8)
    uncond[1] = cond[1]
    cond[1] *= 1.02  # stays tame at 12; the other sample does not
    state = State()
    guide(guidance, make_step(cond, uncond, x), state)
    assert state.w.tolist() == [3.0, 12.0]


def test_adaptive_weights_are_relative_rises():
    now, before = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[2.0, 2.0, math.nan]])
    assert relative_rise(now, None).tolist() == [[1.0, 1.0, 1.0]]
    torch.testing.assert_close(relative_rise(now, before), torch.tensor([[0.5, 0.0, 0.0]]))


def test_every_and_the_window_say_when_it_scores(sd):
    seen = []

    def scorer(x0, noise_fraction, index):
        seen.append((index, noise_fraction))
        return mean(x0, noise_fraction, index)

    guidance = FeedbackGuidance({"it": scorer}, candidates=[1.0, 8.0], every=2, high=0.9, low=0.3)
    run(sd, guidance)
    assert seen == [(2, 0.5)] * 2  # of steps 0, 2 and 4, once per candidate
    scales = guidance.report().effective_scale
    assert scales[:2] == pytest.approx([4.0, 4.0], rel=1e-4)
    assert scales[2:] == pytest.approx([scales[2]] * 3, rel=1e-4)
    assert guidance.report().rows_per_step == [4] * 5


def test_feedback_is_per_sample_and_deterministic(sd):
    guidance = FeedbackGuidance({"mean": mean, "contrast": nan_above(9.0)}, candidates=[1.0, 9.0])
    together = run(sd, guidance)
    assert torch.equal(together, run(sd, guidance))
    alone = torch.cat([run(sd, guidance, slice(i, i + 1)) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_feedback_finds_the_scale_that_its_scorer_wants():
    """The scorer knows what CFG at 7.5 predicts: that is what the run becomes."""
    step = make_step(*random_triple(2, 4, 8, 8))
    wanted = step.cfg(7.5).x0
    guidance = FeedbackGuidance({"near": lambda x, *_: -((x - wanted) ** 2).flatten(1).sum(1)})
    torch.testing.assert_close(guide(guidance, step).x0, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeedbackGuidance({}), "needs functions"),
        (lambda: FeedbackGuidance({"mean": mean}, every=9, high=0.5), "none of the 5 steps"),
        (lambda: FeedbackGuidance({"bad": lambda x, n, i: 1.0}), "'bad' returned float"),
        (lambda: FeedbackGuidance({"bad": lambda x, n, i: x.mean()}), r"'bad' returned \[\]"),
        (lambda: FeedbackGuidance("clip"), "functions by name"),
        (lambda: FeedbackGuidance({"mean": mean}, candidates=[]), "one candidate"),
        (lambda: FeedbackGuidance({"mean": mean}, candidates=[-1.0]), "at least 0"),
        (lambda: FeedbackGuidance({"mean": mean}, weights=[1.0, 2.0]), "a weight per scorer"),
        (lambda: GFCG(), "needs a classifier"),
        (lambda: GFCG("resnet"), "returns logits"),
        (lambda: GFCG(lambda x: x.mean(), target=0), r"returned \[\], expected logits \[2, K\]"),
        (lambda: GFCG(lambda x: x.flatten(1), target=[0, 1, 2]), "the batch has 2 samples"),
        (lambda: GFCG(lambda x: x[:, :3, 0, 0], target=3), "knows 3 classes"),
        (lambda: GFCG(lambda x: x[:, :3, 0, 0], references=["a"]), "3 classes"),
        (lambda: GFCG(lambda x: x[:, :3, 0, 0]), "not on class labels"),
        (lambda: GFCG(target=[]), "number of a class"),
        (lambda: FBG(pi=0.2), "pi"),
        (lambda: AnnealingGuidance(), "needs a network"),
        (lambda: AnnealingGuidance("missing.safetensors"), "missing.safetensors"),
        (lambda: AnnealingGuidance(alignment=2), "from 0 to 1"),
    ],
)
def test_bad_input_is_refused(make, message, sd):
    with pytest.raises(GuidanceError, match=message):
        run(sd, make())


def test_functions_are_shown_copied_and_not_saved(tmp_path):
    guidance = FeedbackGuidance({"mean": mean, "net": torch.nn.Sequential(torch.nn.Identity())})
    assert "\n" not in repr(guidance) and "'mean': <function mean" in repr(guidance)
    with pytest.raises(GuidanceError, match="a function cannot be saved"):
        guidance.save_config(tmp_path)
    assert pickle.loads(pickle.dumps(FeedbackGuidance({"mean": mean}))) == FeedbackGuidance(
        {"mean": mean}
    )
    assert copy.deepcopy(FBG(pi=0.9)) == FBG(pi=0.9)


# --- decoding, CLIP ------------------------------------------------------------------------------


def test_decode_equals_what_the_pipeline_shows():
    sd = tiny_sd()
    sd.vae.register_to_config(scaling_factor=0.5)
    latents = run(sd, CFG(3.0))
    shown = torch.from_numpy(run(sd, CFG(3.0), output_type="np")).permute(0, 3, 1, 2)
    torch.testing.assert_close(decode(sd, latents), shown, atol=1e-5, rtol=1e-5)
    sd3 = tiny_sd3()
    sd3.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    call = {**sd3_prompt(2), **{k: v for k, v in CALL.items() if k != "prompt"}, "latents": latents}
    final = sd3(**call).images
    shown = torch.from_numpy(sd3(**{**call, "output_type": "np"}).images).permute(0, 3, 1, 2)
    torch.testing.assert_close(decode(sd3, final), shown, atol=1e-5, rtol=1e-5)


def test_scorers_get_images_where_they_ask_for_them(sd):
    seen = []

    def scorer(images, noise_fraction, index):
        seen.append((tuple(images.shape), images.min() >= 0 and images.max() <= 1))
        return mean(images, noise_fraction, index)

    run(sd, FeedbackGuidance({"it": scorer}, candidates=[1.0, 8.0], every=4, decode=True))
    assert seen == [((2, 3, 32, 32), True)] * 2
    with pytest.raises(GuidanceError, match="image autoencoder"):
        decode(object(), torch.zeros(1, 4, 8, 8))


def test_clip_scores_images(sd, tmp_path):
    model, tokenizer = tiny_clip(tmp_path)
    score = CLIPScore(str(tmp_path), CALL["prompt"])
    images = torch.rand(2, 3, 16, 16)
    pixels = (images - images.new_tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]) / (
        images.new_tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    )
    tokens = tokenizer(CALL["prompt"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=pixels,
        ).logits_per_image
        found = score(images)
    expected = logits.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        again = score.about("a large red circle").about(CALL["prompt"])(images)
        assert not torch.equal(score.about("a large red circle")(images), found)
    assert torch.equal(again, found)
    guidance = FeedbackGuidance({"clip": score}, candidates=[1.0, 8.0], every=4, decode=True)
    assert torch.isfinite(run(sd, guidance)).all()
    assert f"CLIPScore({str(tmp_path)!r}" in repr(guidance)
    with pytest.raises(GuidanceError, match="decode=True"):
        score(torch.zeros(1, 4, 8, 8))
    with pytest.raises(GuidanceError, match="cannot load"):
        CLIPScore(str(tmp_path / "nothing"), "a star")(images)


# --- FBG -----------------------------------------------------------------------------------------

LEFT, RIGHT = (-1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)


def fbg_by_hand(pipe, x, steps, generator, pi, t0, t1, maximum, until):
    """The printed loop in EDM coordinates with the official sign, in float64."""
    pipe.scheduler.set_timesteps(steps)
    sigmas = pipe.scheduler.sigmas.double().tolist()
    condition = {mode: pipe.unet.embed(mode, 2) for mode in (1, None)}
    offset = math.log((1 - pi) * 1.5) / ((1 - t0) * steps)
    spread = [(now**2 - after**2) * after**2 / now**2 for now, after in pairwise(sigmas)]
    tau = abs(2 * np.interp((1 - t1) * steps, range(steps), spread) * offset / 10)
    posterior, scales = [0.0, 0.0], []
    x = x.double() * float(pipe.scheduler.init_noise_sigma)
    for i, t in enumerate(pipe.scheduler.timesteps):
        now, after = sigmas[i], sigmas[i + 1]
        fed = (x / math.sqrt(1 + now**2)).float()
        x0_c, x0_u = (
            x - now * pipe.unet(fed, t, condition[mode])[0].double() for mode in (1, None)
        )
        w = [math.exp(value) / (math.exp(value) - (1 - pi)) for value in posterior]
        scales.append(w)
        x0 = x0_u + torch.tensor(w).view(-1, 1, 1, 1) * (x0_c - x0_u)
        r = after**2 / now**2
        noise = torch.randn(x.shape, generator=generator).double()
        moved = r * x + (1 - r) * x0 + math.sqrt(spread[i]) * noise
        for b in range(2):
            if spread[i] > 0:
                to_c = ((moved - r * x - (1 - r) * x0_c)[b] ** 2).sum()
                to_u = ((moved - r * x - (1 - r) * x0_u)[b] ** 2).sum()
                push = offset if 1 - i / steps >= until else 0.0
                value = posterior[b] - tau / (2 * spread[i]) * float(to_c - to_u) + push
                lowest = math.log((1 - pi) * maximum / (maximum - 1))
                posterior[b] = min(max(value, lowest), 3.0)
        x = moved
    return x, scales


def ancestral(means=(LEFT, RIGHT)):
    pipe = mixture_pipe(means)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_fbg_equals_its_loop_on_the_exact_mixture():
    pipe, steps = ancestral(), 12
    settings = dict(pi=0.9, t0=0.6, t1=0.5, maximum=6.0)
    guidance = FBG(**settings, offset_until=0.3)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    with guidance.attach(pipe):
        latents = sample(pipe, 1, 2, steps=steps, latents=noise)
    generator = torch.Generator().manual_seed(0)
    expected, scales = fbg_by_hand(pipe, noise, steps, generator, **settings, until=0.3)
    torch.testing.assert_close(latents.double(), expected, atol=2e-3, rtol=1e-3)
    found = guidance.report().effective_scale
    assert found == pytest.approx([np.mean(w) for w in scales], rel=2e-3)
    assert len({round(w, 3) for w in found}) > 4  # the posterior has moved
    assert guidance.report().rows_per_step == [4] * steps


def updated(guidance, where, state=None):
    """L after a step to `where`, a share of the way from mu_c (0) to mu_u (1)."""
    state = State() if state is None else state
    cond, uncond, x = random_triple(1, 4, 8, 8)
    before = make_step(cond, uncond, x, "sample", index=1, nsr=2.0)
    guide(guidance, before, state)
    if where is None:
        return state.posterior.item(), guide(guidance, before, State())
    r = (before.next_level.nsr / before.level.nsr) ** 2
    clean = (1 - where) * cond + where * uncond
    moved = before.next_level.alpha * (r * x / before.alpha + (1 - r) * clean)
    after = make_step(cond, uncond, moved, "sample", index=2, nsr=before.next_level.nsr)
    guide(guidance, after, state)
    return state.posterior.item(), state


def test_fbg_starts_at_one_over_pi():
    posterior, guided = updated(FBG(pi=0.8), None)
    assert posterior == 0
    step = make_step(*random_triple(1, 4, 8, 8), "sample", nsr=2.0)
    torch.testing.assert_close(guided.x0, step.cfg(1 / 0.8).x0)


def test_fbg_bounds_of_the_scale():
    guidance = FBG(pi=0.85, maximum=7.0)
    lowest, _ = updated(guidance, -1e4)[0], None
    highest, _ = updated(guidance, 1e4)[0], None
    assert highest < lowest == 3.0
    assert guidance.weight(torch.tensor(highest)).item() == pytest.approx(7.0, rel=1e-4)
    assert guidance.weight(torch.tensor(lowest)).item() == pytest.approx(1.0075, rel=1e-3)


def test_fbg_believes_what_fits_the_condition():
    """The printed algorithm has the opposite sign."""
    guidance = FBG(pi=0.85, maximum=1000.0)
    neutral, fits, misfits = (updated(guidance, where)[0] for where in (0.5, 0.0, 1.0))
    assert misfits < neutral < fits
    assert neutral == pytest.approx(guidance.offset(4), abs=1e-3)


def test_fbg_offset_alone_reaches_three_at_t0():
    guidance = FBG(pi=0.85, t0=0.5)
    posterior = torch.tensor(guidance.offset(40) * 20)  # the first half of 40 steps
    assert guidance.weight(posterior).item() == pytest.approx(3.0, rel=1e-5)


def test_fbg_survives_a_level_that_does_not_fall_and_pure_noise():
    guidance, state = FBG(), State()
    triple = random_triple(1, 4, 8, 8)
    step = make_step(*triple, index=0)
    step.grid = (math.inf, *step.grid[1:])
    step.level = replace(step.level, alpha=0.0, sigma=1.0)
    step.kind = "flow"
    for name in ("cond", "uncond"):
        step.evaluated[name] = Prediction(step.evaluated[name].out, step.x, step.level, "flow")
    guide(guidance, step, state)
    for index in (1, 2):  # the second at the same level
        after = make_step(*triple, "flow", index=index)
        after.grid = step.grid
        assert torch.isfinite(guide(guidance, after, state).out).all()
    assert torch.isfinite(state.posterior).all()


def test_fbg_keeps_the_conditional_distribution_better_than_its_largest_scale():
    pipe = mixture_pipe([LEFT, RIGHT])
    off = {}
    for name, guidance in {"fbg": FBG(maximum=9.0), "cfg": CFG(9.0)}.items():
        with guidance.attach(pipe):
            latents = sample(pipe, 1, 48, steps=40)
        off[name] = abs(float(latents[:, 0].mean()) - 1)
        assert (latents[:, 0].mean(dim=(1, 2)) > 0).all()
    assert off["fbg"] < off["cfg"]


# --- GFCG (reconstruction) -----------------------------------------------------------------------

PROMPTS = ["a red star", "a blue ring", "a green heart"]


def logits_of(*values):
    return lambda x: torch.tensor([values] * len(x))


def reference_step(x, cond, references):
    """A step by hand whose network answers class k with `references[k]`."""
    step = make_step(cond, torch.zeros_like(cond), x, "sample", index=3)

    def evaluate(branch, conditions):
        labels = conditions["class_labels"]
        rows = torch.stack([references[int(k)][b] for b, k in enumerate(labels)])
        return Prediction(rows, x, step.level, "sample")

    step.evaluate = evaluate
    step.conditions = lambda branch: {"class_labels": torch.zeros(len(x), dtype=torch.long)}
    return step


def test_gfcg_equals_its_formula():
    cond, _, x = random_triple(2, 4, 4, 4)
    references = [torch.full_like(cond, float(k)) for k in range(3)]
    scores = torch.tensor([[0.3, 1.0, -1.0], [0.5, -2.0, 0.4]])
    guidance = GFCG(lambda x0: scores, target=[1, 0], scale=6.0)
    guided = guide(guidance, reference_step(x, cond, references)).x0
    for b, (wanted, rival) in enumerate([(1, 0), (0, 2)]):
        q = torch.softmax(scores[b].double(), 0)
        w = 1 + 5 * q[rival] / (q[rival] + q[wanted])
        expected = rival + w * (cond[b].double() - rival)
        torch.testing.assert_close(guided[b].double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("logits", "scale"), [((50.0, -50.0, -50.0), 1), ((-50.0, 50.0, 0.0), 6)])
def test_gfcg_scale_goes_from_one_to_the_largest(logits, scale):
    cond, _, x = random_triple(2, 4, 4, 4)
    step = reference_step(x, cond, [torch.full_like(cond, float(k)) for k in range(3)])
    guidance, state = GFCG(logits_of(*logits), scale=6.0), State()
    guided = guide(guidance, step, state)
    assert guidance.effective_scale(step, guided, state).tolist() == pytest.approx([scale] * 2)
    if scale == 1:
        torch.testing.assert_close(guided.x0, cond)


def test_gfcg_costs_one_pass_where_all_are_confident(sd):
    settings = dict(classifier=logits_of(9.0, 0.0, 1.0), references=PROMPTS, scale=5.0, high=0.75)
    guidance = GFCG(**settings)
    run(sd, guidance)
    assert guidance.report().rows_per_step == [4] * 5
    guidance = GFCG(**settings, confident=0.05)
    latents = run(sd, guidance)
    assert guidance.report().rows_per_step == [4, 2, 2, 2, 2]
    assert guidance.report().effective_scale == pytest.approx([5.0, 1, 1, 1, 1])
    assert torch.isfinite(latents).all()


def test_gfcg_with_a_lag_batches_both_passes(sd):
    """With a classifier that always says the same, one step back is no other answer."""
    settings = dict(classifier=logits_of(0.5, 0.0, 0.7), references=PROMPTS, scale=5.0)
    guidance, lagged = GFCG(**settings), GFCG(**settings, lag=True)
    torch.testing.assert_close(run(sd, lagged), run(sd, guidance), atol=1e-4, rtol=1e-4)
    report = lagged.report()
    assert report.rows_per_step == guidance.report().rows_per_step == [4] * 5
    assert [step.calls for step in report.steps] == [1] * 5
    assert [step.calls for step in guidance.report().steps] == [1, 2, 2, 2, 2]
    assert report.effective_scale == pytest.approx(guidance.report().effective_scale, rel=1e-4)


def test_gfcg_away_from_a_prompt_is_cfg_against_that_prompt(sd):
    """Certain of the rival, from the first step: CFG with the rival as the negative prompt."""
    guidance = GFCG(logits_of(-99.0, -99.0, 0.0), references=PROMPTS, scale=4.0, high=1.0)
    expected = run(sd, CFG(4.0), negative_prompt=[PROMPTS[2]] * 2)
    torch.testing.assert_close(run(sd, guidance), expected, atol=1e-4, rtol=1e-4)


# --- the annealing network -----------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A random network in both layouts; (path of .safetensors, path of .pt, its weights)."""
    torch.manual_seed(1)
    weights = {k: 2 * v for k, v in ScaleNetwork().state_dict().items()}
    save_file(weights, tmp_path / "net.safetensors")
    torch.save({"guidance_scale_model": weights, "config": {"seed": 42}}, tmp_path / "net.pt")
    return str(tmp_path / "net.safetensors"), str(tmp_path / "net.pt"), weights


def network_by_hand(weights, t, size, lam):
    """The card's network for one sample, in NumPy and float64."""
    h = np.array(
        [f for v in (t / 1000, size, lam) for f in (v, *(np.cos(k * v) for k in (1, 2, 3)))]
    )
    for layer in (0, 2, 4, 6, 8):
        matrix, bias = (
            weights[f"combined_head.{layer}.{kind}"].double().numpy() for kind in ("weight", "bias")
        )
        h = matrix @ h + bias
        if layer < 8:
            h = np.maximum(h, 0)
    return 1 + h.item()


def test_the_network_has_the_published_size_and_layout(checkpoint):
    network = ScaleNetwork()
    assert sum(parameter.numel() for parameter in network.parameters()) == 51_329
    names = {f"combined_head.{i}.{kind}" for i in (0, 2, 4, 6, 8) for kind in ("weight", "bias")}
    assert set(network.state_dict()) == names
    sizes = torch.tensor([0.3, 2.0]).view(2, 1, 1, 1)
    for file in checkpoint[:2]:
        found = ScaleNetwork.load(file)(701.0, sizes, 0.4)
        expected = [network_by_hand(checkpoint[2], 701, s, 0.4) for s in (0.3, 2.0)]
        assert found.shape == (2, 1, 1, 1)
        assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_annealing_equals_a_loop_by_hand(checkpoint):
    """The published step: denoise with the guided noise, re-noise with the unconditional."""
    pipe = tiny_sd()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, set_alpha_to_one=True)
    guidance = AnnealingGuidance(checkpoint[0], alignment=0.7, divisor=0.2)
    latents = run(pipe, guidance)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(5)
    cond, uncond = pipe.encode_prompt(CALL["prompt"], "cpu", 1, True, [""] * 2)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    chosen = []
    for t in scheduler.timesteps.tolist():
        bar = float(scheduler.alphas_cumprod[t])
        bar_next = float(scheduler.alphas_cumprod[t - 200]) if t >= 200 else 1.0
        with torch.no_grad():
            eps_c, eps_u = (pipe.unet(x, t, text).sample for text in (cond, uncond))
        sizes = (eps_u - eps_c).flatten(1).norm(dim=1).double() / 0.2
        w = [network_by_hand(checkpoint[2], t, float(size), 0.7) for size in sizes]
        chosen.append(w)
        eps = eps_u + torch.tensor(w).float().view(2, 1, 1, 1) * (eps_c - eps_u)
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        x = math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next) * eps_u
    torch.testing.assert_close(latents, x, atol=1e-4, rtol=1e-4)
    assert guidance.report().effective_scale[-1] == pytest.approx(np.mean(chosen[-1]), rel=1e-4)
    assert guidance.report().rows_per_step == [4] * 5
    alone = torch.cat([run(pipe, guidance, slice(i, i + 1)) for i in range(2)])
    torch.testing.assert_close(latents, alone, atol=1e-5, rtol=1e-4)


def test_a_network_that_says_one_is_cfgpp(tmp_path):
    weights = {name: torch.zeros_like(value) for name, value in ScaleNetwork().state_dict().items()}
    save_file(weights, tmp_path / "one.safetensors")
    pipe = tiny_sd()
    found = run(pipe, AnnealingGuidance(str(tmp_path / "one.safetensors")))
    torch.testing.assert_close(found, run(pipe, CFGPlusPlus(1.0)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("content", [{"other": torch.zeros(1)}, {}, [1, 2]])
def test_files_of_another_shape_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(GuidanceError, match="combined_head"):
        ScaleNetwork.load(str(tmp_path / "other.pt"))


def test_checkpoints_that_would_run_code_are_refused(tmp_path):
    torch.save({"guidance_scale_model": FBG()}, tmp_path / "code.pt")
    with pytest.raises(GuidanceError, match="expected a"):
        ScaleNetwork.load(str(tmp_path / "code.pt"))


def test_training_lowers_its_loss_on_a_fixed_question(sd):
    """Always lambda 0, the same two pictures: w' learns to make the noise true."""
    trainer = AnnealingTrainer(sd, steps=3, accumulate=2, condition_noise=0.0, learning_rate=3e-2)
    latents = trainer.encode(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)))
    losses = []
    for i in range(10):
        if i % 2 == 0:  # the same steps and noise again
            trainer.generator.manual_seed(5)
        losses.append(trainer.train(latents, "a red star", alignment=0.0)["noise"])
    per_update = np.array(losses).reshape(5, 2).mean(1)
    assert per_update[-1] < per_update[0]
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in sd.unet.parameters()
    )
    assert sd.unet(latents, 1, torch.zeros(1, 16, 16)).sample.shape == latents.shape


def test_training_goes_on_where_it_stopped(sd, tmp_path):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    whole, first, second = (AnnealingTrainer(sd, steps=3, accumulate=2, seed=s) for s in (0, 0, 9))
    for _ in range(4):
        whole.train(latents, "a moon")
    first.train(latents, "a moon")
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        second.train(latents, "a moon")
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    guidance = second.save(tmp_path / "net.safetensors")
    assert guidance.network().divisor == second.network.divisor == 5 * math.sqrt(256 / 65536)
    assert torch.isfinite(run(sd, guidance)).all()
    config = json.loads(guidance.to_json_string())
    assert AnnealingGuidance.from_config(config) == guidance


def test_training_works_on_flow_models():
    pipe = tiny_sd3()
    trainer = AnnealingTrainer(pipe, steps=3, accumulate=1)
    before = copy.deepcopy(trainer.network)
    losses = trainer.train(torch.randn(1, 4, 8, 8), sd3_prompt(), alignment=0.5)
    assert set(losses) == {"noise", "delta", "w"} and all(map(math.isfinite, losses.values()))
    pairs = zip(before.parameters(), trainer.network.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs)
    with pytest.raises(GuidanceError, match="one picture"):
        trainer.train(torch.randn(4, 8, 8), sd3_prompt())
    with pytest.raises(GuidanceError, match="safetensors"):
        trainer.save("net.pt")
