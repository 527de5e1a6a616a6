"""Every family of pipelines under the engine: laws against the untouched pipeline."""

from __future__ import annotations

import functools
import inspect
import itertools
from contextlib import contextmanager

import diffusers
import pytest
import torch
from compatibility import REFUSED, record
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from tiny_families import (
    FAMILIES,
    PICTURE,
    _plain_autoencoder,
    final_latents,
    fresh,
    pipeline,
)

from guidancekit import (
    APG,
    CADS,
    CFG,
    FDG,
    ICG,
    PCG,
    TSG,
    CFGPlusPlus,
    CFGZeroStar,
    EmbeddedGuidance,
    Guidance,
    GuidanceError,
    Interval,
    Linear,
    ManifoldProjectedCFG,
    PerStep,
)
from guidancekit.step import COND

W = 4.0
GUIDED = [name for name, family in FAMILIES.items() if family.calls != "one"]
ALONE = [name for name, family in FAMILIES.items() if family.calls == "one"]
PACKED = [name for name, family in FAMILIES.items() if family.unpack]
CALLS = {"joint": "one batch", "sequential": "two calls", "one": "cond only"}
RENORMALISED = [name for name, family in FAMILIES.items() if family.renormalises]


class Seeing(Guidance):
    """The conditional prediction; keeps the steps that it has seen."""

    name = "seeing"

    def needs(self, moment, state):
        return COND

    def guide(self, step, state):
        state.steps = [*getattr(state, "steps", []), step]
        self.steps = state.steps
        assert step.cond.out.shape == step.x.shape
        return step.cond


class Knowing(Guidance):
    """Knows the clean latents, and never asks the network."""

    name = "knowing"

    def needs(self, moment, state):
        return ()

    def guide(self, step, state):
        self.known = torch.randn(step.x.shape, generator=torch.Generator().manual_seed(7))
        return step.predict(x0=self.known)


def networks(pipe):
    names = ("unet", "transformer", "transformer_2")
    return [net for name in names if (net := getattr(pipe, name, None)) is not None]


@contextmanager
def counted(pipe):
    """The arguments of every evaluation that reaches a network; to be entered before `attach`.

    A look inside that is broken off on the way (TSG's, at the time embedding) is none.
    """
    calls = []

    def counting(forward, *args, **kwargs):
        calls.append(args[0] if args else kwargs["hidden_states"])
        try:
            return forward(*args, **kwargs)
        except GuidanceError:
            raise
        except Exception:
            calls.pop()
            raise

    for net in networks(pipe):
        net.forward = functools.partial(counting, net.forward)
    try:
        yield calls
    finally:
        for net in networks(pipe):
            del net.forward


@functools.cache
def plain(name, samples=(0,)):
    """The untouched pipeline's latents at W."""
    return final_latents(name, pipeline(name), W, samples)


def guided(guidance, name, *args, **options):
    """The latents of an attached run."""
    with guidance.attach(pipeline(name)):
        return final_latents(name, pipeline(name), *args, **options)


class Watching(PipelineCallback):
    """Somebody else's callback."""

    tensor_inputs = ["latents"]

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen.append(step_index)
        assert "latents" in callback_kwargs
        return callback_kwargs


def assert_close(found, expected, tolerance=1e-5):
    """Relative to the size of the latents, which differs much between families."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in RENORMALISED])
def test_cfg_equals_the_untouched_pipeline(name):
    """To the last bit, also where the strategy's scale is the pipeline's own.

    Only Z-Image adds the same terms in another order.
    """
    for guidance, scale in ((CFG(W), 2.5), (CFG(), W)):
        found = guided(guidance, name, scale)
        if FAMILIES[name].offset:
            assert_close(found, plain(name))
        else:
            assert torch.equal(found, plain(name))
        assert set(guidance.report().rows_per_step) == {2}
    record("family", name, "branches", CALLS[FAMILIES[name].calls])
    record("family", name, "cfg")


@pytest.mark.parametrize("name", GUIDED)
def test_the_one_line(name):
    """PixArt's and T2I-Adapter's pipelines have an older kind of callback, DiT's has none."""
    pipe = pipeline(name)
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        assert name in {"dit", "pixart-alpha", "pixart-sigma", "sd-t2i-adapter", "sdxl-t2i-adapter"}
        return
    found = final_latents(name, pipe, W, callback_on_step_end=APG(9.0).attach(pipe))
    assert not torch.equal(found, plain(name))
    seen = []
    both = MultiPipelineCallbacks([APG(9.0).attach(pipe), Watching(seen)])
    assert torch.equal(final_latents(name, pipe, W, callback_on_step_end=both), found)
    assert seen == [*range(len(seen))] and seen
    del both
    assert torch.equal(final_latents(name, pipe, W), plain(name))
    record("companion", "callback_on_step_end, MultiPipelineCallbacks", "outcome")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["sd15", "sd3", "dit", "z-image", "flux", "wan", "ltx", "cogvideox"]
)
def test_half_precision(name, dtype):
    """The pipeline combines its branches in half precision, guidance in float32."""
    pipe = fresh(name).to(dtype)

    def half(value):
        if isinstance(value, list):
            return [half(item) for item in value]
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    given = {key: half(value) for key, value in FAMILIES[name].call((0,)).items()}
    expected = final_latents(name, pipe, W, **given)
    with CFG(W).attach(pipe):
        found = final_latents(name, pipe, 2.5, **given)
    assert found.dtype == expected.dtype
    assert_close(found.float(), expected.float(), 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ALONE)
def test_scale_one_equals_the_untouched_pipeline(name):
    assert torch.equal(guided(CFG(1.0), name), plain(name))
    record("family", name, "branches", CALLS["one"])


@pytest.mark.parametrize("name", RENORMALISED)
def test_guidance_takes_the_place_of_a_renormalisation(name):
    """The pipeline's combination ends with a re-normalisation to the conditional prediction; the
    strategy's does not: it equals the combination by hand, without it."""
    found = guided(CFG(W), name, 2.5)
    assert not torch.allclose(found, plain(name), atol=1e-2)
    assert_close(found, by_hand(name))
    record("family", name, "branches", CALLS[FAMILIES[name].calls])
    record("family", name, "cfg", "yes, without the re-normalisation")


def takes(name, argument):
    return argument in inspect.signature(type(pipeline(name)).__call__).parameters


@pytest.mark.parametrize("name", [n for n in GUIDED if takes(n, "guidance_rescale")])
def test_a_rescaling_that_the_caller_asks_for_is_respected(name):
    options = {"guidance_rescale": 0.7}
    expected = final_latents(name, pipeline(name), W, **options)
    assert_close(guided(CFG(W), name, 2.5, **options), expected)
    assert not torch.allclose(expected, plain(name), atol=1e-3)


def by_hand(name):
    """Euler's method on uncond + W (cond - uncond), from what the network is given."""
    pipe, given, first = pipeline(name), [], []
    for net in networks(pipe):
        handle = net.register_forward_pre_hook(
            lambda net, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: first.append(args[2]) or step(*args, **kwargs)
    final_latents(name, pipe, W)
    handle.remove()
    del pipe.scheduler.step
    x, sigmas = first[0], pipe.scheduler.sigmas
    for i, (now, after) in enumerate(itertools.pairwise(sigmas)):
        if FAMILIES[name].calls == "joint":  # Z-Image: lists [cond, uncond], x0 - eps
            (_, time, *rest), kwargs = given[i]
            with torch.no_grad():
                cond, uncond = pipe.transformer(
                    list(x.repeat(2, 1, 1, 1)[:, :, None]), time, *rest
                )[0]
            v = -(uncond + W * (cond - uncond)).movedim(1, 0)
        else:
            outs = []
            for _, kwargs in given[2 * i : 2 * i + 2]:
                sample = torch.cat([x, kwargs["hidden_states"][:, x.shape[1] :]], dim=1)
                with torch.no_grad():
                    out = pipe.transformer(**{**kwargs, "hidden_states": sample})[0]
                outs.append(out[:, : x.shape[1]])
            v = outs[1] + W * (outs[0] - outs[1])
            if name.startswith("lumina2"):
                v = -v
        x = x + (after - now) * v
    return x


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_of_two_equals_two_of_one(name):
    apg = APG(6.0 if name in GUIDED else 1.0)
    together = guided(apg, name, W, (0, 1))
    for i in (0, 1):
        assert_close(together[i : i + 1], guided(apg, name, W, (i,)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_known_clean_latent_is_where_the_run_ends(name):
    """So what a strategy sees is in the right space, and its prediction arrives in the pipeline's
    own packing; the schedulers end at the clean latent, but for the last training step's noise."""
    knowing = Knowing()
    with counted(pipeline(name)) as calls:
        found = guided(knowing, name, W)
    assert not calls
    family = FAMILIES[name]
    if family.unpack:
        found = family.unpack(pipeline(name), found)
    if found.shape != knowing.known.shape:  # CogVideoX keeps frames before channels
        found = found.transpose(1, 2)
    final = getattr(pipeline(name).scheduler, "final_alpha_cumprod", 1.0)
    assert_close(found, knowing.known, 1e-4 + 2 * float(1 - final) ** 0.5)


@pytest.mark.parametrize("name", PACKED)
def test_packed_latents_are_unpacked_as_the_pipeline_does(name):
    pipe, family, seeing, given = pipeline(name), FAMILIES[name], Seeing(), []
    with seeing.attach(pipe):
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: given.append(args[2]) or step(*args, **kwargs)
        final_latents(name, pipe, W)
        pipe.scheduler.step = step
    for step, latents in zip(seeing.steps, given, strict=True):
        assert latents.ndim == 3
        assert torch.equal(step.x, family.unpack(pipe, latents))


@pytest.mark.parametrize("name", ["flux-kontext", "flux2-klein-reference", "qwen-image-edit"])
def test_reference_tokens_reach_the_network_and_no_strategy(name):
    seeing = Seeing()
    with counted(pipeline(name)) as calls:
        guided(seeing, name, W)
    tokens = seeing.steps[0].x[0].numel() // 16
    assert all(sample.shape[1] > tokens for sample in calls)


@pytest.mark.parametrize("name", GUIDED)
def test_skipped_passes_do_not_reach_the_network(name):
    pipe = pipeline(name)
    seeing = Seeing()
    guided(seeing, name, W)
    scales = [W if i % 2 else 1.0 for i in range(len(seeing.steps))]
    with counted(pipe) as calls, CFG(PerStep(scales)).attach(pipe) as guidance:
        found = final_latents(name, pipe, 2.5, (0, 1))
        assert guidance.report().rows_per_step == [2 if w == 1 else 4 for w in scales]
    assert torch.isfinite(found).all()
    joint = FAMILIES[name].calls == "joint"
    expected = [[2] if w == 1 else [4] if joint else [2, 2] for w in scales]
    assert [len(sample) for sample in calls] == [*itertools.chain(*expected)]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_leaves_nothing_behind(name):
    pipe = pipeline(name)
    before = [[*vars(part)] for part in (pipe.scheduler, *networks(pipe))]
    guided(APG(1.0 if name in ALONE else 9.0), name, W)
    assert [[*vars(part)] for part in (pipe.scheduler, *networks(pipe))] == before
    assert torch.equal(final_latents(name, pipe, W), plain(name))


# --- methods -------------------------------------------------------------------------------------

METHODS = [
    FDG(2.0, 5.0),
    CFGPlusPlus(0.6),
    CFGZeroStar(5.0),
    ManifoldProjectedCFG(5.0),
    PCG(5.0),
    ICG(5.0),
    TSG(5.0, low=0.0),
    CADS(5.0),
]
WAN = ["wan", "wan-two-transformers", "wan-per-token-time"]
MULTISTEP = ["pixart-alpha", "pixart-sigma", "sana"]
REFUSALS = {
    "cfg++": dict.fromkeys(WAN, "keeps latents of its own"),
    "cfg-mp": dict.fromkeys(WAN, "keeps latents of its own")
    | dict.fromkeys(MULTISTEP, "predictions at earlier latents"),
    "pcg": dict.fromkeys(WAN, "keeps latents of its own")
    | dict.fromkeys(MULTISTEP, "predictions at earlier latents")
    | dict.fromkeys(["sd-lcm", "lcm", "sdxl-turbo"], "adds noise"),
    "icg": {
        "dit": r"class labels need ICG\(classes=...\)",
        "animatediff": "found the conditions none",  # it has one text for each frame
    },
    "tsg": {"chroma": "no time embedding"},
    "cads": dict.fromkeys(["dit", "animatediff"], "noises text embeddings, and found none"),
}
WITHOUT_UNCOND = {"icg", "tsg"}


@pytest.mark.parametrize("guidance", METHODS, ids=lambda guidance: guidance.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_methods_run_or_are_refused_before_the_first_evaluation(name, guidance):
    missing = "needs the unconditional prediction" if name in ALONE else None
    refusal = REFUSALS.get(guidance.name, {}).get(name)
    refusal = refusal or (None if guidance.name in WITHOUT_UNCOND else missing)
    expected = plain(name)
    with counted(pipeline(name)) as calls:
        if refusal:
            with pytest.raises(GuidanceError, match=refusal):
                guided(guidance, name, W)
            assert not calls
        else:
            found = guided(guidance, name, W)
            assert torch.isfinite(found).all() and not torch.equal(found, expected)
            assert sum(map(len, calls)) == guidance.report().rows
    record("family", name, guidance.name, REFUSED if refusal else "yes")


@pytest.mark.parametrize("name", ALONE)
def test_without_a_second_branch_cfg_says_what_is_missing(name):
    how = {
        "lcm": "makes none at a guidance_scale of 8 either",
        "sdxl-turbo": r"guidance_scale above 1 \(found 0.0\)",
    }.get(name, "true_cfg_scale above 1 and a negative_prompt")
    with counted(pipeline(name)) as calls:
        for guidance in (CFG(W), APG(W), CFG(Interval(W)), CFG(W) + TSG(2.0)):
            with pytest.raises(GuidanceError, match=how):
                guided(guidance, name)
    assert not calls
    record("family", name, "cfg", REFUSED)


def test_class_labels_are_drawn():
    found = guided(ICG(5.0, classes=1000), "dit", W)
    assert torch.isfinite(found).all() and not torch.equal(found, plain("dit"))
    record("family", "dit", "icg", "yes, with classes=...")


# --- the scale that distilled networks are told --------------------------------------------------

DISTILLED = ["flux-distilled", "hunyuan-video-distilled", "lcm"]


@contextmanager
def told(name):
    """What the network of a distilled model is told in each evaluation."""
    seen = []
    (net,) = networks(pipeline(name))
    forward, argument = net.forward, "timestep_cond" if name == "lcm" else "guidance"
    net.forward = lambda *a, **k: seen.append(k[argument].tolist()) or forward(*a, **k)
    yield seen
    del net.forward


def in_its_form(name, scales):
    """Scales [evaluations][rows] as the network takes them."""
    scales = torch.tensor(scales)
    if name == "lcm":
        waves = pipeline(name).get_guidance_scale_embedding(scales.flatten() - 1, embedding_dim=8)
        return waves.unflatten(0, scales.shape)
    return scales * (1000.0 if name.startswith("hunyuan") else 1.0)


@pytest.mark.parametrize("name", DISTILLED)
def test_embedded_guidance_equals_the_pipeline_at_that_scale(name):
    expected = final_latents(name, pipeline(name), guidance_scale=2.0)
    assert not torch.allclose(plain(name), expected, atol=1e-3)
    guidance = EmbeddedGuidance(2.0)
    assert_close(guided(guidance, name), expected)
    assert set(guidance.report().rows_per_step) == {1}
    assert torch.equal(guided(EmbeddedGuidance(), name), plain(name))
    # at an equal scale and with others that leave the prediction as it is
    assert_close(guided(EmbeddedGuidance(2.0) + CFG(1.0), name), expected)


@pytest.mark.parametrize("name", DISTILLED)
def test_embedded_guidance_follows_its_schedule(name):
    own, steps = FAMILIES[name].options["guidance_scale"], {"num_inference_steps": 3}
    with told(name) as seen:
        guided(EmbeddedGuidance(Linear(3.0)), name, 1.0, (0, 1), **steps)
    expected = in_its_form(name, [[scale] * 2 for scale in (1.0, 3.0, 5.0)])
    torch.testing.assert_close(torch.tensor(seen), expected)
    with told(name) as seen:
        guided(EmbeddedGuidance(Linear()), name, **steps)
    expected = in_its_form(name, [[scale] for scale in (1.0, own, 2 * own - 1)])
    torch.testing.assert_close(torch.tensor(seen), expected)


@pytest.mark.parametrize("name", DISTILLED)
def test_others_leave_the_embedded_scale_alone(name):
    for guidance, evaluations in (
        (ICG(3.0) + EmbeddedGuidance(2.0), 2),
        (CADS() + EmbeddedGuidance(2.0), 1),
    ):
        with told(name) as seen:
            found = guided(guidance, name)
        assert torch.isfinite(found).all() and not torch.equal(found, plain(name))
        expected = in_its_form(name, [[2.0]] * FAMILIES[name].steps * evaluations)
        torch.testing.assert_close(torch.tensor(seen), expected)


def test_embedded_guidance_beside_true_cfg():
    name = "hunyuan-video"
    expected = final_latents(name, pipeline(name), W, guidance_scale=3.0)
    assert_close(guided(EmbeddedGuidance(3.0) + CFG(W), name, 2.5, guidance_scale=6.0), expected)


def test_embedded_guidance_needs_a_network_that_takes_a_scale():
    for name in ("sd15", "flux", "sdxl-turbo", "dit"):
        refused = pytest.raises(GuidanceError, match="this network takes none")
        with counted(pipeline(name)) as calls, refused:
            guided(EmbeddedGuidance(2.0), name, W)
        assert not calls
    with pytest.raises(GuidanceError, match="does not show the units"):
        guided(EmbeddedGuidance(2.0), "flux-distilled", guidance_scale=0.0)


# --- pipelines with a schedule of their own ------------------------------------------------------


def test_the_second_transformer_has_its_own_scale():
    name = "wan-two-transformers"
    expected = final_latents(name, pipeline(name), W, guidance_scale_2=2.0)
    assert torch.equal(guided(CFG(), name, W, guidance_scale_2=2.0), expected)
    seeing = Seeing()
    guided(seeing, name, W, guidance_scale_2=2.0)
    assert [step.guidance_scale for step in seeing.steps] == [4.0, 4.0, 2.0, 2.0]


def test_steps_that_the_pipeline_truncates():
    """Where it leaves out the unconditional branch, a strategy that does not need it goes on."""
    name = "lumina2"
    expected = final_latents(name, pipeline(name), W, cfg_trunc_ratio=0.5)
    guidance = CFG(PerStep([W, 1.0, 1.0]))
    assert torch.equal(guided(guidance, name, 2.5, cfg_trunc_ratio=0.5), expected)
    assert guidance.report().rows_per_step == [2, 1, 1]
    with pytest.raises(GuidanceError, match="leave out branches by an Interval"):
        guided(CFG(W), name, W, cfg_trunc_ratio=0.5)
    name = "z-image"
    expected = final_latents(name, pipeline(name), W, cfg_truncation=0.3)
    guidance = CFG()
    assert_close(guided(guidance, name, W, cfg_truncation=0.3), expected)
    assert guidance.report().rows_per_step == [2, 2, 1]


def test_the_strategys_schedule_is_the_one_that_counts():
    """CogVideoX's dynamic CFG is a schedule of the pipeline's scale."""
    assert torch.equal(guided(CFG(W), "cogvideox", W, use_dynamic_cfg=True), plain("cogvideox"))


def test_a_run_that_starts_in_the_middle_is_not_mistaken():
    """There time and its complement are the same, so that the network's direction is not known."""
    name = "lumina2"
    pipe = fresh(name)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    options = dict(sigmas=[0.5, 0.25], num_inference_steps=2)
    with CFG(W).attach(pipe), pytest.raises(GuidanceError, match="starts in the middle"):
        final_latents(name, pipe, W, **options)


# --- any other pipeline --------------------------------------------------------------------------


def made_of(name, family, **parts):
    """Another pipeline class, on the parts of a family."""
    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls.__init__).parameters
    parts = {**fresh(family).components, **parts, "requires_safety_checker": False}
    needed = [each.name for each in accepted.values() if each.default is each.empty]
    missing = dict.fromkeys(each for each in needed if each not in ("self", *parts))
    pipe = cls(**missing, **{key: part for key, part in parts.items() if key in accepted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, family, options, scale):
    """The latents at the end of a call with a family's arguments, and how many steps were made."""
    own, given = FAMILIES[family], inspect.signature(type(pipe).__call__).parameters
    options = {**own.options, **own.call((0,)), **options}
    options |= {"num_inference_steps": options.get("num_inference_steps", own.steps)}
    options |= {"generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    if own.scale_name:
        options[own.scale_name] = scale
    last, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: last.append(step(*a, **k)) or last[-1]
    try:
        pipe(**{key: value for key, value in options.items() if key in given})
    finally:
        pipe.scheduler.step = step
        drawn.steps = len(last)
    return last[-1][0]


SMALL, SMALL_MASK = PICTURE.resize((16, 16)), PICTURE.resize((16, 16)).convert("L")
INPAINT = {"height": 32, "width": 32, "mask_image": PICTURE.convert("L"), "strength": 0.99}
OTHERS = {
    "StableDiffusionInpaintPipeline": ("sd-img2img", INPAINT),  # of four channels
    "StableDiffusionControlNetImg2ImgPipeline": ("sd-controlnet", {"control_image": PICTURE}),
    "StableDiffusionControlNetPipeline": ("sd-controlnet", {"guess_mode": True}),
    "StableDiffusionXLControlNetInpaintPipeline": (
        "sdxl-controlnet",
        {"control_image": PICTURE, **INPAINT},
    ),
    "StableDiffusionXLPipeline": ("sdxl", {"denoising_end": 0.7, "num_inference_steps": 6}),
    "StableDiffusionXLImg2ImgPipeline": (
        "sdxl-img2img",
        {"denoising_start": 0.5, "num_inference_steps": 6},
    ),
    "StableDiffusion3Img2ImgPipeline": (
        "sd3",
        {"image": SMALL, "height": 16, "width": 16, "strength": 0.9},
    ),
    "FluxInpaintPipeline": ("flux-img2img", {"mask_image": SMALL_MASK, "strength": 0.99}),
    "ChromaImg2ImgPipeline": (
        "chroma",
        {"image": PICTURE.resize((16, 24)), "height": 24, "width": 16, "strength": 0.9},
    ),
    "AnimateDiffVideoToVideoPipeline": ("animatediff", {"video": [PICTURE] * 3}),
    "WanVideoToVideoPipeline": ("wan", {"latents": torch.zeros(1, 4, 2, 8, 8)}),
}
AUTOENCODED = ("StableDiffusion3Img2ImgPipeline", "ChromaImg2ImgPipeline")


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_go_through_the_same_detection(name):
    family, options = OTHERS[name]
    parts = {"vae": _plain_autoencoder(shift_factor=0.0)} if name in AUTOENCODED else {}
    pipe = made_of(name, family, **parts)
    expected = drawn(pipe, family, options, W)
    with CFG(W).attach(pipe) as guidance:
        assert torch.equal(drawn(pipe, family, options, 2.5), expected)
        assert guidance.report().rows_per_step == [2] * drawn.steps
    assert not torch.equal(drawn(pipe, family, options, 2.5), expected)


def pixels():
    """Diffusion of pixels, which its pipeline does not call latents."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(8, 3, 3, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    return made_of("DDPMPipeline", "sd15", unet=unet, scheduler=diffusers.DDPMScheduler())


def eight_channels():
    parts = fresh("sd-inpaint").components
    unet = {**parts["unet"].config, "in_channels": 8}
    return {"unet": diffusers.UNet2DConditionModel.from_config(unet).eval()}


# SD3's own skip-layer guidance, in all steps.
SKIPPING = {"skip_guidance_layers": [0]}
SKIPPING |= {"skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
UNKNOWN = {
    "[text, picture, none]": (
        lambda: made_of("StableDiffusionInstructPix2PixPipeline", "sd-inpaint", **eight_channels()),
        "sd-img2img",
        {},
        "3 rows for 1 samples",
    ),
    "[uncond, cond, perturbed]": (
        lambda: made_of("StableDiffusionPAGPipeline", "sd15"),
        "sd15",
        {"pag_scale": 3.0},
        "3 rows for 1 samples",
    ),
    "a second evaluation": (
        lambda: made_of("StableDiffusionSAGPipeline", "sd15"),
        "sd15",
        {"sag_scale": 0.75},
        "more than once per step",
    ),
    "a third evaluation": (lambda: fresh("sd3"), "sd3", SKIPPING, "more than once per step"),
    "no latents": (pixels, "sdxl-turbo", {}, "keeps no latents"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_verified_is_refused_before_the_first_step(name):
    make, family, options, match = UNKNOWN[name]
    pipe = make()
    drawn(pipe, family, options, W)
    with CFG(W).attach(pipe), pytest.raises(GuidanceError, match=match):
        drawn(pipe, family, options, W)
    assert drawn.steps == 0


def test_a_pipeline_without_a_denoiser_is_refused():
    """Some call it prior or decoder, and some have no scheduler."""

    class Prior(diffusers.DiffusionPipeline):
        def __init__(self, **parts):
            super().__init__()
            self.register_modules(**parts)

    parts = fresh("sd15").components
    for pipe in (
        Prior(prior=parts["unet"], scheduler=parts["scheduler"]),
        Prior(unet=parts["unet"]),
        Prior(unet=None, scheduler=parts["scheduler"]),
    ):
        with pytest.raises(GuidanceError, match="found Prior, expected a Diffusers pipeline with"):
            CFG(W).attach(pipe)


def test_two_guidances_of_one_call_are_refused_before_the_first_step():
    pipe = fresh("sd15")
    plain, first = drawn(pipe, "sd15", {}, W), APG(9.0).attach(pipe)
    callbacks = MultiPipelineCallbacks([first, CFG(W).attach(pipe)])
    with pytest.raises(GuidanceError, match=r"\(APG\(scale=9.0\) \+ CFG\(scale=4.0\)\).attach"):
        drawn(pipe, "sd15", {"callback_on_step_end": callbacks}, W)
    assert drawn.steps == 0
    del callbacks, first
    assert torch.equal(drawn(pipe, "sd15", {}, W), plain)


def test_several_views_in_one_step_are_refused_on_the_way():
    """Each of them is evaluated and stepped as a step would be, so their number gives them away."""
    pipe, views = made_of("StableDiffusionPanoramaPipeline", "sd15"), {"height": 8, "width": 1024}
    drawn(pipe, "sd15", views, W)
    assert drawn.steps > FAMILIES["sd15"].steps
    with CFG(W).attach(pipe), pytest.raises(GuidanceError, match="more than once per step"):
        drawn(pipe, "sd15", views, W)


def test_a_step_without_the_network_is_refused():
    """Whatever a pipeline evaluates instead, a run never goes on unguided."""
    pipe = fresh("sd15")
    scale = pipe.scheduler.scale_model_input

    def lose_the_hook(latents, t):
        vars(pipe.unet).pop("forward", None)
        return scale(latents, t)

    pipe.scheduler.scale_model_input = lose_the_hook
    refused = pytest.raises(GuidanceError, match="without a call of its UNet2DConditionModel")
    with CFG(W).attach(pipe), refused:
        drawn(pipe, "sd15", {}, W)
    assert drawn.steps == 0


# --- texts and pictures of the pipeline's own ----------------------------------------------------


class Telling(Seeing):
    """Reads other texts, and decodes its prediction."""

    name = "telling"

    def guide(self, step, state):
        self.told = self.ask(step)
        return super().guide(step, state)


def asked(pipe, name, question):
    telling = Telling()
    telling.ask = question
    with telling.attach(pipe):
        final_latents(name, pipe, W)
    return telling


def test_other_texts_are_told_apart_by_their_sizes():
    """Pipelines return the embeddings of a text in an order of their own."""
    pipe = fresh("hunyuan-video")
    text, pooled = torch.randn(1, 3, 8), torch.randn(1, 8)
    pipe.tokenizer = object()

    def encode_prompt(prompt, prompt_2, device=None):
        assert (prompt, prompt_2) == ("a star", None)
        return None, torch.ones(1, 8, dtype=torch.long), pooled, text

    def question(step):
        pipe.encode_prompt = encode_prompt  # the pipeline has encoded its own text by now
        return step.encode("a star")

    found = asked(pipe, "hunyuan-video", question).told
    assert torch.equal(found["encoder_hidden_states"], text)
    assert torch.equal(found["pooled_projections"], pooled) and len(found) == 2


def test_texts_cannot_take_the_place_of_masked_ones():
    pipe = fresh("pixart-sigma")
    pipe.tokenizer = object()
    short = FAMILIES["pixart-sigma"].call((0,))
    short["prompt_attention_mask"] = short["negative_prompt_attention_mask"]
    telling = Telling()
    telling.ask = lambda step: step.encode("a star")
    with telling.attach(pipe), pytest.raises(GuidanceError, match="masks its texts"):
        final_latents("pixart-sigma", pipe, W, **short)


def test_predictions_are_decoded_as_the_pipeline_does():
    """Qwen-Image has an autoencoder for video; Flux 2 normalises in a way of its own."""
    pipe = fresh("qwen-image-edit")
    telling = asked(pipe, "qwen-image-edit", lambda step: step.decode(step.cond.x0))
    x0 = telling.steps[-1].cond.x0
    with torch.no_grad():
        expected = pipe.vae.decode(x0[:, :, None]).sample[:, :, 0]  # mean 0, deviation 1
    torch.testing.assert_close(telling.told, (expected / 2 + 0.5).clamp(0, 1))
    with pytest.raises(GuidanceError, match="cannot decode single predictions"):
        asked(fresh("flux2-klein"), "flux2-klein", lambda step: step.decode(step.cond.x0))
