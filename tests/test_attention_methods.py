"""Methods that reach into the network: against Diffusers' own pipelines, and processors by hand."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_transformers as families
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from tiny import latents_of, sd3_prompt, tiny_sd, tiny_sd3, tiny_sdxl
from tiny_transformers import noise

from guidancekit import CFG, NAG, NASA, PAG, SAG, SEG, SLG, BlurGuidance, GuidanceError
from guidancekit.engine.layers import around, rows_of, tapped
from guidancekit.guidance import State
from guidancekit.methods.sag import gaussian_blur, received
from guidancekit.methods.slg import bypass, is_block

STEPS = 4
ALL = [SAG(), BlurGuidance(), PAG(), SEG(), SEG(blur_sigma=1.0), SLG(start=0.0, end=1.0)]


call = partial(latents_of, steps=STEPS)


def as_pipeline(cls, pipe, **options):
    other = cls(**pipe.components, requires_safety_checker=False, **options)
    other.set_progress_bar_config(disable=True)
    return other


def modules_state(pipe):
    return [list(vars(module)) for module in pipe.unet.modules()]


# --- what all of them owe ------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ALL, ids=repr)
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_they_change_the_picture_and_leave_nothing_behind(guidance, make):
    pipe = make()
    plain, before = call(pipe), modules_state(pipe)
    with (CFG() + guidance).attach(pipe) as total:
        guided = call(pipe)
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, atol=1e-4)
    skipped = 1 if isinstance(guidance, SLG) else 0  # its window excludes step 0
    assert total.report().rows == 3 * STEPS - skipped
    assert modules_state(pipe) == before
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("cls", [SAG, BlurGuidance, PAG, SEG, SLG])
def test_scale_zero_costs_and_changes_nothing(cls, sd):
    plain = call(sd, 5.0)
    with (CFG() + cls(0.0)).attach(sd) as guidance:
        assert torch.equal(call(sd, 5.0), plain)
    assert guidance.report().rows == 2 * STEPS


@pytest.mark.parametrize("guidance", ALL, ids=repr)
def test_alone_they_evaluate_the_condition(guidance, sd):
    """No unconditional pass is needed, and none is paid for."""
    with guidance.attach(sd):
        without = call(sd, 1.0)
        assert guidance.report().rows <= 2 * STEPS
        torch.testing.assert_close(call(sd, 7.0), without, atol=1e-4, rtol=1e-4)
        assert guidance.report().rows <= 2 * STEPS


@pytest.mark.parametrize("guidance", ALL, ids=repr)
def test_batch_of_two_equals_two_of_one(guidance, sd):
    prompts = ["a red star", "a blue ring"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with (CFG() + guidance).attach(sd):
        together = call(sd, prompt=prompts, latents=noise)
        for row, prompt in enumerate(prompts):
            alone = call(sd, prompt=prompt, latents=noise[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("guidance", ALL, ids=repr)
def test_latents_need_not_be_square(guidance, sd):
    with (CFG() + guidance).attach(sd):
        assert torch.isfinite(call(sd, height=32, width=56)).all()


@pytest.mark.parametrize("guidance", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(guidance, dtype):
    pipe = tiny_sd().to(dtype)
    with (CFG() + guidance).attach(pipe):
        assert torch.isfinite(call(pipe)).all()


@pytest.mark.parametrize("guidance", [SAG(), PAG(), SEG(), SLG(start=0.0, end=1.0)], ids=repr)
def test_an_exception_in_a_perturbed_pass_leaves_nothing_behind(guidance, sd):
    plain, before = call(sd), modules_state(sd)
    count = 0

    def fail(module, args):
        nonlocal count
        count += 1
        if count == 4:
            raise ZeroDivisionError

    handle = sd.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), (CFG() + guidance).attach(sd):
        call(sd)
    handle.remove()
    assert modules_state(sd) == before
    assert torch.equal(call(sd), plain)


@pytest.mark.parametrize("guidance", [SAG(), PAG(), SEG()], ids=repr)
def test_attention_that_cannot_be_seen_is_an_error(guidance, sd):
    sd.enable_attention_slicing(1)
    with pytest.raises(GuidanceError, match="slicing"), guidance.attach(sd):
        call(sd)


@pytest.mark.parametrize("cls", [SAG, PAG, SEG, SLG])
def test_unknown_layers_are_an_error(cls, sd):
    guidance = cls(layers="blocks.99", **({"start": 0.0, "end": 1.0} if cls is SLG else {}))
    with pytest.raises(GuidanceError, match=r"blocks\.99"), guidance.attach(sd):
        call(sd)


def test_fused_projections_are_the_same(sd):
    with (CFG() + PAG()).attach(sd):
        separate = call(sd)
        sd.unet.fuse_qkv_projections()
        torch.testing.assert_close(call(sd), separate, atol=1e-4, rtol=1e-4)


# --- NAG and NASA --------------------------------------------------------------------------------


class TwoTexts(AttnProcessor2_0):
    """Cross-attention of the last rows with two texts, by hand: [rows, tokens, features]."""

    def __init__(self, negative, combine, guided_rows):
        super().__init__()
        self.negative, self.combine, self.guided_rows = negative, combine, guided_rows

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        def attend(x, text):
            q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)
            heads = [t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v)]
            scores = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) * attn.scale, dim=-1)
            return (scores @ heads[2]).transpose(1, 2).flatten(2)

        out = attend(hidden_states, encoder_hidden_states)
        last = hidden_states[-self.guided_rows :]
        negative = self.negative.expand(self.guided_rows, -1, -1)
        guided = self.combine(out[-self.guided_rows :], attend(last, negative))
        out = torch.cat([out[: -self.guided_rows], guided])
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + hidden_states if attn.residual_connection else out) / (
            attn.rescale_output_factor
        )


def nag_by_hand(phi, tau, alpha):
    def combine(positive, negative):  # [rows, tokens, features], the paper's Eq. 7-10
        extrapolated = positive + phi * (positive - negative)
        ratio = extrapolated.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        normalised = torch.minimum(ratio, torch.tensor(tau)) / ratio * extrapolated
        return alpha * normalised + (1 - alpha) * positive

    return combine


NEGATIVE_ATTENTION = [
    (NAG(3.0, tau=1.5, alpha=0.6), nag_by_hand(3.0, 1.5, 0.6)),
    (NASA(0.3), lambda positive, negative: positive - 0.3 * negative),
]


@pytest.mark.parametrize(("guidance", "combine"), NEGATIVE_ATTENTION, ids=["nag", "nasa"])
@pytest.mark.parametrize("w", [1.0, 5.0])
def test_negative_attention_equals_a_processor_by_hand(guidance, combine, w, sd):
    prompt = dict(negative_prompt="a blue ring") if w > 1 else {}
    if w == 1:
        guidance = type(guidance)(**{**guidance.config, "negative_prompt": "a blue ring"})
    with (CFG() + guidance if w > 1 else guidance).attach(sd) as attached:
        guided = call(sd, w, **prompt)
        assert attached.report().rows == (2 if w > 1 else 1) * STEPS, "no second network pass"
    negative = sd.encode_prompt("a blue ring", "cpu", 1, False)[0]
    for name, module in sd.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(TwoTexts(negative, combine, guided_rows=1))
    torch.testing.assert_close(guided, call(sd, w, **prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "guidance", [NAG(0.0), NAG(alpha=0.0), NASA(0.0)], ids=["phi 0", "alpha 0", "nasa 0"]
)
def test_negative_attention_switched_off_is_the_plain_pipeline(guidance, sd):
    with guidance.attach(sd):
        off = call(sd, 1.0)
    assert torch.equal(off, call(sd, 1.0))


def test_nag_of_equal_texts_is_the_positive(sd):
    with NAG(4.0, negative_prompt="a red star").attach(sd):
        same = call(sd, 1.0)
    torch.testing.assert_close(same, call(sd, 1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [NAG(), NASA()], ids=repr)
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_negative_attention_composes_and_leaves_nothing_behind(guidance, make):
    pipe = make()
    plain, before = call(pipe), modules_state(pipe)
    with (CFG() + PAG(2.0) + guidance).attach(pipe) as attached:
        guided = call(pipe, negative_prompt="a blue ring")
        assert attached.report().rows == 3 * STEPS
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, atol=1e-4)
    assert modules_state(pipe) == before and torch.equal(call(pipe), plain)


def test_negative_attention_batch(sd):
    prompts = ["a red star", "a blue ring"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with (CFG() + NAG(negative_prompt="a heart")).attach(sd):
        together = call(sd, prompt=prompts, latents=noise)
        for row, prompt in enumerate(prompts):
            alone = call(sd, prompt=prompt, latents=noise[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=2e-4, rtol=1e-3)


def test_nag_features_of_zeros_are_finite():
    zeros = torch.zeros(1, 2, 3, 4)
    assert torch.isfinite(NAG().combine(zeros, zeros)).all()
    assert torch.isfinite(NAG().combine(zeros, zeros + 1)).all()


def test_nag_without_a_text_encoder_says_so(sd):
    embeds = sd.encode_prompt("a red star", "cpu", 1, False)[0]
    sd.tokenizer = None
    with pytest.raises(GuidanceError, match="cannot encode"), NAG().attach(sd):
        call(sd, 1.0, prompt=None, prompt_embeds=embeds)


@pytest.mark.parametrize(
    "make", [lambda: NAG(tau=0.5), lambda: NAG(alpha=1.5), lambda: NAG(-1.0), lambda: NASA(-0.1)]
)
def test_nag_parameters_out_of_range(make):
    with pytest.raises(GuidanceError, match="expected a number"):
        make()


# --- independent references ----------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 5.0])
def test_sag_equals_diffusers_pipeline(w):
    pipe = tiny_sd()
    pipe.unet.config["attention_head_dim"] = 4
    reference = as_pipeline(StableDiffusionSAGPipeline, pipe)
    expected = call(reference, w, sag_scale=0.75)
    guidance = CFG() + SAG(0.75) if w > 1 else SAG(0.75)
    with guidance.attach(pipe):
        torch.testing.assert_close(call(pipe, w), expected, atol=1e-4, rtol=1e-4)


class BlurringEverything(StableDiffusionSAGPipeline):
    """Where every token receives more attention than the mean, the mask is all ones."""

    def sag_masking(self, original_latents, attn_map, map_size, t, eps):
        everywhere = torch.ones_like(attn_map)  # a token receives one from each query
        return super().sag_masking(original_latents, everywhere, map_size, t, eps)


@pytest.mark.parametrize("w", [1.0, 5.0])
def test_blur_equals_diffusers_pipeline_with_a_mask_of_ones(w):
    pipe = tiny_sd()
    pipe.unet.config["attention_head_dim"] = 4
    expected = call(as_pipeline(BlurringEverything, pipe), w, sag_scale=0.75)
    guidance = CFG() + BlurGuidance(0.75) if w > 1 else BlurGuidance(0.75)
    with guidance.attach(pipe):
        torch.testing.assert_close(call(pipe, w), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("w", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_pag_equals_diffusers_pipeline(w, scheduler):
    pipe = tiny_sd()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    guidance = CFG() + PAG(3.0) if w > 1 else PAG(3.0)
    with guidance.attach(pipe):
        guided = call(pipe, w)
    reference = as_pipeline(StableDiffusionPAGPipeline, pipe, pag_applied_layers="mid")
    expected = call(reference, w, pag_scale=3.0)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


class BlurredQueries(AttnProcessor2_0):
    """SEG as a processor: the published rule, written for this test on [rows, tokens, features]."""

    def __init__(self, sigma, grid):
        super().__init__()
        self.sigma, self.grid = sigma, grid

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        residual = hidden_states
        q, k, v = (proj(hidden_states) for proj in (attn.to_q, attn.to_k, attn.to_v))
        height, width = self.grid
        if math.isinf(self.sigma):
            q = q.mean(1, keepdim=True).expand_as(q)
        else:
            size = math.ceil(6 * self.sigma) + 1 - math.ceil(6 * self.sigma) % 2
            maps = q.transpose(1, 2).reshape(q.shape[0], -1, height, width)
            for axis, side in ((2, height), (3, width)):
                kernel = min(size, side + 1 - side % 2)
                at = torch.arange(kernel) - kernel // 2
                weights = torch.exp(-(at**2) / (2 * self.sigma**2))
                weights = weights / weights.sum()
                pad = [0, 0, kernel // 2, kernel // 2] if axis == 2 else [kernel // 2] * 2 + [0, 0]
                padded = F.pad(maps, pad, mode="reflect")
                maps = sum(w * padded.narrow(axis, i, side) for i, w in enumerate(weights))
            q = maps.flatten(2).transpose(1, 2)
        heads = [t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        scores = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) * attn.scale, dim=-1)
        out = (scores @ heads[2]).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


@pytest.mark.parametrize("sigma", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("size", [(8, 8), (8, 14)])
def test_seg_equals_a_processor_by_hand(sigma, size, sd):
    """One evaluation of the network with blurred queries, and the guided prediction from it."""
    seen = {}

    class Spy(SEG):
        def guide(self, step, state):
            guided = super().guide(step, state)
            seen.setdefault("step", (step.cond.out, step.x, step.timestep, guided.out))
            seen.setdefault("embeds", step.conditions("cond")["encoder_hidden_states"])
            return guided

    guidance = Spy(2.0, blur_sigma=None if math.isinf(sigma) else sigma)
    with guidance.attach(sd):
        call(sd, height=4 * size[0], width=4 * size[1])
    cond, x, t, guided = seen["step"]
    grid = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    attention = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.set_processor(BlurredQueries(sigma, grid))
    with torch.no_grad():
        smoothed = sd.unet(x, t, seen["embeds"]).sample
    torch.testing.assert_close(guided, cond + 2.0 * (cond - smoothed), atol=1e-4, rtol=1e-4)


def test_a_large_finite_blur_is_not_the_infinite_one():
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert gaussian_blur(x, 100.0, 601).std(dim=(2, 3)).max() > 1e-3


def test_slg_skips_the_blocks_it_names(sd):
    """The skipped prediction is the network's with the mid block's transformer taken out."""
    seen = {}

    class Spy(SLG):
        def guide(self, step, state):
            guided = super().guide(step, state)
            if step.index == 1:
                embeds = step.conditions("cond")["encoder_hidden_states"]
                seen.update(x=step.x, t=step.timestep, c=step.cond.out, g=guided.out, e=embeds)
            return guided

    with Spy(2.0, start=0.0, end=0.9).attach(sd) as guidance:
        call(sd)
    assert guidance.report().rows_per_step == [1, 2, 2, 2]
    block = sd.unet.mid_block.attentions[0].transformer_blocks[0]
    block.forward = lambda hidden, *a, **k: hidden
    with torch.no_grad():
        skipped = sd.unet(seen["x"], seen["t"], seen["e"]).sample
    del block.forward
    torch.testing.assert_close(seen["g"], 3 * seen["c"] - 2 * skipped, atol=1e-4, rtol=1e-4)


def test_slg_window_is_strict_and_an_empty_one_warns(sd):
    with SLG(2.0, start=0.01, end=0.2).attach(sd) as guidance, pytest.warns(match="none of the 4"):
        call(sd)
    assert guidance.report().rows == STEPS


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_soft_pag_blends_the_map(strength, sd):
    seen = []

    class Spy(PAG):
        def perturb(self, q, k, v, attend, place):
            out = super().perturb(q, k, v, attend, place)
            seen.append((out, (1 - strength) * attend(q, k, v) + strength * v))
            return out

    with Spy(3.0, strength=strength).attach(sd) as guidance:
        call(sd)
    assert len(seen) == (STEPS if strength else 0)
    assert guidance.report().rows == (2 if strength else 1) * STEPS
    for found, expected in seen:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_attention_received_has_mean_one():
    q, k = (torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    mass = received(q, k, 8**-0.5, chunk=7)
    whole = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1).mean(1).sum(1)
    torch.testing.assert_close(mass, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass.mean(1), torch.ones(2))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [SAG(0.8), BlurGuidance(0.8)], ids=["sag", "blur"])
def test_blur_in_x0_space_is_exact_for_other_predictions(prediction_type, guidance):
    """A network that says the same thing in another parameterisation is guided to the same."""
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    alphas = pipe.scheduler.alphas_cumprod
    with guidance.attach(pipe):
        expected = call(pipe, 1.0)

    class Translated(UNet2DConditionModel):
        def forward(self, sample, timestep, *args, **kwargs):
            eps = super().forward(sample, timestep, *args, **kwargs)[0]
            bar = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
            x0 = (sample - bar[1] * eps) / bar[0]
            return (bar[0] * eps - bar[1] * x0 if prediction_type == "v_prediction" else x0,)

    translated = Translated.from_config(pipe.unet.config).eval()
    translated.load_state_dict(pipe.unet.state_dict())
    other = tiny_sd()
    other.unet = translated
    other.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction_type
    )
    with guidance.attach(other):
        torch.testing.assert_close(call(other, 1.0), expected, atol=2e-3, rtol=2e-3)


# --- joint attention -----------------------------------------------------------------------------


def call_sd3(pipe, count=1, **options):
    """The first `count` of two samples."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return pipe(
        **{name: tensor[:count] for name, tensor in sd3_prompt(2).items()},
        num_inference_steps=STEPS,
        latents=noise[:count],
        height=32,
        width=32,
        output_type="latent",
        **{"guidance_scale": 5.0, **options},
    ).images


@pytest.mark.parametrize("w", [1.0, 5.0])
def test_pag_equals_diffusers_joint_attention_pipeline(w):
    pipe = tiny_sd3()
    guidance = CFG() + PAG(3.0) if w > 1 else PAG(3.0)
    with guidance.attach(pipe):
        guided = call_sd3(pipe, guidance_scale=w)
    parts = {
        k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")
    }
    reference = StableDiffusion3PAGPipeline(**parts, pag_applied_layers="transformer_blocks.1")
    reference.set_progress_bar_config(disable=True)
    expected = call_sd3(reference, guidance_scale=w, pag_scale=3.0)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_slg_equals_diffusers_own():
    pipe = tiny_sd3()
    expected = call_sd3(
        pipe,
        skip_guidance_layers=[1],
        skip_layer_guidance_scale=2.5,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=0.9,
    )
    slg = SLG(2.5, layers="transformer_blocks.1", start=0.0, end=0.9)
    with (CFG() + slg).attach(pipe) as guidance:
        torch.testing.assert_close(call_sd3(pipe), expected, atol=1e-4, rtol=1e-4)
    assert guidance.report().rows_per_step == [2, 3, 3, 3]


@pytest.mark.parametrize(
    "guidance", [SAG(), PAG(strength=0.5), SEG(), SEG(blur_sigma=1.0)], ids=repr
)
def test_joint_attention_batches_and_leaves_nothing_behind(guidance):
    pipe = tiny_sd3()
    plain = call_sd3(pipe)
    with (CFG() + guidance).attach(pipe):
        together = call_sd3(pipe, 2)
        alone = call_sd3(pipe)
    torch.testing.assert_close(together[:1], alone, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(alone, plain, atol=1e-4)
    assert torch.equal(call_sd3(pipe), plain)


def test_seg_leaves_text_queries_alone():
    pipe, seen = tiny_sd3(), []

    class Spy(SEG):
        def perturb(self, q, k, v, attend, place):
            def look(new_q, new_k, new_v):
                after = slice(place.image.stop, None)
                seen.append((q[:, :, after], new_q[:, :, after]))
                assert new_k is k and new_v is v
                assert new_q[:, :, place.image].std(dim=2).max() < 1e-5
                return attend(new_q, new_k, new_v)

            return super().perturb(q, k, v, look, place)

    with Spy().attach(pipe):
        call_sd3(pipe)
    assert len(seen) == STEPS and all(torch.equal(*pair) for pair in seen)


# --- transformers of every family, against attention by hand -------------------------------------
#
# The references below take the place of PyTorch's attention function itself, know by a hook when
# the layer in question is at work, and by themselves how each family lays out its sequence.

IMAGE_FIRST = (families.sd3, families.hunyuan_video, families.z_image)
TEXT_BLOCKS = [  # names of blocks that every kind of layer is among
    (families.dit, "transformer_blocks.1"),
    (families.pixart, "transformer_blocks.1"),
    (families.hunyuan_dit, "blocks.2"),
    (families.wan, "blocks.1"),
    (families.ltx, "transformer_blocks.1"),
    (families.sd3, "transformer_blocks.0"),  # attends twice: jointly, and the image alone
    (families.sd3, "transformer_blocks.1"),
    (families.flux, "transformer_blocks.1"),
    (families.flux, "single_transformer_blocks.0"),
    (partial(families.flux, references=True), "single_transformer_blocks.1"),
    (families.flux2, "single_transformer_blocks.1"),
    (families.chroma, "transformer_blocks.0"),
    (families.qwen, "transformer_blocks.1"),
    (partial(families.qwen, references=True, mask=True), "transformer_blocks.1"),
    (families.hunyuan_video, "transformer_blocks.1"),
    (families.hunyuan_video, "single_transformer_blocks.0"),
    (families.cogvideox, "transformer_blocks.1"),
    (families.cogview3, "transformer_blocks.1"),
    (families.cogview4, "transformer_blocks.1"),
    (families.auraflow, "single_transformer_blocks.1"),
    (families.lumina2, "layers.1"),
    (families.z_image, "layers.1"),
]


def family_id(value):
    name = getattr(value, "__name__", None) or getattr(value, "func", None)
    return getattr(name, "__name__", None) or (name if isinstance(name, str) else str(value))


def in_blocks(function):
    return pytest.mark.parametrize(("family", "block"), TEXT_BLOCKS, ids=family_id)(function)


def image_in(family, tokens, tiny):
    """Where the image is in a sequence of `tokens`, as the test knows it."""
    count = math.prod(tiny.tokens)
    family = getattr(family, "func", family)
    if tokens == count or family in IMAGE_FIRST:
        return slice(0, count)
    registers = 8 if family is families.auraflow else 0
    return slice(families.TEXTS + registers, families.TEXTS + registers + count)


def softmax_attention(q, k, v, mask=None, scale=None, more=None):
    """Attention [rows, heads, tokens, width] by hand; `more` is a further mask to be added."""
    logits = (q @ k.transpose(-1, -2)).float() * (scale or q.shape[-1] ** -0.5)
    for each in (mask, more):
        if each is not None and each.dtype == torch.bool:
            logits = logits.masked_fill(~each, -torch.inf)
        elif each is not None:
            logits = logits + each
    return torch.softmax(logits, dim=-1) @ v.float()


@contextmanager
def attention_by_hand(modules, attention, monkeypatch):
    """`attention(q, k, v, mask, scale)` in place of PyTorch's while one of `modules` is at work."""
    original, at_work = F.scaled_dot_product_attention, []

    def replaced(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        if not at_work:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        return attention(query, key, value, attn_mask, kwargs.get("scale"))

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda *_: at_work.append(1)))
        handles.append(module.register_forward_hook(lambda *_: at_work.pop() and None))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", replaced)
        yield
    for handle in handles:
        handle.remove()


def self_attention_of(tiny, block):
    """The attention layers in which the image of a block sees itself."""
    return [
        module
        for name, module in tiny.network.named_modules()
        if name.startswith(f"{block}.")
        and hasattr(module, "set_processor")
        and not (name.endswith("attn2") and "SD3" not in type(tiny.network).__name__)
    ]


def perturbed_by_guidance(tiny, guidance, block):
    with tapped(tiny.network, tiny.grid, lambda: ("cond",), block, guidance.perturb):
        return tiny()


@in_blocks
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_pag_in_every_family(family, block, strength, monkeypatch):
    tiny = family()

    def identity(q, k, v, mask, scale):
        image, more = image_in(family, q.shape[2], tiny), torch.zeros(q.shape[2], q.shape[2])
        more[image, image] = -torch.inf
        more.fill_diagonal_(0)
        plain = softmax_attention(q, k, v, mask, scale)
        return torch.lerp(plain, softmax_attention(q, k, v, mask, scale, more), strength)

    with attention_by_hand(self_attention_of(tiny, block), identity, monkeypatch):
        expected = tiny()
    found = perturbed_by_guidance(tiny, PAG(strength=strength), block)
    assert not torch.allclose(expected, tiny(), atol=1e-4)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_pag_of_linear_attention_is_diffusers_processor(strength):
    tiny, reference = families.sana(), families.sana()
    attention = reference.network.transformer_blocks[1].attn1
    plain, forward = reference(), attention.forward
    processor = PAGIdentitySanaLinearAttnProcessor2_0()  # for [rows, perturbed rows]

    def blended(hidden_states, **kwargs):
        identity = processor(attention, hidden_states.repeat(2, 1, 1)).chunk(2)[1]
        return torch.lerp(forward(hidden_states, **kwargs), identity, strength)

    attention.forward = blended
    with PAG(strength=strength, layers="transformer_blocks.1").perturbation(step_on(tiny)):
        found = tiny()
    torch.testing.assert_close(found, reference(), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert torch.equal(tiny(), plain)


@in_blocks
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_seg_in_every_family(family, block, sigma, monkeypatch):
    tiny = family()
    height, width = tiny.tokens[-2:]

    def weights(side):  # which query contributes how much to which, along one axis
        size = min(7, side + 1 - side % 2)  # 6 sigma is 6, and odd it is 7
        kernel = torch.exp(-0.5 * (torch.arange(size) - size // 2).float() ** 2)
        matrix = torch.zeros(side, side)
        for i in range(side):
            for j, w in enumerate(kernel / kernel.sum()):
                at = i + j - size // 2
                at = -at if at < 0 else 2 * (side - 1) - at if at >= side else at  # reflected
                matrix[i, at] += w
        return matrix

    def smooth(q, k, v, mask, scale):
        image, q = image_in(family, q.shape[2], tiny), q.clone()
        frames = q[:, :, image].unflatten(2, (-1, height, width))
        if sigma is None:
            frames = frames.mean(dim=(3, 4), keepdim=True).expand_as(frames)
        else:
            along = (weights(height), weights(width))
            frames = torch.einsum("yi,xj,bhfijd->bhfyxd", *along, frames)
        q[:, :, image] = frames.flatten(2, 4)
        return softmax_attention(q, k, v, mask, scale)

    with attention_by_hand(self_attention_of(tiny, block), smooth, monkeypatch):
        expected = tiny()
    found = perturbed_by_guidance(tiny, SEG(blur_sigma=sigma), block)
    assert not torch.allclose(expected, tiny(), atol=1e-5)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@in_blocks
def test_slg_in_every_family(family, block):
    """Skipping a block is the network without it."""
    tiny, shorter = family(), family()
    with around(tiny.network, is_block, bypass, layers=block):
        skipped = tiny()
    blocks, _, index = block.partition(".")
    blocks, index = getattr(shorter.network, blocks), int(index)
    if family is families.hunyuan_dit:  # here the number of the blocks matters
        blocks[index].forward = lambda hidden_states, **_: hidden_states
    elif family is families.chroma:  # here too
        blocks[index].forward = lambda hidden_states, encoder_hidden_states, **_: (
            encoder_hidden_states,
            hidden_states,
        )
    else:
        del blocks[index]
    assert not torch.allclose(skipped, tiny(), atol=1e-4)
    torch.testing.assert_close(skipped, shorter(), atol=1e-6, rtol=1e-6)


@in_blocks
def test_sag_reads_the_images_attention_to_itself(family, block, monkeypatch):
    tiny, state, maps = family(), State(), []

    def remember(q, k, v, mask, scale):
        image = image_in(family, q.shape[2], tiny)
        among = softmax_attention(
            q[:, :, image], k[:, :, image], torch.eye(math.prod(tiny.tokens)), None, scale
        )
        maps.append(among.mean(1).sum(1))
        return softmax_attention(q, k, v, mask, scale)

    with attention_by_hand(self_attention_of(tiny, block), remember, monkeypatch):
        tiny()
    with SAG(layers=block).during(step_on(tiny), state):
        tiny()
    (mass,) = state.masses
    torch.testing.assert_close(mass.flatten(1), maps[0], atol=1e-4, rtol=1e-4)
    assert mass.shape == (families.ROWS, *((1, *tiny.tokens)[-3:]))
    torch.testing.assert_close(mass.flatten(1).mean(1), torch.ones(families.ROWS))


def test_sag_blurs_videos_frame_by_frame():
    """A frame whose attention is nowhere above the mean stays; another is blurred where it is."""
    x0 = noise(2, 4, 3, 8, 12)
    mass = torch.ones(2, 3, 4, 6)
    mass[:, 1, :, :3] = 2.0
    degraded = SAG().degrade(x0, State(masses=[mass]))
    assert torch.equal(degraded[:, :, [0, 2]], x0[:, :, [0, 2]])
    assert torch.equal(degraded[:, :, 1, :, 6:], x0[:, :, 1, :, 6:])
    torch.testing.assert_close(
        degraded[:, :, 1, :, :6], gaussian_blur(x0[:, :, 1], 1.0, kernel=9)[..., :6]
    )
    everywhere = BlurGuidance().degrade(x0, State())
    for frame in range(3):
        torch.testing.assert_close(everywhere[:, :, frame], gaussian_blur(x0[:, :, frame], 1.0, 9))


def test_latents_that_are_no_pictures_cannot_be_blurred():
    with pytest.raises(GuidanceError, match="on which grid"):
        BlurGuidance().degrade(noise(2, 24, 4), State())


# --- negative text in every family: the whole network on twice the rows ---------------------------

CROSS = [families.pixart, families.sana, families.wan, families.ltx]
FOR_NAG = [
    *CROSS,
    partial(families.wan, from_image=True),
    families.sd3,
    families.flux,
    partial(families.flux, references=True),
    families.flux2,
    families.chroma,
    families.qwen,
    partial(families.qwen, mask=True),
    families.hunyuan_video,
    families.cogvideox,
    families.cogview3,
    families.cogview4,
    families.auraflow,
]


def step_on(tiny, branches=("cond",), negative=None):
    """As much of a step as NAG and SAG use, on a network without a pipeline."""
    evaluating = []

    def evaluate(branch, conditions):
        assert branch == "cond"
        evaluating[:] = ["cond"]
        out = tiny(**conditions)
        evaluating.clear()
        return out

    def rows_now():
        return tuple(evaluating) or branches

    def without_uncond(branch):
        raise GuidanceError("no unconditional branch")

    x = tiny.inputs[tiny.image]
    return SimpleNamespace(
        x=torch.stack(x) if isinstance(x, list) else x,
        needed=("cond",),
        evaluate=evaluate,
        encode=lambda prompt: negative,
        conditions=without_uncond,
        rows=lambda branch, count: rows_of(rows_now(), branch, count),
        attention=partial(tapped, tiny.network, tiny.grid, rows_now),
        around=partial(around, tiny.network),
    )


def doubled(tiny, family, negative, combine, monkeypatch):
    """The network on [positive, negative] rows with the same image, the image's attention to the
    text combined and given to both halves; the first half."""
    count = math.prod(tiny.tokens)
    of_text = {**tiny.inputs, **negative}
    inputs = {
        name: torch.cat([value, of_text[name]])
        if isinstance(value, torch.Tensor) and value.shape[0] == families.ROWS
        else value * 2
        if name == "img_shapes"
        else value
        for name, value in tiny.inputs.items()
    }
    name = getattr(family, "func", family).__name__
    registers = 8 if name == "auraflow" else 0
    texts = tiny.inputs["encoder_hidden_states"].shape[1] + registers
    image_tokens = tiny.inputs["hidden_states"].shape[1] if tiny.grid == tiny.tokens else count

    def attention(q, k, v, mask, scale):
        out = softmax_attention(q, k, v, mask, scale)
        cross = (q.shape[2], k.shape[2]) == (count, texts)
        joint = q.shape[2] == k.shape[2] == image_tokens + texts
        if cross or joint:
            behind = slice(texts, None)  # the text: the image, and reference images
            stream = slice(0, count) if cross or family in IMAGE_FIRST else behind
            positive, other = out[:, :, stream].chunk(2)
            tokens = [each.transpose(1, 2).flatten(2) for each in (positive, other)]
            guided = combine(*tokens).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
            out[:, :, stream] = guided.repeat(2, 1, 1, 1)
        return out

    with attention_by_hand([tiny.network], attention, monkeypatch):
        return tiny(**inputs)[: families.ROWS]


@pytest.mark.parametrize("family", FOR_NAG, ids=family_id)
def test_nag_equals_the_network_on_twice_the_rows(family, monkeypatch):
    tiny = family()
    negative = tiny.other_text()
    expected = doubled(tiny, family, negative, nag_by_hand(3.0, 1.5, 0.6), monkeypatch)
    plain = tiny()
    guidance = NAG(3.0, tau=1.5, alpha=0.6, negative_prompt="something")
    with guidance.during(step_on(tiny, negative=negative), State()):
        found = tiny()
        again = tiny()  # a second evaluation of the step starts from the same text
    assert not torch.allclose(plain, expected, atol=1e-4)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    assert torch.equal(found, again)
    assert torch.equal(tiny(), plain)


@pytest.mark.parametrize("family", CROSS, ids=family_id)
def test_nasa_equals_the_network_on_twice_the_rows(family, monkeypatch):
    tiny = family()
    negative = tiny.other_text()
    expected = doubled(tiny, family, negative, lambda p, n: p - 0.3 * n, monkeypatch)
    with NASA(0.3, "something").during(step_on(tiny, negative=negative), State()):
        torch.testing.assert_close(tiny(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [families.sd3, families.flux, families.qwen], ids=family_id)
def test_nasa_refuses_joint_attention(family):
    tiny = family()
    step = step_on(tiny, negative=tiny.other_text())
    with pytest.raises(GuidanceError, match="Use NAG"), NASA().during(step, State()):
        tiny()


@pytest.mark.parametrize(
    "family", [families.dit, families.lumina2, families.z_image], ids=family_id
)
def test_networks_whose_blocks_are_given_no_text_are_refused(family):
    tiny = family()
    step = step_on(tiny, negative={})
    with pytest.raises(GuidanceError, match="given a text"), NAG().during(step, State()):
        tiny()


@pytest.mark.parametrize("family", [families.pixart, families.sd3, families.qwen], ids=family_id)
def test_a_negative_text_may_have_another_length(family, monkeypatch):
    """Where it has no positions: the same text padded with what nobody sees gives the same."""
    tiny = family()
    negative = {"encoder_hidden_states": noise(families.ROWS, 3, families.TEXT_WIDTH, seed=5)}
    if family is families.pixart:
        negative["encoder_attention_mask"] = torch.ones(families.ROWS, 3)
    with NAG(3.0, negative_prompt="x").during(step_on(tiny, negative=negative), State()):
        found = tiny()
    assert torch.isfinite(found).all() and not torch.allclose(found, tiny(), atol=1e-4)
    if family is not families.qwen:
        return
    longer = torch.cat([negative["encoder_hidden_states"], noise(families.ROWS, 2, 12)], dim=1)
    seen = torch.tensor([[1, 1, 1, 0, 0]] * families.ROWS).bool()
    tiny.inputs["encoder_hidden_states_mask"] = torch.ones(families.ROWS, families.TEXTS).bool()
    padded = {"encoder_hidden_states": longer, "encoder_hidden_states_mask": seen}
    with NAG(3.0, negative_prompt="x").during(step_on(tiny, negative=padded), State()):
        torch.testing.assert_close(tiny(), found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [families.flux, families.flux2], ids=family_id)
def test_where_the_text_has_positions_lengths_must_agree(family):
    tiny = family()
    negative = {"encoder_hidden_states": noise(families.ROWS, 3, families.TEXT_WIDTH)}
    expected = pytest.raises(GuidanceError, match="3 tokens and the prompt 5")
    with expected, NAG(negative_prompt="x").during(step_on(tiny, negative=negative), State()):
        tiny()


@pytest.mark.parametrize("family", [families.pixart, families.flux, families.chroma], ids=family_id)
def test_nag_leaves_the_unconditional_rows_alone(family):
    tiny = family()
    first = {name: value[:1] for name, value in tiny.inputs.items() if name == tiny.text}
    plain = tiny()
    negative = {name: value.repeat(1, 1, 1) for name, value in first.items()}
    step = step_on(tiny, branches=("uncond", "cond"), negative=negative)
    step.x = step.x[:1]  # one sample, of which the network sees two branches

    def evaluate(branch, conditions):
        one = {
            name: value[:1]
            if isinstance(value, torch.Tensor) and value.shape[0] == families.ROWS
            else value
            for name, value in tiny.inputs.items()
        }
        return tiny(**{**one, **conditions})

    step.evaluate = evaluate
    with NAG(3.0, negative_prompt="x").during(step, State()):
        guided = tiny()
    torch.testing.assert_close(guided[:1], plain[:1], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(guided[1:], plain[1:], atol=1e-4)


@pytest.mark.parametrize("method", ["nag", "sag"])
def test_compiled_networks_are_compiled_once(method):
    """Both keep something between the layers of one full graph."""
    tiny, graphs = families.flux(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def guided(network):
        state, step = State(), step_on(tiny, negative=tiny.other_text())
        guidance = NAG(3.0, negative_prompt="x") if method == "nag" else SAG()
        with torch.no_grad(), guidance.during(step, state):
            out = network(**tiny.inputs, return_dict=False)[0]
        return (out, state.masses[0]) if method == "sag" else (out,)

    expected = guided(tiny.network)
    torch.compiler.reset()
    compiled = torch.compile(tiny.network, backend=count, fullgraph=True)
    try:
        for _ in range(3):
            torch.testing.assert_close(guided(compiled), expected, atol=1e-5, rtol=1e-4)
        assert len(graphs) == 1
    finally:
        torch.compiler.reset()


# --- image adapters ------------------------------------------------------------------------------


def unet_with_an_image_adapter():
    """A UNet whose cross-attention goes to 5 tokens of text, and then to 3 of an image."""
    unet = tiny_sd().unet.requires_grad_(False)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            width = module.to_q.in_features
            module.set_processor(IPAdapterAttnProcessor2_0(width, 16, num_tokens=(3,)))
    unet.encoder_hid_proj = torch.nn.Identity()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    inputs = dict(
        sample=noise(2, 4, 8, 12),
        timestep=torch.tensor([700, 300]),
        encoder_hidden_states=noise(2, families.TEXTS, 16, seed=1),
        added_cond_kwargs={"image_embeds": [noise(2, 1, 3, 16, seed=2)]},
    )
    return families.Tiny(unet, (8, 12), (4, 6), inputs, image="sample")


def test_nag_guides_the_text_and_not_the_image_of_an_adapter(monkeypatch):
    torch.manual_seed(0)  # the adapter's own weights
    tiny = unet_with_an_image_adapter()
    plain, negative = tiny(), tiny.other_text()
    text_only = []

    def attention(q, k, v, mask, scale):
        out = softmax_attention(q, k, v, mask, scale)
        if k.shape[2] != families.TEXTS:
            return out
        text_only.append(1)
        positive, other = (each.transpose(1, 2).flatten(2) for each in out.chunk(2))
        guided = nag_by_hand(3.0, 1.5, 0.6)(positive, other).unflatten(2, (q.shape[1], -1))
        return guided.transpose(1, 2).repeat(2, 1, 1, 1)

    rows = {**tiny.inputs, **negative}
    twice = {
        name: torch.cat([value, rows[name]])
        for name, value in tiny.inputs.items()
        if name != "added_cond_kwargs"
    }
    twice["added_cond_kwargs"] = {"image_embeds": [noise(2, 1, 3, 16, seed=2).repeat(2, 1, 1, 1)]}
    with attention_by_hand([tiny.network], attention, monkeypatch):
        expected = tiny(**twice)[:2]
    assert text_only
    guidance = NAG(3.0, tau=1.5, alpha=0.6, negative_prompt="x")
    with guidance.during(step_on(tiny, negative=negative), State()):
        torch.testing.assert_close(tiny(), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-4)


def test_an_image_adapter_of_flux_stays_as_it_is():
    tiny = families.flux()
    for block in tiny.network.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(16, 16, num_tokens=(3,)))
    tiny.inputs["joint_attention_kwargs"] = {"ip_hidden_states": [noise(2, 3, 16, seed=3)]}
    plain, calls = tiny(), []

    def tap(q, k, v, attend, place):
        calls.append(k.shape[2])
        return attend(q, k, v)

    with tapped(tiny.network, tiny.grid, lambda: ("cond",), "", tap):
        assert torch.equal(tiny(), plain)
    assert calls == [24 + families.TEXTS] * 4, "not the image's attention to the adapter"


def test_nag_on_stable_diffusion_3():
    """End to end: with CFG and PAG, per sample, off at phi 0, and nothing left behind."""
    pipe = tiny_sd3()
    plain = call_sd3(pipe)
    with (CFG() + NAG(4.0, alpha=0.5)).attach(pipe) as guidance:
        together, alone = call_sd3(pipe, 2), call_sd3(pipe)
        assert guidance.report().rows == 2 * STEPS
    torch.testing.assert_close(together[:1], alone, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(alone, plain, atol=1e-4)
    with (CFG() + PAG(2.0) + SAG(0.5) + NAG(4.0)).attach(pipe) as guidance:
        assert torch.isfinite(call_sd3(pipe)).all()
        assert guidance.report().rows == 4 * STEPS
    with (CFG() + NAG(0.0)).attach(pipe):
        assert torch.equal(call_sd3(pipe), plain)
    assert torch.equal(call_sd3(pipe), plain)
