"""The embedded models: ordinary Diffusers pipelines, on which every law holds as on any other."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from guidancekit import APG, CFG, FDG, PAG, CFGPlusPlus, GuidanceError, Interval, bundled
from guidancekit.engine.run import denoiser

PROMPT, STEPS = "a red star left of a blue ring", 8


@pytest.fixture(scope="module", params=bundled.MODELS)
def model(request):
    """The name of an embedded model."""
    return request.param


@pytest.fixture(scope="module")
def scenes(model):
    return load(model)


@pytest.fixture(scope="module")
def unet():
    return load("scenes-unet")


def load(model, **options):
    pipe = bundled.load(model, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, guidance_scale=4.0, prompt=PROMPT, **options):
    short = bundled.CALL["scenes-flow"] if hasattr(pipe, "transformer") else {}
    return pipe(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **short,
        **options,
    ).images


def test_it_is_an_ordinary_pipeline(scenes, model):
    expected = {"scenes-unet": StableDiffusionPipeline, "scenes-flow": StableDiffusion3Pipeline}
    assert type(scenes) is expected[model]
    picture = scenes(PROMPT, num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    files = [path for path in bundled.path(model).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}


def test_unknown_embedded_model():
    with pytest.raises(GuidanceError, match="scenes-unet"):
        bundled.path("scenes-vit")


def test_laws_of_cfg(scenes):
    plain = call(scenes, 6.0)
    for guidance in (CFG(6.0), APG(6.0, eta=1.0, norm_threshold=0.0, momentum=0.0), FDG(6.0, 6.0)):
        with guidance.attach(scenes):
            torch.testing.assert_close(call(scenes, 2.0), plain, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "guidance",
    [APG(8.0), CFGPlusPlus(), FDG(3.0, 8.0), CFG(Interval(8.0)), CFG() + PAG(0.75)],
    ids=repr,
)
def test_strategies_run_and_come_off(scenes, guidance):
    plain = call(scenes)
    with guidance.attach(scenes):
        guided = call(scenes)
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, atol=1e-3)
    assert torch.equal(call(scenes), plain)


def test_batch_of_two_equals_two_of_one(scenes):
    noise = torch.randn(2, denoiser(scenes).config.in_channels, 16, 16)
    prompts = [PROMPT, "a large green heart"]
    with APG(6.0).attach(scenes):
        together = call(scenes, prompt=prompts, latents=noise)
        for row, prompt in enumerate(prompts):
            alone = call(scenes, prompt=prompt, latents=noise[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers(unet, scheduler):
    pipe = StableDiffusionPipeline(**unet.components, requires_safety_checker=False)
    pipe.scheduler = scheduler.from_config(unet.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    plain = call(pipe, 5.0)
    with CFG(5.0).attach(pipe):
        torch.testing.assert_close(call(pipe, 2.0), plain, atol=2e-4, rtol=1e-3)
    with CFGPlusPlus().attach(pipe) as guidance:
        assert torch.isfinite(call(pipe, 5.0)).all()
        middle = sorted(guidance.report().effective_scale)[STEPS // 2]
        assert middle == pytest.approx(5.0, rel=0.3), "as strong as the CFG it stands for"


def test_image_to_image(scenes):
    if hasattr(scenes, "transformer"):
        pipe = StableDiffusion3Img2ImgPipeline(**scenes.components)
    else:
        pipe = StableDiffusionImg2ImgPipeline(**scenes.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = scenes(PROMPT, num_inference_steps=4).images[0]
    with APG(6.0).attach(pipe) as guidance:
        assert torch.isfinite(call(pipe, image=image, strength=0.5)).all()
        assert guidance.report().rows == 2 * STEPS // 2


def test_half_precision(model):
    pipe = load(model, torch_dtype=torch.bfloat16)
    with APG(6.0).attach(pipe):
        assert torch.isfinite(call(pipe)).all()
