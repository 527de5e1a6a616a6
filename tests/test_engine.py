"""The engine: what a user of `attach` relies on, on real (tiny) pipelines."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from tiny import latents_of, tiny_sd, tiny_sdxl

from guidancekit import (
    APG,
    CFG,
    FDG,
    CFGPlusPlus,
    Constant,
    Guidance,
    GuidanceError,
    Interval,
    Linear,
    PerStep,
)
from guidancekit.engine import Report, noise
from guidancekit.engine.report import StepRecord, brief

STEPS = 5
MAKERS = [pytest.param(tiny_sd, id="sd"), pytest.param(tiny_sdxl, id="sdxl")]


call = partial(latents_of, steps=STEPS)


def snapshot(pipe):
    """Everything that guidance could leave behind on the objects it touches."""
    denoiser = pipe.unet
    return (
        {name: list(vars(part)) for name, part in (("d", denoiser), ("s", pipe.scheduler))},
        denoiser.forward,
        pipe.scheduler.step,
        [list(module._forward_hooks) for module in denoiser.modules()],
    )


class Boom(PipelineCallback):
    """A callback that fails after the second step."""

    tensor_inputs = ["latents"]

    def __init__(self):
        super().__init__()

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == 1:
            raise RuntimeError("boom")
        return callback_kwargs


# --- laws against the untouched pipeline ---------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("w", [1.5, 7.5])
def test_cfg_equals_the_untouched_pipeline_to_the_last_bit(make, w):
    pipe = make()
    plain = call(pipe, w)
    for guidance in (CFG(w), APG(w, eta=1.0, norm_threshold=0.0, momentum=0.0), CFG(Constant(w))):
        with guidance.attach(pipe):
            assert torch.equal(call(pipe, 3.0), plain)


@pytest.mark.parametrize("make", MAKERS)
def test_fdg_at_equal_scales_equals_the_untouched_pipeline(make):
    pipe = make()
    plain = call(pipe, 6.0)
    for guidance in (FDG(6.0, 6.0), FDG(6.0, 6.0, levels=3), CFG(6.0) + CFG(1.0)):
        with guidance.attach(pipe):
            torch.testing.assert_close(call(pipe, 3.0), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_scale_none_takes_the_pipelines(make):
    pipe = make()
    with CFG().attach(pipe):
        guided = call(pipe, 6.5)
    assert torch.equal(guided, call(pipe, 6.5))


@pytest.mark.parametrize("make", MAKERS)
def test_rescale_equals_the_pipelines_own(make):
    pipe = make()
    plain = call(pipe, 9.0, guidance_rescale=0.7)
    with CFG(9.0, rescale=0.7).attach(pipe):
        torch.testing.assert_close(call(pipe), plain, atol=1e-4, rtol=1e-4)
    with CFG(9.0).attach(pipe):  # the pipeline's own rescaling is respected, not lost
        torch.testing.assert_close(call(pipe, guidance_rescale=0.7), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "guidance", [CFG(6.0), APG(9.0), CFGPlusPlus(0.7), FDG(2.0, 8.0)], ids=repr
)
def test_batch_of_two_equals_two_of_one(make, guidance):
    pipe = make()
    prompts = ["a red star", "a blue ring"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with guidance.attach(pipe):
        together = call(pipe, prompt=prompts, latents=noise)
        for row, prompt in enumerate(prompts):
            alone = call(pipe, prompt=prompt, latents=noise[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_several_images_per_prompt_and_negative_prompts(sd):
    plain = call(sd, 6.0, num_images_per_prompt=3, negative_prompt="a blue ring")
    with CFG(6.0).attach(sd) as guidance:
        assert torch.equal(
            call(sd, 2.0, num_images_per_prompt=3, negative_prompt="a blue ring"), plain
        )
        assert guidance.report().rows_per_step == [6] * STEPS


# --- rows are really dropped ---------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_unneeded_rows_do_not_reach_the_network(make):
    pipe = make()
    seen = []
    watch = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].shape[0]), with_kwargs=True
    )
    inner = []
    watch_inner = pipe.unet.conv_in.register_forward_pre_hook(
        lambda module, args: inner.append(args[0].shape[0])
    )
    scales = [1.0, 5.0, 1.0, 5.0, 5.0]
    with CFG(PerStep(scales)).attach(pipe) as guidance:
        call(pipe, num_images_per_prompt=2)
    watch.remove(), watch_inner.remove()
    assert inner == guidance.report().rows_per_step == [2, 4, 2, 4, 4]
    assert guidance.report().active_steps == [1, 3, 4]
    assert guidance.report().effective_scale == pytest.approx(scales, rel=1e-4)
    assert seen == [4] * STEPS, "the pipeline itself is not told"


def test_dropped_steps_equal_the_conditional_prediction(sd):
    with CFG(1.0).attach(sd) as guidance:
        conditional = call(sd, 5.0)
    assert guidance.report().rows == STEPS
    torch.testing.assert_close(conditional, call(sd, 1.0), atol=1e-6, rtol=1e-5)


def test_scale_one_works_without_the_unconditional_pass(sd):
    with CFG(1.0).attach(sd):
        assert torch.equal(call(sd, 1.0), call(sd, 1.0))


def test_report_reads_well(sd):
    with APG(8.0).attach(sd) as guidance:
        with pytest.raises(GuidanceError, match="no run"):
            guidance.report()
        call(sd)
        report = guidance.report()
    text = str(report)
    assert "APG(scale=8.0)" in text and f"{2 * STEPS} network rows in {STEPS} steps" in text
    assert guidance.report().to_dict()["rows"] == report.rows == 2 * STEPS
    assert len(report.effective_scale) == STEPS
    assert all(abs(scale - 8.0) > 0.1 for scale in report.effective_scale), "not plain CFG"


# --- attach and detach ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_a_block_leaves_the_pipeline_as_it_was(make):
    pipe = make()
    plain, before = call(pipe), snapshot(pipe)
    with APG(12.0).attach(pipe) as guidance:
        guided = call(pipe, callback_on_step_end=guidance)
        assert torch.equal(guided, call(pipe)), "inside the block the callback is optional"
    assert not torch.equal(guided, plain)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("make", MAKERS)
def test_the_one_liner_leaves_nothing_behind(make):
    pipe = make()
    plain, before = call(pipe), snapshot(pipe)
    guided = call(pipe, callback_on_step_end=APG(12.0).attach(pipe))
    assert not torch.equal(guided, plain)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


def test_an_exception_in_a_block(sd):
    plain, before = call(sd), snapshot(sd)
    with pytest.raises(RuntimeError, match="boom"), APG(12.0).attach(sd):
        call(sd, callback_on_step_end=Boom())
    assert snapshot(sd) == before
    assert torch.equal(call(sd), plain)


def test_an_exception_in_the_one_liner_even_while_the_traceback_lives(sd):
    plain, before = call(sd), snapshot(sd)
    with pytest.raises(RuntimeError, match="boom") as caught:
        call(sd, callback_on_step_end=MultiPipelineCallbacks([APG(12.0).attach(sd), Boom()]))
    with pytest.warns(UserWarning, match="came off"):
        assert torch.equal(call(sd), plain)
    assert snapshot(sd) == before
    del caught


def test_an_exception_inside_the_network(sd):
    plain = call(sd)
    with APG(12.0).attach(sd) as guidance:
        guided = call(sd)
        handle = sd.unet.mid_block.register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(sd)
        handle.remove()
        assert torch.equal(call(sd), guided), "the next run of the block starts afresh"
        assert guidance.report().rows == 2 * STEPS
    assert torch.equal(call(sd), plain)


def test_a_kept_guidance_survives_an_aborted_run_when_it_is_named_again(sd):
    guidance = APG(12.0).attach(sd)
    guided = call(sd, callback_on_step_end=guidance)
    with pytest.raises(RuntimeError):
        call(sd, callback_on_step_end=MultiPipelineCallbacks([guidance, Boom()]))
    assert torch.equal(call(sd, callback_on_step_end=guidance), guided)
    assert torch.equal(call(sd), guided), "a kept guidance acts until it is detached"
    guidance.detach()


def test_the_object_dies(sd):
    plain, before = call(sd), snapshot(sd)
    guidance = APG(12.0).attach(sd)
    assert not torch.equal(call(sd), plain)
    alive = weakref.ref(guidance)
    del guidance
    gc.collect()
    assert alive() is None
    assert snapshot(sd) == before
    assert torch.equal(call(sd), plain)


def test_discarded_before_any_run_warns(sd):
    with pytest.warns(UserWarning, match="discarded before any run"):
        APG(12.0).attach(sd)


def test_another_guidance_takes_its_place(sd):
    first, before = APG(12.0), snapshot(sd)
    first.attach(sd)
    second = CFG(3.0).attach(sd)
    assert first.attachment is None and second.attachment is not None
    with_second = call(sd)
    second.detach()
    assert torch.equal(with_second, call(sd, 3.0))
    assert snapshot(sd) == before
    first.detach()  # harmless


def test_attaching_twice_and_elsewhere(sd):
    guidance, other = APG(12.0), tiny_sd(1)
    guidance.attach(sd).attach(sd)
    guidance.attach(other)
    assert torch.equal(call(sd), call(tiny_sd()))
    with pytest.raises(GuidanceError, match="without being attached"):
        call(sd, callback_on_step_end=guidance)
    guidance.detach()


def test_foreign_hooks_stay(sd):
    from diffusers.hooks import HookRegistry, ModelHook

    registry = HookRegistry.check_if_exists_or_initialize(sd.unet)
    registry.register_hook(ModelHook(), "somebody else's")
    before = snapshot(sd)
    with CFG(4.0).attach(sd):
        call(sd)
    assert snapshot(sd)[0] == before[0]
    assert list(sd.unet._diffusers_hook.hooks) == ["somebody else's"]


def test_a_scheduler_patched_by_somebody_else_stays_patched(sd):
    calls = []
    original = sd.scheduler.step
    sd.scheduler.step = lambda *a, **k: calls.append(1) or original(*a, **k)
    patched = sd.scheduler.step
    with CFG(4.0).attach(sd):
        call(sd)
    assert calls == [1] * STEPS
    assert sd.scheduler.step is patched


def test_copies_are_not_attached(sd):
    with APG(12.0).attach(sd) as guidance:
        copied = copy.deepcopy(guidance)
        assert copied == guidance and copied.attachment is None
        scheduler = copy.deepcopy(sd.scheduler)
        scheduler.set_timesteps(3)
        assert sd.scheduler.num_inference_steps != 3


# --- runs ----------------------------------------------------------------------------------------


class Frozen(Guidance):
    """Predicts zero noise and never asks the network."""

    name = "frozen"

    def needs(self, moment, state):
        return ()

    def guide(self, step, state):
        return step.predict(out=torch.zeros_like(step.x))


def test_no_branch_at_all_costs_nothing(sd):
    with Frozen().attach(sd) as guidance:
        assert torch.isfinite(call(sd)).all()
    assert guidance.report().rows_per_step == [0] * STEPS


class Counting(Guidance):
    """A strategy that remembers how many steps it has seen."""

    name = "counting"

    def guide(self, step, state):
        state.count = getattr(state, "count", 0) + 1
        assert state.count == step.index + 1, "the state starts empty in every run"
        return step.cond


def test_state_resets_at_each_run(sd):
    with Counting().attach(sd):
        for _ in range(3):
            call(sd)
        interrupt = lambda pipe, i, t, kwargs: setattr(pipe, "_interrupt", i == 1) or kwargs  # noqa: E731
        call(sd, callback_on_step_end=interrupt)
        call(sd)


def test_runs_do_not_depend_on_earlier_ones(sd):
    with APG(12.0).attach(sd):
        assert torch.equal(call(sd), call(sd))


def test_a_scheduler_replaced_after_attach(sd):
    guidance = CFG(4.0).attach(sd)
    sd.scheduler = EulerDiscreteScheduler.from_config(sd.scheduler.config)
    guided, again = call(sd, 8.0), call(sd, 8.0)
    guidance.detach()
    plain = call(sd, 4.0)
    assert torch.equal(guided, plain) and torch.equal(again, plain)
    assert "step" not in vars(sd.scheduler)


def test_a_second_pipeline_that_shares_the_network_is_not_guided(sd):
    other = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (32, 32), "red")
    plain = call(other, image=image, strength=0.8)
    with APG(12.0).attach(sd):
        assert torch.equal(call(other, image=image, strength=0.8), plain)
        assert not torch.equal(call(sd), call(tiny_sd()))
    with CFG(9.0).attach(other):
        assert torch.equal(call(sd), call(tiny_sd()))


def test_the_network_may_be_called_outside_a_run(sd):
    x, t, embeds = torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 16, 16)
    with torch.no_grad():
        plain = sd.unet(x, t, embeds).sample
        with APG(12.0).attach(sd):
            call(sd)
            assert torch.equal(sd.unet(x, t, embeds).sample, plain)


def test_multi_pipeline_callbacks_and_other_callbacks(sd):
    seen = []
    alone = call(sd, callback_on_step_end=CFG(4.0).attach(sd))
    guidance = CFG(4.0).attach(sd)
    both = MultiPipelineCallbacks([guidance, Boom()])
    both.callbacks[1].callback_fn = lambda p, i, t, kwargs: seen.append(sorted(kwargs)) or kwargs
    assert torch.equal(call(sd, callback_on_step_end=both), alone)
    assert seen == [["latents"]] * STEPS


def test_callback_without_attach_shows_the_right_line(sd):
    with pytest.raises(GuidanceError, match=r"APG\(scale=12\).attach\(pipe\)"):
        call(sd, callback_on_step_end=APG(scale=12))


def test_without_the_unconditional_pass_it_refuses_before_the_first_step(sd):
    stepped = []
    with pytest.raises(GuidanceError, match="guidance_scale above 1"), APG(12.0).attach(sd):
        call(sd, 1.0, callback_on_step_end=lambda *a: stepped.append(1) or a[-1])
    assert not stepped


@pytest.mark.parametrize("bad", [object(), torch.nn.Linear(2, 2), "a pipeline"])
def test_attach_to_something_else(bad):
    with pytest.raises(GuidanceError, match="expected a Diffusers pipeline"):
        CFG(3.0).attach(bad)


def test_a_window_that_selects_no_step_warns(sd):
    with CFG(Interval(8.0, low=100.0, high=200.0)).attach(sd) as guidance:
        with pytest.warns(UserWarning, match="none of the 5 steps"):
            call(sd)
        assert guidance.report().active_steps == [] and guidance.report().warnings
    with CFG(PerStep([2.0, 3.0])).attach(sd), pytest.raises(GuidanceError, match="2 scales"):
        call(sd)


# --- pipelines that do something else with their branches ----------------------------------------


def test_a_pipeline_that_postprocesses_the_prediction_is_refused(sd):
    step = sd.scheduler.step
    guidance = CFG(4.0).attach(sd)
    guided_step = sd.scheduler.step
    sd.scheduler.step = lambda model_output, *a, **k: guided_step(0.9 * model_output, *a, **k)
    with pytest.raises(GuidanceError, match="would not arrive"):
        call(sd)
    del sd.scheduler.step
    guidance.detach()
    assert sd.scheduler.step == step


class CondFirst(diffusers.StableDiffusionPipeline):
    """Batches [cond, uncond], as DiT does, while its kin batch [uncond, cond]."""

    def encode_prompt(self, *args, **kwargs):
        cond, uncond = super().encode_prompt(*args, **kwargs)
        return uncond, cond

    @property
    def guidance_scale(self):
        return 1 - self._guidance_scale  # c + (1 - s)(u - c) = u + s (c - u)


def test_a_pipeline_with_another_combination_is_refused():
    pipe = tiny_sd()
    other = CondFirst(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    torch.testing.assert_close(call(other, 5.0), call(pipe, 5.0), atol=1e-4, rtol=1e-4)
    with CFG(5.0).attach(other), pytest.raises(GuidanceError, match="does not combine"):
        call(other, 5.0)


# --- siblings of SD and SDXL ---------------------------------------------------------------------

IMAGE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (0, 0, 16, 32))


def tiny_controlnet(unet, **options):
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8), **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def controlnet_pipe():
    pipe = tiny_sd()
    net = tiny_controlnet(pipe.unet, controlnet_conditioning_channel_order="rgb")
    return StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    )


def inpaint_nine_channels():
    pipe = tiny_sd()
    config = {**pipe.unet.config, "in_channels": 9}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    return StableDiffusionInpaintPipeline(
        **{**pipe.components, "unet": unet}, requires_safety_checker=False
    )


def sibling(cls, make, **options):
    pipe = make()
    return cls(**pipe.components, **options)


SD_OPTIONS = {"requires_safety_checker": False}
SIBLINGS = {
    "sd-img2img": (
        lambda: sibling(StableDiffusionImg2ImgPipeline, tiny_sd, **SD_OPTIONS),
        dict(image=IMAGE, strength=0.6),
        3,
    ),
    "sd-inpaint": (
        lambda: sibling(StableDiffusionInpaintPipeline, tiny_sd, **SD_OPTIONS),
        dict(image=IMAGE, mask_image=MASK, strength=1.0, height=32, width=32),
        5,
    ),
    "sd-inpaint-9": (
        inpaint_nine_channels,
        dict(image=IMAGE, mask_image=MASK, strength=1.0, height=32, width=32),
        5,
    ),
    "sd-controlnet": (controlnet_pipe, dict(image=IMAGE), 5),
    "sdxl-img2img": (
        lambda: sibling(StableDiffusionXLImg2ImgPipeline, tiny_sdxl, add_watermarker=False),
        dict(image=IMAGE, strength=0.6),
        3,
    ),
    "sdxl-inpaint": (
        lambda: sibling(StableDiffusionXLInpaintPipeline, tiny_sdxl, add_watermarker=False),
        dict(image=IMAGE, mask_image=MASK, strength=0.9999, height=32, width=32),
        4,
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings(name):
    make, options, steps = SIBLINGS[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    plain, before = call(pipe, 6.0, **options), snapshot(pipe)
    with CFG(6.0).attach(pipe) as guidance:
        torch.testing.assert_close(call(pipe, 2.0, **options), plain, atol=1e-5, rtol=1e-5)
        assert guidance.report().rows_per_step == [2] * steps
    with CFG(Linear(9.0)).attach(pipe) as guidance:
        call(pipe, **options)
        assert len(guidance.report().steps) == steps
        assert guidance.report().rows_per_step[0] == 1  # w = 1 at the first executed step
        nsr = [record.nsr for record in guidance.report().steps]
        assert nsr == sorted(nsr, reverse=True)
    for other in (APG(8.0), FDG(2.0, 8.0), CFGPlusPlus(0.6)):
        with other.attach(pipe):
            guided = call(pipe, **options)
        assert torch.isfinite(guided).all() and not torch.equal(guided, plain)
    assert snapshot(pipe) == before


# --- noise levels and prediction types -----------------------------------------------------------

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
]


class Looking(Counting):
    """Checks, from inside a run, that x = alpha x0 + sigma eps holds in what a strategy sees."""

    name = "looking"

    def guide(self, step, state):
        p = step.cond
        torch.testing.assert_close(
            step.alpha * p.x0 + step.sigma * p.eps, step.x, atol=1e-4, rtol=1e-4
        )
        assert step.alpha**2 + step.sigma**2 == pytest.approx(1, abs=1e-5)
        state.seen = [*getattr(state, "seen", []), (step.index, step.stage, step.x.std().item())]
        self.seen = state.seen
        return p


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_strategy_sees(name, prediction_type):
    pipe = tiny_sd()
    config = {**pipe.scheduler.config, "prediction_type": prediction_type}
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    with Looking().attach(pipe) as guidance:
        call(pipe, num_inference_steps=6)
        indices = [index for index, _, _ in guidance.seen]
        stages = [stage for _, stage, _ in guidance.seen]
    assert indices == sorted(indices) and indices[0] == 0
    if name == "HeunDiscreteScheduler":
        assert indices == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        assert stages == [0, 1] * 5 + [0]
    elif name == "PNDMScheduler":  # looks twice at its first step
        assert indices == [0, 0, 1, 2, 3, 4, 5]
        assert stages == [0, 1, 0, 0, 0, 0, 0]
    else:
        assert stages == [0] * len(stages)
    first = guidance.seen[0][2]
    assert first == pytest.approx(1.0, abs=0.2), "the network sees unit-variance latents"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [CFG(6.0), FDG(6.0, 6.0)], ids=["cfg", "fdg"])
def test_every_scheduler_equals_the_untouched_pipeline(name, guidance):
    pipe = tiny_sd()
    config = {**pipe.scheduler.config, "skip_prk_steps": True}
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    plain = call(pipe, 6.0)
    with guidance.attach(pipe):
        torch.testing.assert_close(call(pipe, 2.0), plain, atol=2e-4, rtol=1e-3)


def test_an_unknown_scheduler_serves_what_needs_no_noise_level():
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(4)
    assert noise.levels(scheduler) is None
    noise.check(scheduler, CFG(6.0))
    with pytest.raises(GuidanceError, match="is not known to guidancekit"):
        noise.check(scheduler, CFGPlusPlus(0.6))


def test_steps_of_no_length_are_told_apart():
    """The last one of Diffusers' flow Euler covers a thousandth of the noise."""
    grids = {
        "DDIMScheduler": dict(timestep_spacing="trailing"),
        "FlowMatchEulerDiscreteScheduler": {},
    }
    found = {}
    for name, config in grids.items():
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(20)
        found[name] = brief(noise.times(scheduler))
    assert not any(found["DDIMScheduler"])
    assert found["FlowMatchEulerDiscreteScheduler"] == [False] * 19 + [True]
    assert brief([0.0, 500.0, 999.0]) == [False, False, True]  # towards noise
    assert brief([]) == [] and brief([7.0]) == [False] and brief([3.0, 3.0]) == [False, False]


def test_the_mean_scale_is_that_of_the_other_steps():
    steps = [(1000.0, 4.0), (500.0, torch.tensor([2.0, 6.0])), (1.0, torch.tensor([-80.0, 90.0]))]
    records = [StepRecord(i, None, time, scale=scale) for i, (time, scale) in enumerate(steps)]
    report = Report("", records)
    assert report.brief == [False, False, True]
    assert report.mean_scale.tolist() == [3.0, 5.0]


class Encoding(CFG):
    """Keeps what another prompt conditions the network on."""

    def guide(self, step, state):
        self.found = step.encode("a moon")["encoder_hidden_states"]
        return super().guide(step, state)


def test_other_prompts_are_encoded_as_the_call_encodes_its_own(sdxl):
    given = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    found = {}
    with Encoding(6.0).attach(sdxl) as guidance:
        for skip in (None, 1):
            call(sdxl, clip_skip=skip)
            found[skip] = guidance.found
            assert torch.equal(
                found[skip], sdxl.encode_prompt("a moon", **given, clip_skip=skip)[0]
            )
    assert not torch.equal(found[None], found[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "guidance", [CFG(6.0), APG(12.0), FDG(3.0, 9.0), CFGPlusPlus(0.6)], ids=repr
)
def test_half_precision_pipelines(dtype, guidance):
    pipe = tiny_sd().to(dtype)
    with guidance.attach(pipe):
        latents = call(pipe)
    assert latents.dtype == dtype and torch.isfinite(latents).all()


def test_return_dict_outputs(sd):
    """Pipelines that ask the network and the scheduler for output objects are served too."""
    tuples = call(sd, 6.0)
    forward, step = sd.unet.forward, sd.scheduler.step
    sd.unet.forward = lambda *a, **k: forward(*a, **{**k, "return_dict": True})
    with CFG(6.0).attach(sd):
        assert torch.equal(call(sd, 2.0), tuples)
    sd.scheduler.step = lambda *a, **k: step(*a, **{**k, "return_dict": True})
    with CFGPlusPlus(0.6).attach(sd):
        objects = call(sd)
    del sd.scheduler.step
    with CFGPlusPlus(0.6).attach(sd):
        assert torch.equal(call(sd), objects)


def test_evaluate_runs_further_evaluations_and_counts_them(sd):
    class Twice(Counting):
        def guide(self, step, state):
            again = step.evaluate("cond")
            torch.testing.assert_close(again.out, step.cond.out, atol=1e-6, rtol=1e-5)
            moved = step.evaluate("uncond", x=step.x + 1)
            assert not torch.allclose(moved.out, step.uncond.out)
            torch.testing.assert_close(moved.x, step.x + 1)
            return step.cond

    with Twice().attach(sd) as guidance:
        call(sd)
        assert guidance.report().rows_per_step == [4] * STEPS


def test_uncond_is_evaluated_late_if_it_was_not_foreseen(sd):
    class Late(CFG):
        def needs(self, moment, state):
            return ("cond",)

    plain = call(sd, 6.0)
    with Late(6.0).attach(sd) as guidance:
        torch.testing.assert_close(call(sd, 2.0), plain, atol=1e-5, rtol=1e-5)
    assert guidance.report().rows == 2 * STEPS


def test_autoencoder_is_not_touched(sd):
    assert isinstance(sd.vae, AutoencoderTiny)
    before = list(vars(sd.vae))
    with CFG(3.0).attach(sd):
        assert list(vars(sd.vae)) == before
