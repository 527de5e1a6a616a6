"""Methods that reach into the network: against Diffusers' own pipelines, and processors by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
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
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny import latents_of, sd3_prompt, tiny_sd, tiny_sd3, tiny_sdxl

from guidancekit import CFG, NAG, NASA, PAG, SAG, SEG, SLG, BlurGuidance, GuidanceError
from guidancekit.methods.sag import gaussian_blur, received

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
    mass = received(q, k, chunk=7)
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
                seen.append((q[:, :, place.image :], new_q[:, :, place.image :]))
                assert new_k is k and new_v is v
                assert new_q[:, :, : place.image].std(dim=2).max() < 1e-5
                return attend(new_q, new_k, new_v)

            return super().perturb(q, k, v, look, place)

    with Spy().attach(pipe):
        call_sd3(pipe)
    assert len(seen) == STEPS and all(torch.equal(*pair) for pair in seen)


def test_nag_refuses_joint_attention():
    pipe = tiny_sd3()
    with pytest.raises(GuidanceError, match="no layer"), (CFG() + NAG()).attach(pipe):
        call_sd3(pipe)
