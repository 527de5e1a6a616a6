"""What else people do to a pipeline, while a guidance is attached to it or before."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import accelerate
import diffusers
import pytest
import torch
from compatibility import REFUSED, record
from diffusers import (
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from test_methods import FLOW_ONLY, acting
from tiny import latents_of, tiny_sd
from tiny_families import FAMILIES, _plain_autoencoder, final_latents, fresh

from guidancekit import (
    APG,
    CFG,
    ICG,
    NAG,
    NASA,
    PAG,
    SAG,
    SEG,
    TSG,
    CFGPlusPlus,
    FeedbackGuidance,
    GuidanceError,
    PerStep,
)
from guidancekit.registry import methods

W = 4.0


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def assert_untouched(pipe):
    """Nothing of an attachment is left on a pipeline's parts."""
    for part in (network_of(pipe), pipe.scheduler):
        assert not {"forward", "step", "set_timesteps"} & vars(part).keys()


def assert_cfg_is_the_pipelines(name, pipe, tolerance=0.0, **options):
    plain = final_latents(name, pipe, W, **options)
    with CFG(W).attach(pipe):
        found = final_latents(name, pipe, 2.5, **options)
    torch.testing.assert_close(found, plain, rtol=0, atol=tolerance)
    torch.testing.assert_close(final_latents(name, pipe, W, **options), plain, rtol=0, atol=0)


# --- what changes the network --------------------------------------------------------------------

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_lora(name):
    pipe = fresh(name)
    before = final_latents(name, pipe, W)
    with CFG(W).attach(pipe):
        network_of(pipe).add_adapter(LORA)  # also while it is attached
        found = final_latents(name, pipe, 2.5)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(found, final_latents(name, pipe, W))
    assert_cfg_is_the_pipelines(name, pipe)
    record("companion", "LoRA (peft)", "outcome")


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_fused_projections(name):
    pipe = fresh(name)
    with PAG(2.0).attach(pipe):
        apart = final_latents(name, pipe, W)
    network_of(pipe).fuse_qkv_projections()
    assert_cfg_is_the_pipelines(name, pipe)
    with PAG(2.0).attach(pipe):
        fused = final_latents(name, pipe, W)
    torch.testing.assert_close(fused, apart, rtol=0, atol=1e-4 * float(apart.abs().max()))
    record("companion", "fused QKV", "outcome")


@pytest.mark.parametrize("guidance", [PAG(2.0), SEG(2.0), SAG(), NAG(), NASA()], ids=repr)
def test_attention_slicing_hides_the_attention(guidance):
    pipe = tiny_sd()
    pipe.enable_attention_slicing(1)
    plain = latents_of(pipe, W)
    with CFG(W).attach(pipe):
        assert torch.equal(latents_of(pipe, 2.5), plain)
    with guidance.attach(pipe), pytest.raises(GuidanceError, match="attention slicing"):
        latents_of(pipe, W)
    assert torch.equal(latents_of(pipe, W), plain)
    record(
        "companion", "attention slicing", "outcome", "yes; refused for PAG, SAG, NAG and the like"
    )


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_layerwise_casting(name):
    pipe = fresh(name)
    network_of(pipe).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    assert_cfg_is_the_pipelines(name, pipe)
    record("companion", "layerwise casting", "outcome")


# --- what moves the weights ----------------------------------------------------------------------


def offload_models(pipe):
    """As on a GPU, where the weights would move; on a CPU only the hooks that do it are there."""
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe):
    """What `enable_sequential_cpu_offload` does: weights are there for one layer's call only."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(
                part, torch.device("cpu"), offload_buffers=bool(part._parameters)
            )


def offload_groups(pipe):
    """Diffusers' own, between the CPU and the CPU."""
    network_of(pipe).enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


OFFLOADS = {
    offload_models: ("enable_model_cpu_offload", "outcome", "yes, as far as a CPU shows it"),
    offload_layers: ("enable_sequential_cpu_offload", "outcome"),
    offload_groups: ("enable_group_offload", "outcome", "yes, as far as a CPU shows it"),
}


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading(offload, name):
    """Before `attach` and after it, over several calls: each ends with the hooks put on anew."""
    pipe = fresh(name)
    plain = final_latents(name, pipe, W)
    with APG(9.0).attach(pipe):
        guided = final_latents(name, pipe, W)
    for early in (True, False):
        pipe = fresh(name)
        if early:
            offload(pipe)
            assert torch.equal(final_latents(name, pipe, W), plain)
        with APG(9.0).attach(pipe) as guidance:
            if not early:
                offload(pipe)
            for _ in range(3):
                assert torch.equal(final_latents(name, pipe, W), guided)
                assert set(guidance.report().rows_per_step) == {2}
        network = network_of(pipe)
        on_meta = any(weight.is_meta for weight in network.parameters())
        assert on_meta == (offload is offload_layers), "it is still on"
        for _ in range(2):
            assert torch.equal(final_latents(name, pipe, W), plain)
        registry = vars(network).get("_diffusers_hook")
        assert registry is None or "guidancekit" not in registry.hooks
    if offload is not offload_groups:
        with APG(9.0).attach(pipe):
            pipe.remove_all_hooks()
            assert torch.equal(final_latents(name, pipe, W), guided)
        assert torch.equal(final_latents(name, pipe, W), plain)
    record("companion", *OFFLOADS[offload])


@pytest.mark.parametrize("early", [True, False])
def test_offloading_sees_every_evaluation(early, monkeypatch):
    """Something else may have taken the network's place in between, such as the autoencoder."""
    pipe, seen = fresh("sd15"), []
    hook = accelerate.hooks.CpuOffload
    before = hook.pre_forward

    def counted(self, module, *args, **kwargs):
        seen.append(module)
        return before(self, module, *args, **kwargs)

    monkeypatch.setattr(hook, "pre_forward", counted)
    guidance = CFG(W) + ICG(2.0)
    if early:
        offload_models(pipe)
    with guidance.attach(pipe):
        if not early:
            offload_models(pipe)
        for _ in range(2):
            seen.clear()
            final_latents("sd15", pipe, W)
            calls = sum(step.calls for step in guidance.report().steps)
            assert seen.count(pipe.unet) == calls == 2 * FAMILIES["sd15"].steps


@pytest.mark.parametrize("name", sorted({*methods()} - {*FLOW_ONLY, "embedded"}))
def test_every_method_works_on_weights_that_come_and_go(name):
    guidance, pipe = acting(name), tiny_sd()
    with guidance.attach(pipe):
        expected = latents_of(pipe, W)
    offload_layers(pipe)
    with guidance.attach(pipe):
        assert torch.equal(latents_of(pipe, W), expected)


# --- the autoencoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["enable_slicing", "enable_tiling"])
def test_autoencoders_that_work_piece_by_piece(how):
    """They serve the pipeline as ever, and guidance that looks at pictures."""
    pipe, pieces, seen = fresh("sd15"), [], []
    pipe.vae = _plain_autoencoder(sample_size=8)
    pipe.vae.decoder.register_forward_pre_hook(lambda _, given: pieces.append(given[0].shape))

    def draw(guidance=None, scale=W):
        pieces.clear(), seen.clear()
        with nullcontext() if guidance is None else guidance.attach(pipe):
            pictures = pipe(
                **FAMILIES["sd15"].call((0, 1)),
                num_inference_steps=3,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(i) for i in (0, 1)],
                output_type="pt",
            ).images
        return pictures, list(pieces), list(seen)

    def score(pictures, *_):
        seen.append(pictures)
        return pictures.flatten(1).mean(1)

    looking = FeedbackGuidance({"mean": score}, candidates=[2.0, W], high=1.0, decode=True)
    _, _, shown_whole = draw(looking)
    getattr(pipe.vae, how)()
    plain, decoded, _ = draw()
    assert len(decoded) > 1 and decoded[0] != (2, 4, 8, 8)
    assert torch.equal(draw(CFG(W), 2.5)[0], plain)
    _, decoded, shown = draw(looking)
    assert len(decoded) > len(shown) == len(shown_whole) > 0
    for one, other in zip(shown, shown_whole, strict=True):
        assert one.shape == other.shape
        if how == "enable_slicing":  # a tile's edges differ
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    record("companion", "VAE tiling and slicing", "outcome")


# --- compilation ---------------------------------------------------------------------------------


def compile_around(pipe, backend):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


def compile_in_place(pipe, backend):
    pipe.transformer.compile(backend=backend)


def compile_blocks(pipe, backend):
    pipe.transformer.compile_repeated_blocks(backend=backend)


@pytest.mark.parametrize("how", [compile_around, compile_in_place, compile_blocks])
def test_compiled_networks_are_not_compiled_again(how):
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    pipe = fresh("flux")
    expected = final_latents("flux", pipe, W)
    how(pipe, backend)
    assert torch.equal(final_latents("flux", pipe, W), expected)
    count = len(compiled)
    assert count
    with CFG(W).attach(pipe):
        assert torch.equal(final_latents("flux", pipe, 2.5), expected)
    for guidance in (APG(9.0), CFG(PerStep([1.0, W, 1.0]))):
        with guidance.attach(pipe):
            assert not torch.equal(final_latents("flux", pipe, W), expected)
    assert torch.equal(final_latents("flux", pipe, W), expected)
    assert len(compiled) == count
    record("companion", "torch.compile, compile_repeated_blocks", "outcome")


@pytest.mark.parametrize("how", [compile_around, compile_in_place, compile_blocks])
def test_networks_compiled_after_attach_are_guided(how):
    torch.compiler.reset()
    pipe, compiled = fresh("flux"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    plain = final_latents("flux", pipe, W)
    with APG(9.0).attach(pipe):
        guided = final_latents("flux", pipe, W)
        how(pipe, backend)
        assert torch.equal(final_latents("flux", pipe, W), guided) and compiled
        count = len(compiled)
        assert torch.equal(final_latents("flux", pipe, W), guided)
    assert torch.equal(final_latents("flux", pipe, W), plain)
    assert len(compiled) == count


@pytest.mark.parametrize("name", ["sd15", "ltx", "wan"])
def test_compiled_blocks_are_not_compiled_in_each_step(name):
    """Other numbers of rows than before may take a graph of their own, in the first two steps."""
    torch.compiler.reset()
    pipe, compiled, counts = fresh(name), [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def count(pipe, i, t, given):
        counts.append(len(compiled))
        return given

    guidances = [APG(9.0), CFG(PerStep([1.0, W, 1.0, W, 1.0, W]))]
    expected = []
    for guidance in guidances:
        with guidance.attach(pipe):
            expected.append(final_latents(name, pipe, W, num_inference_steps=6))
    network_of(pipe).compile_repeated_blocks(backend=backend)
    for guidance, latents in zip(guidances, expected, strict=True):
        counts.clear()
        with guidance.attach(pipe):
            found = final_latents(name, pipe, W, num_inference_steps=6, callback_on_step_end=count)
        size = float(latents.abs().max())
        torch.testing.assert_close(found / size, latents / size, atol=1e-5, rtol=0)
        assert counts[-1] == counts[1] and compiled


# --- caches --------------------------------------------------------------------------------------

FIRST_BLOCK = FirstBlockCacheConfig(threshold=2.0)  # of random weights, which change much


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_first_block_cache(name):
    pipe = fresh(name)
    exact = final_latents(name, pipe, W, num_inference_steps=8)
    network_of(pipe).enable_cache(FIRST_BLOCK)
    assert not torch.equal(final_latents(name, pipe, W, num_inference_steps=8), exact)
    assert_cfg_is_the_pipelines(name, pipe, num_inference_steps=8)
    record("companion", "FirstBlockCache", "outcome")


def test_each_kind_of_evaluation_has_a_cache_of_its_own():
    """A cache that never lets a block out of date changes nothing, whatever is evaluated."""
    pipe = fresh("flux")
    guidances = [APG(W) + TSG(2.0), CFG(PerStep([1.0, W, 1.0]))]
    exact = []
    for guidance in guidances:
        with guidance.attach(pipe):
            exact.append(final_latents("flux", pipe, W))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    for guidance, expected in zip(guidances, exact, strict=True):
        with guidance.attach(pipe):
            assert torch.equal(final_latents("flux", pipe, W), expected)


COUNTING = {
    "FasterCache": lambda pipe: FasterCacheConfig(
        tensor_format="BFCHW", current_timestep_callback=lambda: pipe.current_timestep
    ),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "MagCache": lambda pipe: diffusers.MagCacheConfig(mag_ratios=torch.ones(3)),
    "TaylorSeerCache": lambda pipe: diffusers.TaylorSeerCacheConfig(),  # not for CogVideoX
}


@pytest.mark.parametrize("name", COUNTING)
def test_caches_that_count_evaluations_are_refused(name):
    family = "flux" if name == "TaylorSeerCache" else "cogvideox"
    pipe = fresh(family)
    if not hasattr(diffusers, f"{name}Config"):  # of a later version
        return
    pipe.transformer.enable_cache(COUNTING[name](pipe))
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with CFG(W).attach(pipe), pytest.raises(GuidanceError, match=r"disable_cache\(\)"):
        final_latents(family, pipe, W)
    assert len(calls) == 1, "before the first evaluation"
    pipe.transformer.disable_cache()
    assert_cfg_is_the_pipelines(family, pipe)
    record("companion", ", ".join(COUNTING), "outcome", REFUSED)


# --- several pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "qwen-image", "wan", "z-image"])
def test_several_pictures_per_prompt_are_those_of_a_batch(name):
    """Z-Image repeats the lists of its texts, the others their tensors."""
    pipe, family = fresh(name), FAMILIES[name]
    count = f"num_{'videos' if 'num_frames' in family.options else 'images'}_per_prompt"
    options = {count: 2, "generator": [torch.Generator().manual_seed(i) for i in (5, 6)]}
    with APG(9.0).attach(pipe) as guidance:
        found = final_latents(name, pipe, W, (0, 0), **{**family.call((0,)), **options})
        assert set(guidance.report().rows_per_step) == {4}
        for i in (0, 1):
            alone = final_latents(name, pipe, W, generator=torch.Generator().manual_seed(5 + i))
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    record("companion", "several prompts, num_images_per_prompt", "outcome")


# --- copies, files, other parts ------------------------------------------------------------------


def test_a_copy_of_an_attached_pipeline_is_not_guided():
    pipe = fresh("sd15")
    plain = final_latents("sd15", pipe, W)
    with APG(9.0).attach(pipe) as guidance:
        guided = final_latents("sd15", pipe, W)
        shallow, deep = copy.copy(pipe), copy.deepcopy(pipe)
        assert torch.equal(final_latents("sd15", shallow, W), plain)
        assert torch.equal(final_latents("sd15", deep, W), plain)
        with torch.no_grad():  # it is a copy, with weights of its own
            deep.unet.conv_out.bias += 1
        moved = final_latents("sd15", deep, W)
        assert not torch.equal(moved, plain)
        assert torch.equal(final_latents("sd15", pipe, W), guided)
        with pytest.raises(GuidanceError, match="without being attached to this pipeline"):
            final_latents("sd15", deep, W, callback_on_step_end=guidance)
        with CFG(W).attach(deep):
            assert torch.equal(final_latents("sd15", deep, 2.5), moved)
            assert torch.equal(final_latents("sd15", pipe, W), guided), "still attached"
    assert torch.equal(final_latents("sd15", pipe, W), plain)
    assert torch.equal(final_latents("sd15", deep, W), moved)


def test_a_copy_of_an_attached_network_is_no_copy_of_the_pipeline(monkeypatch):
    pipe, copied = fresh("sd15"), []
    monkeypatch.setattr(type(pipe.vae), "__deepcopy__", lambda *_: copied.append(1), raising=False)
    with APG(9.0).attach(pipe):
        alone = copy.deepcopy(pipe.unet)
    given = torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 4, 16)
    with torch.no_grad():
        assert torch.equal(alone(*given).sample, pipe.unet(*given).sample)
    assert not copied


def test_an_attached_pipeline_can_be_saved(tmp_path):
    pipe = tiny_sd()
    plain = latents_of(pipe)
    with APG(9.0).attach(pipe):
        pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(again), plain)


def test_a_network_replaced_after_attach_is_the_one_that_is_guided():
    pipe, other = fresh("sd15"), fresh("sd21-v").unet
    old = pipe.unet
    with CFG(W).attach(pipe):
        final_latents("sd15", pipe, W)
        pipe.unet = other
        found = final_latents("sd15", pipe, 2.5)
        assert "forward" not in vars(old)
    assert torch.equal(found, final_latents("sd15", pipe, W))
    assert_untouched(pipe)


def test_a_pipeline_of_which_everything_was_replaced():
    """Then no run can be seen any more: the callback says so, or else the end of the block."""
    pipe, other = fresh("sd15"), fresh("sd21-v")
    guidance = CFG(W).attach(pipe)
    pipe.unet, pipe.scheduler = (
        other.unet,
        EulerDiscreteScheduler.from_config(pipe.scheduler.config),
    )
    with pytest.raises(GuidanceError, match="without being attached"):
        final_latents("sd15", pipe, W, callback_on_step_end=guidance)
    with guidance.attach(pipe):
        pipe.unet, pipe.scheduler = fresh("sd15").unet, other.scheduler
        with pytest.warns(UserWarning, match="were replaced after"):
            guidance.detach()
    assert_untouched(pipe)


def test_interrupted_runs():
    """Two steps of four, and the next run is whole."""
    pipe = fresh("flux")
    expected = final_latents("flux", pipe, W)

    def interrupt(pipe, i, t, given):
        pipe._interrupt = i == 1
        return given

    with CFG(W).attach(pipe) as guidance:
        final_latents("flux", pipe, W, callback_on_step_end=interrupt)
        assert guidance.report().rows_per_step == [2, 2]
        assert torch.equal(final_latents("flux", pipe, 2.5), expected)
        assert guidance.report().rows_per_step == [2, 2, 2]
    record("companion", "pipe.interrupt", "outcome")


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_corrections_of_the_latents_arrive_in_the_pipelines_packing(name):
    """CFG++ by hand: a step on the unconditional prediction, then the clean latents are moved."""
    pipe, plain = fresh(name), {}
    with CFGPlusPlus(0.0).attach(pipe):  # lambda 0: the unconditional pipeline
        found = final_latents(name, pipe, W)
    with CFG(0.0).attach(pipe):
        plain = final_latents(name, pipe, W)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-4)
