"""Several strategies in one pipeline call: each row is what a run of its own would have made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tiny import sd3_prompt, tiny_sd, tiny_sd3, tiny_sdxl
from tiny_families import FAMILIES, final_latents, pipeline

from guidancekit import (
    APG,
    CADS,
    CFG,
    FDG,
    NAG,
    NLG,
    PAG,
    TSG,
    AdaptiveGuidance,
    CFGPlusPlus,
    GuidanceError,
    Interval,
    ManifoldProjectedCFG,
    SideBySide,
    parse,
)
from guidancekit.compare import Comparison, make_columns
from guidancekit.guidance import Guidance
from guidancekit.recipe import Recipe

STEPS = 4
STRATEGIES = [
    CFG(6.0),
    APG(9.0),
    CFG(1.0),
    CFG(Interval(6.0, 0.0, 2.0)),
    FDG(2.0, 8.0),
    CFGPlusPlus(0.7),
    CADS(scale=5.0),
    NAG(),
    CFG(4.0) + PAG(2.0),
    AdaptiveGuidance(),
    NLG(scale=4.0),
]


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def draw(pipe, prompts, x, **options):
    """The latents that a run ends with from the noise `x`."""
    return pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=x.clone(),
        output_type="latent",
        **options,
    ).images


def alone(pipe, term, prompts, x, **options):
    with term.attach(pipe):
        return draw(pipe, prompts, x, **options)


def together(pipe, guidance, prompts, x, **options):
    count = len(guidance.terms)
    with guidance.attach(pipe):
        many = x.repeat_interleave(count, dim=0)
        return draw(pipe, prompts, many, num_images_per_prompt=count, **options)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_equals_runs_of_their_own(make):
    pipe = make()
    prompts, x = ["a red star", "a blue ring above a moon"], noise(2)
    guidance = SideBySide(STRATEGIES)
    found = together(pipe, guidance, prompts, x, negative_prompt=["ring", "red"])
    costs = list(guidance.evaluations)
    for i, term in enumerate(STRATEGIES):
        expected = alone(pipe, term, prompts, x, negative_prompt=["ring", "red"])
        torch.testing.assert_close(
            found[i :: len(STRATEGIES)],
            expected,
            atol=2e-4,
            rtol=2e-4,
            msg=lambda m, t=term: f"{t}: {m}",
        )
        assert costs[i] == term.report().rows, term
    assert sum(costs) == guidance.report().rows


@pytest.mark.parametrize(
    "terms",
    [
        [CFG(6.0), APG(9.0)],  # all rows are needed
        [CFG(6.0), CFG(1.0), APG(9.0)],
        [CFG(0.0), CFG(1.0), CFG(6.0), CFG(1.0)],
        [CFG(1.0), CFG(4.0) + PAG(2.0), CFG(6.0), CFG(1.0), APG(9.0)],
    ],
    ids=repr,
)
def test_rows_of_three_prompts_go_where_they_belong(terms):
    pipe, x = tiny_sd(), noise(3)
    prompts = ["a red star", "a blue ring above a moon", "a green heart"]
    found = together(pipe, SideBySide(terms), prompts, x)
    for i, term in enumerate(terms):
        expected = alone(pipe, term, prompts, x)
        torch.testing.assert_close(found[i :: len(terms)], expected, atol=2e-4, rtol=2e-4)


def test_equals_runs_of_their_own_on_a_flow_model():
    pipe = tiny_sd3()
    terms = [CFG(5.0), APG(8.0), ManifoldProjectedCFG(4.0), CFG(Interval(5.0, 0.0, 1.0))]
    x = noise(1)

    def run(count):
        prompt = {name: t.repeat_interleave(count, dim=0) for name, t in sd3_prompt().items()}
        return pipe(
            **prompt,
            height=32,
            width=32,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            latents=x.repeat(count, 1, 1, 1),
            output_type="latent",
        ).images

    with SideBySide(terms).attach(pipe):
        found = run(len(terms))
    for i, term in enumerate(terms):
        with term.attach(pipe):
            torch.testing.assert_close(found[i : i + 1], run(1), atol=2e-4, rtol=2e-4)


EVERYWHERE = [CFG(5.0), APG(8.0), CFG(1.0), CFG(Interval(5.0, 0.0, 2.0)), CFG(3.0) + TSG(2.0, 0.0)]
SHAPES = ["dit", "z-image", "flux", "qwen-image", "lumina2", "wan", "ltx", "cogvideox"]


@pytest.mark.parametrize("name", [name for name in SHAPES if name in FAMILIES])
def test_equals_runs_of_their_own_in_every_shape(name):
    """One batch or two calls, lists, packed tokens, video; each row costs what it does alone."""
    pipe, count = pipeline(name), len(EVERYWHERE)
    with SideBySide(EVERYWHERE).attach(pipe) as guidance:
        found = final_latents(name, pipe, 4.0, (0,) * count)
        costs = list(guidance.evaluations)
        assert sum(costs) == guidance.report().rows
    for i, term in enumerate(EVERYWHERE):
        with term.attach(pipe):
            expected = final_latents(name, pipe, 4.0)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[i : i + 1] / scale, expected / scale, atol=1e-4, rtol=0)
        assert costs[i] == term.report().rows, term


def test_equals_runs_of_their_own_without_a_second_branch():
    pipe, terms = pipeline("flux-distilled"), [CFG(1.0), PAG(2.0), TSG(2.0, 0.0)]
    with SideBySide(terms).attach(pipe) as guidance:
        found = final_latents("flux-distilled", pipe, 1.0, (0,) * len(terms))
        assert guidance.evaluations == [3, 6, 6]
    for i, term in enumerate(terms):
        with term.attach(pipe):
            expected = final_latents("flux-distilled", pipe)
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-4, rtol=1e-4)


def test_one_network_call_serves_all_rows():
    pipe = tiny_sd()
    with SideBySide([CFG(6.0), APG(9.0), CFG(1.0)]).attach(pipe) as guidance:
        together(pipe, guidance, ["a red star"], noise(1))
    steps = guidance.report().steps
    assert [step.calls for step in steps] == [1] * STEPS
    assert [step.rows for step in steps] == [5] * STEPS
    assert [each.shape for each in (step.scale for step in steps)] == [(3,)] * STEPS


def test_noise_of_the_scheduler_follows_the_rows():
    pipe = tiny_sd()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    terms, x = [CFG(6.0), APG(9.0)], noise(1)
    generators = [torch.Generator().manual_seed(5) for _ in terms]
    found = together(pipe, SideBySide(terms), ["a red star"], x, generator=generators)
    for i, term in enumerate(terms):
        generator = torch.Generator().manual_seed(5)
        expected = alone(pipe, term, ["a red star"], x, generator=generator)
        torch.testing.assert_close(found[i : i + 1], expected, atol=2e-4, rtol=2e-4)


def test_the_pipelines_own_rescale_is_respected():
    pipe, x, terms = tiny_sd(), noise(1), [CFG(8.0), APG(9.0)]
    found = together(pipe, SideBySide(terms), ["a red star"], x, guidance_rescale=0.7)
    for i, term in enumerate(terms):
        expected = alone(pipe, term, ["a red star"], x, guidance_rescale=0.7)
        torch.testing.assert_close(found[i : i + 1], expected, atol=2e-4, rtol=2e-4)


def test_another_batch_is_refused_before_the_first_evaluation():
    pipe = tiny_sd()
    calls = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    with (
        SideBySide([CFG(), APG(), FDG()]).attach(pipe),
        pytest.raises(GuidanceError, match="num_images_per_prompt=3"),
    ):
        draw(pipe, ["a red star", "a blue ring"], noise(2))
    assert not calls


@pytest.mark.parametrize("terms", [[], [SideBySide([CFG()])]], ids=["none", "nested"])
def test_bad_compositions(terms):
    with pytest.raises(GuidanceError, match="SideBySide"):
        SideBySide(terms)
    with pytest.raises(GuidanceError, match="SideBySide"):
        CFG() + SideBySide([CFG()])


def test_a_comparison_in_one_call_per_row(tiny_folder):
    rows = [Recipe(prompt="a red star", model=tiny_folder, steps=3, seed=seed) for seed in (1, 2)]
    columns = make_columns(["cfg", "apg(scale=8)", "cfg(1)"], scales=[3.0, 6.0])
    apart, together = (Comparison(rows, columns) for _ in range(2))
    list(apart.run())
    list(together.run(together=True))
    assert together.pictures.keys() == apart.pictures.keys()
    for cell, picture in apart.pictures.items():
        other = together.pictures[cell]
        difference = np.abs(np.asarray(picture.image, int) - np.asarray(other.image, int))
        assert difference.max() <= 1, cell
        assert other.evaluations == picture.evaluations
        assert other.effective_scale == pytest.approx(picture.effective_scale, abs=1e-3)
        assert other.recipe == picture.recipe


def test_round_trips(tmp_path):
    guidance = SideBySide([CFG(Interval(5.0, 0.0, 2.0)), APG(eta=0.5) + PAG(2.0)])
    assert parse(repr(guidance)) == guidance
    guidance.save_config(tmp_path)
    assert Guidance.from_config(Guidance.load_config(tmp_path)) == guidance
