"""Strategies as guiders of Modular pipelines: what they make is what the classic pipelines make."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import (
    Flux2KleinBaseAutoBlocks,
    QwenImageAutoBlocks,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
)
from tiny import sd3_prompt, tiny_sd3, tiny_sdxl
from tiny_families import FAMILIES, final_latents, fresh

from guidancekit import APG, CFG, FDG, CFGPlusPlus, GuidanceError, Interval, ManifoldProjectedCFG
from guidancekit.modular import Guider, as_guider

STEPS, SIZE, SCALE = 4, 32, 7.5
GUIDANCES = [CFG(6.0), CFG(), APG(9.0), CFGPlusPlus(0.7), FDG(2.0, 8.0)]
# One iteration: the mixing of several magnifies the rounding between one batch and two calls.
GUIDANCES += [CFG(Interval(6.0, 0.0, 2.0)), ManifoldProjectedCFG(4.0, iterations=1)]


def modular(blocks, classic, *names):
    """A Modular pipeline with the networks and the scheduler of a classic one."""
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: getattr(classic, name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, given, **how):
    return pipe(
        **given,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        **how,
    )


def sdxl():
    classic = tiny_sdxl()
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = modular(StableDiffusionXLAutoBlocks(), classic, *encoders, "vae", "unet", "scheduler")
    return classic, pipe, {"prompt": "a red star", "negative_prompt": "a ring"}


def sd3():
    classic, blocks = tiny_sd3(), StableDiffusion3AutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    return classic, modular(blocks, classic, "vae", "transformer", "scheduler"), sd3_prompt()


@pytest.mark.parametrize("make", [sdxl, sd3])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
def test_a_guider_makes_what_the_classic_pipeline_makes(make, guidance):
    classic, pipe, given = make()
    with guidance.attach(classic):
        expected = draw(classic, given, guidance_scale=SCALE, output_type="latent").images
    cost = guidance.report().rows
    pipe.update_components(guider=as_guider(guidance, SCALE))
    found = draw(pipe, given, output="latents")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert pipe.guider.report().rows == cost


def packed(blocks, family):
    """The denoising blocks alone, on the networks of a family, and the arguments of a call."""
    for name in {"text_encoder", "vae_encoder", "controlnet_vae_encoder", "decode"}:
        blocks.sub_blocks.pop(name, None)
    pipe = modular(blocks, fresh(family), "transformer", "scheduler")
    row = FAMILIES[family]
    given = {**row.options, **row.call((0,)), "num_inference_steps": row.steps}

    def call(guider):
        pipe.update_components(guider=guider)
        return pipe(**given, generator=torch.Generator().manual_seed(100), output="latents")

    return call


def test_packed_latents_in_two_calls():
    call = packed(Flux2KleinBaseAutoBlocks(), "flux2-klein")
    plain = call(ClassifierFreeGuidance(guidance_scale=4.0))
    assert torch.equal(call(as_guider(CFG(4.0))), plain)
    assert not torch.equal(call(as_guider(APG(4.0))), plain)
    alone = as_guider(CFG(1.0))
    call(alone)
    assert alone.report().rows_per_step == [1] * FAMILIES["flux2-klein"].steps


@pytest.mark.parametrize("guidance", [CFG(4.0), APG(6.0)], ids=repr)
def test_guidance_takes_the_place_of_the_renormalisation(guidance):
    family, classic = FAMILIES["qwen-image"], fresh("qwen-image")
    with guidance.attach(classic):
        expected = family.unpack(classic, final_latents("qwen-image", classic, 4.0))
    found = packed(QwenImageAutoBlocks(), "qwen-image")(as_guider(guidance))
    torch.testing.assert_close(found[:, :, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [sdxl, sd3])
def test_attach_works_on_modular_pipelines_too(make):
    classic, pipe, given = make()
    with APG(9.0).attach(classic):
        expected = draw(classic, given, guidance_scale=SCALE, output_type="latent").images
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    plain = draw(pipe, given, output="latents")
    with APG(9.0).attach(pipe):
        found = draw(pipe, given, output="latents")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(draw(pipe, given, output="latents"), plain)


def test_it_comes_off_after_each_run():
    _, pipe, given = sdxl()
    found = list(vars(pipe.scheduler)), list(vars(pipe.unet))
    pipe.update_components(guider=as_guider(APG(9.0)))
    first, second = (draw(pipe, given, output="latents") for _ in range(2))
    assert torch.equal(first, second)
    assert (list(vars(pipe.scheduler)), list(vars(pipe.unet))) == found
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    other = draw(pipe, given, output="latents")
    with CFG(3.0).attach(tiny_sdxl()) as guidance:
        plain = draw(
            guidance.attachment.pipe, given, guidance_scale=SCALE, output_type="latent"
        ).images
    torch.testing.assert_close(other, plain, atol=1e-4, rtol=1e-4)


def test_config_round_trip(tmp_path):
    guider = as_guider(CFG(Interval(6.0, 0.0, 2.0)), guidance_scale=5.0)
    guider.save_pretrained(tmp_path)
    again = Guider.from_pretrained(tmp_path)
    assert again.guidance == guider.guidance and again.guidance_scale == 5.0
    assert guider.new(guidance_scale=4.0).guidance_scale == 4.0


def test_without_a_negative_prompt_it_says_so():
    _, pipe, given = sd3()
    pipe.update_components(guider=as_guider(APG(9.0)))
    alone = {name: value for name, value in given.items() if not name.startswith("negative")}
    with pytest.raises(GuidanceError, match="negative"):
        draw(pipe, alone, output="latents")


def test_outside_of_a_modular_pipeline_it_says_so():
    with pytest.raises(GuidanceError, match="Modular"):
        as_guider(APG()).set_state(0, 4, torch.tensor(999))
