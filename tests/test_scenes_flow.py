"""The embedded flow model before it is trained: it learns from what the pipeline will feed it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

import samples.scenes.evaluate as evaluate
import samples.scenes.export as export
import samples.scenes.train as train
from guidancekit import CFG, NAG, CFGZeroStar, ManifoldProjectedCFG, bundled
from guidancekit.loading import load_pipeline
from guidancekit.recipe import Recipe
from samples.scenes.models import (
    TEXT_LENGTH,
    USUAL_ZEROS,
    AlignedFlowDenoiser,
    flow_denoiser,
    flow_scheduler,
    no_t5,
    tokenizer,
)
from samples.scenes.recogniser import load as load_recogniser
from samples.scenes.render import render_batch
from samples.scenes.training import _check_gradients
from samples.scenes.world import sample_scene

PROMPTS = ["a red star left of a blue ring", "", "a heart and a purple dotted shape"]


@pytest.fixture(scope="module")
def awake() -> AlignedFlowDenoiser:
    """A random one, in which nothing is zero that starts as zero in training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = flow_denoiser(len(tokenizer())).eval().requires_grad_(False)
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A folder with the latents of a few scenes, in place of the 80,000."""
    folder = tmp_path_factory.mktemp("flow")
    rng = np.random.default_rng(3)
    drawn = [sample_scene(rng) for _ in range(24)]
    pixels = train.to_tensor(render_batch(drawn, rng))
    with torch.no_grad():
        latents = bundled.load("scenes-unet").vae.encode(pixels).latents.half()
    torch.save((drawn, latents), folder / "latents.pt")
    return folder


@pytest.fixture
def few(monkeypatch):
    """Batches of a test's size, and the shipped autoencoder in place of a checkpoint."""
    monkeypatch.setattr(train, "CHECK_COUNT", 8)
    monkeypatch.setattr(train, "BATCH", 4)
    for module in (train, export):
        monkeypatch.setattr(module, "load_autoencoder", lambda _: bundled.load("scenes-unet").vae)


def export_flow(monkeypatch, checkpoints, target):
    argv = ["export", "flow", "--folder", str(checkpoints), "--bundled", str(target)]
    monkeypatch.setattr("sys.argv", argv)
    export.main()
    return target / "scenes-flow"


@pytest.fixture
def exported(awake, few, monkeypatch, tmp_path):
    """The folder of a random model."""
    torch.save({"averaged": awake.state_dict()}, tmp_path / "flow.pt")
    return export_flow(monkeypatch, tmp_path, tmp_path)


def draw(pipe, guidance_scale=4.0, **options):
    return pipe(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=TEXT_LENGTH,  # of zeros; the pipeline's 256 take thrice the time
        **options,
    ).images


# --- training feeds what the pipeline feeds -------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(awake):
    """The pipeline of `awake`, with diffusers' own attention."""
    words = tokenizer()
    network = copy.deepcopy(awake.transformer)
    network.set_attn_processor(JointAttnProcessor2_0())
    return StableDiffusion3Pipeline(
        vae=bundled.load("scenes-unet").vae,
        text_encoder=awake.text_encoder,
        tokenizer=words,
        text_encoder_2=awake.text_encoder_2,
        tokenizer_2=words,
        text_encoder_3=no_t5(len(words)).eval(),
        tokenizer_3=words,
        transformer=network,
        scheduler=flow_scheduler(),
    )


def encode(pipe, **options):
    """The pipeline's text features and pooled text of `PROMPTS`."""
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, **options
        )
    return text, pooled


def tokens():
    return tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids


def test_the_text_is_what_the_pipeline_encodes(awake, pipe):
    text, pooled = encode(pipe)
    found, found_pooled = awake.text_and_summary(tokens())
    assert torch.equal(found, text[:, : TEXT_LENGTH + 1])
    assert torch.equal(found_pooled, pooled)
    assert text.shape[1] == TEXT_LENGTH + USUAL_ZEROS
    assert not text[:, TEXT_LENGTH:].any()


@pytest.mark.parametrize("zeros", [None, 20, 60])
def test_one_token_stands_for_all_zeros(awake, pipe, zeros):
    """The same as diffusers' pass over every one of them; None is the pipeline's default."""
    generator = torch.Generator().manual_seed(0)
    x, times = torch.randn(3, 8, 16, 16, generator=generator), torch.tensor([1000.0, 400.0, 1.0])
    text, pooled = encode(pipe, **({} if zeros is None else {"max_sequence_length": zeros}))
    with torch.no_grad():
        expected = pipe.transformer(x, text, pooled, times).sample
        counts = None if zeros is None else torch.full((3,), float(zeros))
        found = awake(x, times, tokens(), counts)
        other = awake(x, times, tokens(), torch.full((3,), 40.0))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (other - expected).abs().max() > 1e-3, "their number matters to a random model"


def test_the_number_of_zeros_is_drawn_in_training(awake):
    model = copy.deepcopy(awake).train()
    x, times = torch.zeros(1, 8, 16, 16), torch.tensor([400.0])
    first, second = (model(x, times, tokens()[:1]) for _ in range(2))
    assert not torch.equal(first, second)


# --- the objective --------------------------------------------------------------------------------


@pytest.fixture
def data(pool, few):
    return train.AlignedFlowDenoising(pool, "cpu", tokenizer())


def test_the_answer_is_what_the_scheduler_integrates(data):
    """One step of diffusers' Euler from any sigma to 0 along the answer ends at the picture."""
    batch = data.draw(np.random.default_rng(0), 6)
    answer = data.answer(batch)
    for i, time in enumerate(batch.times):
        scheduler = flow_scheduler()
        scheduler.set_timesteps(sigmas=[float(time) / 1000])
        torch.testing.assert_close(scheduler.timesteps, time[None])
        end = scheduler.step(answer[i], scheduler.timesteps[0], batch.latents[i]).prev_sample
        torch.testing.assert_close(end, batch.clean[i], atol=1e-5, rtol=1e-5)


def test_the_middle_learns_what_the_recogniser_sees(data, awake):
    """What it says of a patch is held against the features there, each of unit deviation."""
    batch = data.draw(np.random.default_rng(0), 4)
    picture = data.decoder(batch.clean)
    features = load_recogniser().layers[:5](picture)
    deviation, mean = data.usual
    seen = (features.flatten(2).transpose(1, 2) - mean) / deviation
    assert seen.shape == (4, 64, 96)

    class Knowing(nn.Module):
        transformer, projector = awake.transformer, nn.Module()

        def forward(self, *given):
            return awake(*given)

        def middle(self):
            return awake.middle()

    with torch.no_grad():
        model = Knowing()
        for answer, unlike in ((seen, 0.0), (-3 * seen, 1.0)):
            model.projector.forward = lambda hidden, answer=answer: answer
            found = data.errors(model, batch)
            assert float(found["unlike"]) == pytest.approx(unlike, abs=1e-5)
        plain = torch.nn.functional.mse_loss(awake(*batch[:3]), data.answer(batch))
        torch.testing.assert_close(found["velocity"], plain)
        with awake.middle() as hidden:
            awake(*batch[:3])
    assert [each.shape for each in hidden] == [(4, 64, 160)]
    awake(*batch[:3])
    assert len(hidden) == 1  # nothing is watched any more


def test_every_part_of_the_way_is_seen(data):
    """The middle most, and the first step of thirty not just once in 4000 samples."""
    torch.manual_seed(0)
    sigma = data.times(50_000) / 1000
    assert sigma.min() >= 0 and sigma.max() <= 1
    middle = ((sigma > 0.25) & (sigma < 0.75)).float().mean()
    logit_normal = 2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(3.0).log()) - 1
    torch.testing.assert_close(middle, 0.8 * logit_normal + 0.2 * 0.5, atol=0.01, rtol=0)
    assert (sigma > 29 / 30).float().mean() > 1 / 200


def test_every_weight_learns(data):
    """Also behind what starts at zero, once that has moved; what reaches nothing is frozen."""
    torch.manual_seed(0)
    model = flow_denoiser(len(tokenizer())).train()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {
        f"transformer.transformer_blocks.5.attn.{name}"
        for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    }
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        batch = data.draw(np.random.default_rng(0), 2)
        optimiser.zero_grad()
        sum(data.errors(model, batch).values()).backward()
        optimiser.step()
    _check_gradients(model)


# --- from a run to a folder -----------------------------------------------------------------------


def test_trained_resumed_exported_and_loaded(pool, few, monkeypatch, tmp_path, capsys):
    def run(seconds):
        argv = ["flow", "--minutes", str(seconds / 60), "--folder", str(pool), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["train", *argv])
        train.main()
        return capsys.readouterr().out

    assert "fresh velocity" in run(0.5)
    assert "resumed at step" in run(1.0)
    folder = export_flow(monkeypatch, pool, tmp_path)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 14.5e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    assert pipe(PROMPTS[0], num_inference_steps=2).images[0].size == (64, 64)
    kept = torch.load(pool / "flow.pt", weights_only=False)["averaged"]
    for part in ("text_encoder", "text_encoder_2", "transformer"):
        for name, value in getattr(pipe, part).state_dict().items():
            assert torch.equal(value, kept[f"{part}.{name}"].half().float()), name


def test_an_ordinary_pipeline(exported):
    """By any loader, in any dtype, the third encoder left out or not."""
    pipe = load_pipeline(Recipe(prompt="-", model=str(exported)))
    assert type(pipe) is StableDiffusion3Pipeline
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    plain = draw(pipe)
    pipe.text_encoder_3 = None
    assert torch.equal(draw(pipe), plain)
    half = StableDiffusion3Pipeline.from_pretrained(exported, torch_dtype=torch.bfloat16)
    assert torch.isfinite(draw(half)).all()


def test_guidance(exported):
    pipe = load_pipeline(Recipe(prompt="-", model=str(exported)))
    plain = draw(pipe, 6.0)
    with CFG(6.0).attach(pipe):
        torch.testing.assert_close(draw(pipe, 2.0), plain, atol=2e-4, rtol=1e-3)
    for guidance in (
        CFGZeroStar(6.0),
        ManifoldProjectedCFG(6.0),
        NAG(4.0, negative_prompt="a green ring"),
    ):
        with guidance.attach(pipe):
            guided = draw(pipe, 6.0)
        assert torch.isfinite(guided).all()
        assert (guided - plain).abs().max() > 1e-3, guidance
        assert torch.equal(draw(pipe, 6.0), plain)


def test_evaluated_by_folder(exported, monkeypatch, tmp_path):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(evaluate, "autoencoder_psnr", lambda _: 0.0)
    argv = ["--model", str(exported), "--count", "2", "--scales", "3", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["evaluate", *argv, "--json", str(out), "--device", "cpu"])
    evaluate.main()
    captions = json.loads(out.read_text())["captions"]
    assert {kind: list(scales) for kind, scales in captions.items()} == {
        "one object": ["3"],
        "two objects": ["3"],
    }
