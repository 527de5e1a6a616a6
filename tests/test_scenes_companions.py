"""The embedded models' companions: every method runs out of the box, and they are what they say."""

from __future__ import annotations

import json
import math
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import TEXT_WIDTH, latents_of, sd3_prompt, tiny_sd3
from torch import Tensor

import samples.scenes.companions as training
import samples.scenes.train
from guidancekit import (
    CFG,
    GFCG,
    AnnealingGuidance,
    AutoGuidance,
    FeedbackGuidance,
    Guidance,
    GuidanceError,
    InternalGuidance,
    InternalHead,
    Interval,
    LinearAG,
    bundled,
    parse,
)
from guidancekit.cli import main
from guidancekit.compare import make_columns
from guidancekit.engine.run import denoiser
from guidancekit.methods.autoguidance import load_denoiser
from guidancekit.methods.linear_ag import estimate
from guidancekit.registry import create, methods, schedules
from guidancekit.scoring import LatentScorer
from samples.scenes.models import scheduler
from samples.scenes.render import render_batch
from samples.scenes.world import BACKGROUNDS, Scene, Thing, caption, sample_scene

PROMPT = "a red star left of a blue ring"
STEPS = 10  # one of the numbers that LinearAG has a table for
# "embedded" is for distilled models that take the scale as an input, "nasa" for cross-attention.
FOR_OTHER_MODELS = {
    "scenes-unet": {"embedded", "rectified-cfg++"},
    "scenes-flow": {"embedded", "nasa"},
}
NEED_COMPANIONS = (
    AnnealingGuidance,
    AutoGuidance,
    FeedbackGuidance,
    GFCG,
    InternalGuidance,
    LinearAG,
)


@pytest.fixture(scope="module", params=bundled.MODELS)
def model(request):
    """The name of an embedded model."""
    return request.param


@pytest.fixture(scope="module")
def family(model):
    return bundled.family(model)


@pytest.fixture(scope="module")
def scenes(model):
    pipe = bundled.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class World(NamedTuple):
    """Fresh scenes: their clean latents [64, 8, 16, 16] and what a network is told of them."""

    latents: Tensor
    conditions: dict[str, Tensor]

    def noisy(self, pipe):
        """Latents at times spread over the run, the times, and what a network should answer."""
        noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(1))
        times = torch.linspace(20, 980, len(noise)).long()
        if hasattr(pipe, "transformer"):
            sigma = (times / 1000).view(-1, 1, 1, 1)
            return (1 - sigma) * self.latents + sigma * noise, times, noise - self.latents
        signal = scheduler().alphas_cumprod[times].view(-1, 1, 1, 1)
        return signal.sqrt() * self.latents + (1 - signal).sqrt() * noise, times, noise


@pytest.fixture(scope="module")
def world(scenes):
    rng = np.random.default_rng(11)
    drawn = [sample_scene(rng) for _ in range(64)]
    captions = [caption(scene, rng) for scene in drawn]
    pixels = samples.scenes.train.to_tensor(render_batch(drawn, rng))
    with torch.no_grad():
        return World(scenes.vae.encode(pixels).latents, conditions(scenes, captions))


@torch.no_grad()
def conditions(pipe, prompts):
    """What a denoiser is given of prompts."""
    if hasattr(pipe, "transformer"):
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **bundled.CALL["scenes-flow"]
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}
    return {"encoder_hidden_states": pipe.encode_prompt(prompts, pipe.device, 1, False)[0]}


def text_of(pipe, prompts):
    return conditions(pipe, prompts)["encoder_hidden_states"]


def draw(pipe, guidance=None, steps=STEPS, **options):
    call = bundled.CALL["scenes-flow"] if hasattr(pipe, "transformer") else {}

    def run():
        return latents_of(pipe, 4.0, steps=steps, **{"prompt": PROMPT, **call, **options})

    if guidance is None:
        return run()
    with guidance.attach(pipe):
        return run()


# --- everything runs out of the box ---------------------------------------------------------------


@pytest.mark.parametrize("model", bundled.MODELS)
def test_compare_all_runs_every_method(model, tmp_path, capsys):
    out, others = tmp_path / "all.png", FOR_OTHER_MODELS[model]
    options = ["--methods", "all", "--model", model, "--steps", str(STEPS), "--out", str(out)]
    assert main(["compare", PROMPT, *options]) == 0
    table = json.loads(out.with_suffix(".json").read_text())
    assert [column["method"] for column in table["columns"]] == list(methods())
    left_out = {column["method"] for column in table["columns"] if column["left_out"]}
    assert left_out == others
    shown = {table["columns"][picture["column"]]["method"] for picture in table["pictures"]}
    assert shown == set(methods()) - others
    assert all(not picture["warnings"] for picture in table["pictures"])
    Image.open(out).load()
    assert capsys.readouterr().err.count("left out") == len(others)


@pytest.mark.parametrize("cls", NEED_COMPANIONS, ids=lambda cls: cls.name)
def test_the_preset_works_and_comes_off(cls, scenes, family):
    guidance, plain = cls.preset(family), draw(scenes)
    guided = draw(scenes, guidance)
    assert torch.isfinite(guided).all()
    assert (guided - plain).abs().max() > 1e-3
    assert torch.equal(draw(scenes), plain)
    assert torch.equal(draw(scenes, parse(repr(guidance))), guided)


@pytest.mark.parametrize("cls", NEED_COMPANIONS, ids=lambda cls: cls.name)
def test_the_preset_is_portable(cls, family, tmp_path):
    """It names its companion, without a path of this machine."""
    guidance = cls.preset(family)
    assert str(tmp_path.anchor) not in repr(guidance)
    guidance.save_config(tmp_path)
    assert Guidance.from_config(cls.load_config(tmp_path)) == guidance
    assert pickle.loads(pickle.dumps(guidance)) == guidance


@pytest.mark.parametrize("cls", NEED_COMPANIONS, ids=lambda cls: cls.name)
def test_without_a_companion_the_error_names_the_preset(cls, scenes):
    with pytest.raises(GuidanceError, match=rf'{cls.__name__}\.preset\("scenes"\)'):
        draw(scenes, cls())


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (AutoGuidance, "cannot be called like the pipeline's"),
        (InternalGuidance, "found 16 features, expected 128"),
        (FeedbackGuidance, "made for another model"),
        (GFCG, "made for another model"),
    ],
)
def test_on_a_model_of_another_shape_the_companion_is_refused(cls, message, sd):
    with pytest.raises(GuidanceError, match=message):
        draw(sd, cls.preset("scenes"))


def test_the_folder_is_small_and_has_no_stray_files(model, family):
    folder = bundled.path(model).with_name(f"{model}-companions")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    found = [path for name, path in bundled.COMPANIONS.items() if name.startswith(f"{family}:")]
    assert len(found) == 5 and all(path.exists() and path.parent == folder for path in found)


# --- presets of the model's family ----------------------------------------------------------------


def test_what_is_left_open_comes_from_the_preset():
    assert create("autoguidance", "scenes") == AutoGuidance.preset("scenes")
    assert parse("autoguidance(3)", "scenes") == AutoGuidance(3, "scenes:weak")
    assert parse("AutoGuidance(network='mine')", "scenes") == AutoGuidance(network="mine")
    assert parse("cfg(5) + internal", "scenes") == CFG(5) + InternalGuidance.preset("scenes")
    bounds = Interval.presets["scenes"].values
    assert create("interval", "scenes", scale=8) == CFG(Interval(8, **bounds))
    assert create("interval", "scenes") == CFG.preset("scenes-interval")
    for name in ("apg", "cfg"):
        assert create(name, "scenes") == create(name)
    for name in ("autoguidance", "internal"):
        assert create(name, "another family") == create(name) == create(name, None)


def test_families_are_those_of_all_models():
    assert bundled.family("scenes-unet") == "scenes" == bundled.family("scenes-unet", "scenes-unet")
    assert bundled.family("scenes-flow") == "scenes-flow"
    assert bundled.family("scenes-unet", "scenes-flow") is None
    assert bundled.family("a/b") is None and bundled.family("scenes-unet", "a/b") is None


def test_columns_take_the_presets():
    columns = {c.method: c.guidance for c in make_columns(["all", "interval"], family="scenes")}
    assert set(columns) == {*methods(), "interval"}
    assert columns["autoguidance"] == "AutoGuidance(network='scenes:weak')"
    assert columns["interval"] == repr(CFG.preset("scenes-interval"))
    without = {c.method: c.guidance for c in make_columns(["all"])}
    assert without["autoguidance"] == "AutoGuidance()"


def test_every_preset_of_a_family_names_what_exists(family):
    for cls in (*methods().values(), *schedules().values()):
        preset = cls.presets.get(family)
        for value in preset.values.values() if preset else ():
            if isinstance(value, str):
                assert bundled.locate(value) != value


def test_generate_takes_the_preset_unless_told_otherwise(tmp_path, tiny_folder, capsys):
    options = ["--steps", "2", "--out", str(tmp_path)]
    assert main(["generate", PROMPT, "--method", "autoguidance", *options]) == 0
    assert main(["generate", PROMPT, "--method", "autoguidance(3)", *options]) == 0
    edm = ["--method", "autoguidance", "--preset", "edm2-s"]
    assert main(["generate", PROMPT, *edm, *options]) == 2
    other = ["--method", "autoguidance", "--model", tiny_folder]
    assert main(["generate", PROMPT, *other, *options]) == 2
    assert capsys.readouterr().err.count("needs a weaker network") == 2


def test_a_picture_of_a_companion_can_be_made_again(tmp_path, capsys):
    options = ["--steps", "2", "--out", str(tmp_path)]
    assert main(["generate", PROMPT, "--method", "autoguidance", *options]) == 0
    first = capsys.readouterr().out.strip()
    assert main(["generate", "--from", first, "--out", str(tmp_path / "again")]) == 0
    again = capsys.readouterr().out.strip()
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


def test_names_of_companions():
    assert bundled.locate("scenes:weak") == str(bundled.COMPANIONS["scenes:weak"])
    for text in ("a/folder", "C:/weak", "file.json"):
        assert bundled.locate(text) == text
    with pytest.raises(GuidanceError, match=r"no companion 'scenes:week'.*scenes:weak"):
        bundled.locate("scenes:week")
    for make in (AutoGuidance.preset, InternalGuidance.preset):
        assert make("scenes", scale=1.5).scale == 1.5


@pytest.mark.parametrize("text", ["my/cfg-mp/linear-ag.json", 'a "cfg++" here', "it's linear-ag"])
def test_method_names_inside_of_texts_stay(text):
    guidance = AutoGuidance(network=text)
    assert parse(repr(guidance)) == guidance
    assert parse(f"cfg++(0.5) + {guidance!r}").terms[1] == guidance


# --- the companions are what they say -------------------------------------------------------------


def errors(answer, scenes, world):
    """Mean squared error of the model's answers, of other ones, and of the answer zero."""
    noisy, times, truth = world.noisy(scenes)
    with torch.no_grad():
        found = [
            each(noisy, timestep=times, **world.conditions)
            for each in (lambda *args, **given: denoiser(scenes)(*args, **given).sample, answer)
        ]
    return [float((each - truth).square().mean()) for each in (*found, torch.zeros(()))]


def test_the_weak_network_is_weaker_and_better_than_nothing(scenes, world, family):
    weak = load_denoiser(f"{family}:weak", torch.float32)
    main_error, weak_error, nothing = errors(
        lambda *args, **given: weak(*args, **given).sample, scenes, world
    )
    assert main_error < weak_error < nothing
    parameters = [sum(p.numel() for p in net.parameters()) for net in (weak, denoiser(scenes))]
    assert parameters[0] < parameters[1] / 3


def test_the_head_is_weaker_and_better_than_nothing(scenes, world, family):
    head = InternalHead.from_pretrained(bundled.locate(f"{family}:head"))

    def early(noisy, timestep, **given):
        with head.early(denoiser(scenes)) as hidden:
            denoiser(scenes)(noisy, timestep=timestep, **given)
        return head(hidden[0], timestep, noisy.shape[-2:])

    main_error, head_error, nothing = errors(early, scenes, world)
    assert main_error < head_error < nothing


def test_the_scorer_prefers_what_the_caption_says(scenes, world, family):
    latents, text = world.latents, world.conditions["encoder_hidden_states"]
    scorer = LatentScorer.load(f"{family}:scorer")
    own = scorer(latents, text)
    others = torch.stack([scorer(latents, text.roll(k, 0)) for k in (1, 2, 3)])
    assert (own > others).float().mean() > 0.8
    empty = scorer(latents, text_of(scenes, [""]))
    assert empty.abs().mean() < 0.25 * own.abs().mean()


def test_the_scorer_tells_one_wrong_background(scenes, family):
    rng = np.random.default_rng(5)
    thing = (Thing("star", "red", "large", "plain"),)
    names = list(BACKGROUNDS)
    drawn = [Scene(thing, None, name) for name in names]
    pixels = samples.scenes.train.to_tensor(render_batch(drawn, rng))
    with torch.no_grad():
        latents = scenes.vae.encode(pixels).latents
    text = text_of(scenes, [f"a star on a {name} background" for name in names])
    scorer = LatentScorer.load(f"{family}:scorer")
    scores = torch.stack([scorer(latents, each[None]) for each in text], dim=1)
    right = scores.argmax(1) == torch.arange(len(names))
    assert right.float().mean() > 0.6


def test_the_annealing_network_gives_scales_of_order_one(family):
    network = AnnealingGuidance.preset(family).network()
    times, sizes = (torch.linspace(1, 981, 9), torch.linspace(0.1, 4, 9).view(-1, 1, 1, 1))
    scales = torch.cat([network(float(t), sizes, each) for t in times for each in (0.0, 0.4, 1.0)])
    assert scales.min() > 0 and scales.max() < 5
    assert scales.std() > 1e-3  # it has learned something
    with safe_open(bundled.locate(f"{family}:annealing"), "pt") as file:
        assert int(file.metadata()["steps"]) == 30 and int(file.metadata()["pictures"]) > 100


def test_linear_ag_estimates_better_than_the_last_prediction(scenes, family):
    guidance = LinearAG.preset(family)
    assert set(guidance.tables) == {10, 20, 30, 50}
    seen = []

    class Recorder(CFG):
        def guide(self, step, state):
            seen.append((step.cond.out, step.uncond.out))
            return super().guide(step, state)

    draw(scenes, Recorder(4.0), steps=30, prompt="a large green heart")
    ratios = []
    for k, row in enumerate(guidance.tables[30]):
        if row:
            cond, uncond = zip(*seen[: k + 1], strict=True)
            found = estimate(row, list(cond), list(uncond[:-1]))
            ratios.append(float((found - uncond[k]).norm() / (uncond[k - 1] - uncond[k]).norm()))
    assert len(ratios) == 7 and math.prod(ratios) ** (1 / 7) < 0.8


# --- LatentScorer ---------------------------------------------------------------------------------


def make_scorer(channels=4, text_width=TEXT_WIDTH, values=(3, 2), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = LatentScorer(values, channels, text_width).eval().requires_grad_(False)
        scorer.prior.copy_(torch.tensor([0.5, 0.3, 0.2, 0.25, 0.75]))
        for part in (scorer.latents[-1], scorer.text[-1]):
            part.weight.mul_(20)  # opinions
    return scorer


def random_inputs(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    return latents, torch.randn(count, 5, TEXT_WIDTH, generator=generator)


def test_the_score_is_its_formula():
    scorer, (latents, text) = make_scorer(), random_inputs()
    q = [each.softmax(1).tolist() for each in scorer.logits(latents)]
    p = [each.softmax(1).tolist() for each in scorer.logits(text=text)]
    priors = [[0.5, 0.3, 0.2], [0.25, 0.75]]
    expected = [
        sum(
            math.log(sum(p[a][i][k] * q[a][i][k] / priors[a][k] for k in range(len(priors[a]))))
            for a in range(2)
        )
        for i in range(3)
    ]
    assert scorer(latents, text).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    one = torch.cat([scorer(latents[i : i + 1], text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scorer(latents, text), one)
    torch.testing.assert_close(
        scorer(latents, text[:1]), scorer(latents, text[:1].expand(3, -1, -1))
    )


def test_a_text_that_leaves_all_open_scores_nothing():
    scorer, (latents, text) = make_scorer(), random_inputs()
    scorer.text[-1].weight.zero_()
    scorer.text[-1].bias.copy_(scorer.prior.log())
    torch.testing.assert_close(scorer(latents, text), torch.zeros(3), atol=1e-5, rtol=0)


def test_tokens_of_zeros_say_nothing():
    """Stable Diffusion 3 has hundreds of them where there is no third encoder."""
    scorer, (latents, text) = make_scorer(), random_inputs()
    padded = torch.nn.functional.pad(text, (0, 0, 0, 300))
    torch.testing.assert_close(scorer(latents, padded), scorer(latents, text))
    assert torch.isfinite(scorer(latents, torch.zeros_like(text))).all()


def test_scorers_are_saved_and_read(tmp_path):
    scorer, (latents, text) = make_scorer(), random_inputs()
    scorer.save_pretrained(tmp_path / "scorer")
    again = LatentScorer.load(str(tmp_path / "scorer"))
    assert torch.equal(again(latents, text), scorer(latents, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda latents, text: (latents[:, :3], text), r"latents \[3, 3, 8, 8\], expected 4"),
        (lambda latents, text: (latents[0], text), r"latents \[4, 8, 8\]"),
        (lambda latents, text: (latents, text[..., :2]), r"text embeddings \[3, 5, 2\]"),
        (lambda latents, text: (latents, text[:2]), "3 latents and 2 texts"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    with pytest.raises(GuidanceError, match=message):
        make_scorer()(*change(*random_inputs()))


def test_folders_without_a_scorer_are_refused(tmp_path):
    with pytest.raises(GuidanceError, match="no folder of a saved LatentScorer"):
        LatentScorer.load(str(tmp_path / "nothing"))
    with pytest.raises(GuidanceError, match=r"LatentScorer\.load"):
        LatentScorer.load(str(tmp_path))


def test_feedback_holds_latents_against_the_prompt(sd):
    scorer = make_scorer()
    text = text_of(sd, ["a red star"])
    by_hand = {"fit": lambda x, *_: scorer(x, text)}
    candidates = [1.0, 3.0, 9.0]
    expected = draw(sd, FeedbackGuidance(by_hand, candidates=candidates), prompt="a red star")
    found = draw(sd, FeedbackGuidance({"fit": scorer}, candidates=candidates), prompt="a red star")
    assert torch.equal(found, expected)
    other = draw(sd, FeedbackGuidance({"fit": scorer}, candidates=candidates), prompt="a moon")
    assert not torch.equal(found, other)


def test_a_scorer_judges_latents_not_images(sd):
    with pytest.raises(GuidanceError, match="made for another model"):
        draw(sd, FeedbackGuidance({"fit": make_scorer()}, decode=True))


def test_a_scorer_needs_text(sd):
    with pytest.raises(GuidanceError, match="conditioned on class_labels"):
        make_scorer().about({"class_labels": torch.zeros(1)})
    with pytest.raises(GuidanceError, match="references="):
        draw(sd, GFCG(make_scorer()))
    with pytest.raises(GuidanceError, match="made for another model"):
        pipe, guidance = tiny_sd3(), FeedbackGuidance({"fit": make_scorer(text_width=3)})
        with guidance.attach(pipe):
            pipe(**sd3_prompt(), num_inference_steps=4, guidance_scale=4.0, height=32, width=32)


def test_gfcg_holds_the_prompt_against_the_references(sd):
    """The same as a classifier whose class 0 is the prompt."""
    scorer, references = make_scorer(), ["a moon", "a blue ring", "a heart"]
    texts = [text_of(sd, [each]) for each in ("a red star", *references)]

    def classifier(x0):
        return torch.stack([scorer(x0, text) for text in texts], dim=1)

    by_hand = GFCG(classifier, target=0, references=["a red star", *references], high=1.0)
    found = GFCG(scorer, references=references, high=1.0)
    expected = draw(sd, by_hand, prompt="a red star")
    torch.testing.assert_close(draw(sd, found, prompt="a red star"), expected)
    with_itself = GFCG(scorer, references=["a red star", *references], high=1.0)
    torch.testing.assert_close(draw(sd, with_itself, prompt="a red star"), expected)


# --- their training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(scenes, tmp_path_factory):
    """A folder with the latents of a few scenes, in place of the 80,000."""
    folder = tmp_path_factory.mktemp("companions")
    rng = np.random.default_rng(3)
    drawn = [sample_scene(rng) for _ in range(40)]
    with torch.no_grad():
        pixels = samples.scenes.train.to_tensor(render_batch(drawn, rng))
        latents = scenes.vae.encode(pixels).latents.half()
    torch.save((drawn, latents), folder / "latents.pt")
    return folder


def test_every_companion_is_trained_resumed_and_exported(
    model, pool, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(samples.scenes.train, "CHECK_COUNT", 8)
    monkeypatch.setattr(samples.scenes.train, "BATCH", 4)
    monkeypatch.setattr(training, "TABLES", (4, 6))
    monkeypatch.setattr(training, "PROMPTS", 2)
    monkeypatch.setattr(training, "STEPS", 4)

    def run(what, seconds):
        argv = [what, "--model", model, "--minutes", str(seconds / 60), "--folder", str(pool)]
        argv += ["--device", "cpu", "--target", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["companions", *argv])
        training.main()
        return capsys.readouterr().out

    for what in ("weak", "head", "scorer"):
        run(what, 0.5)
        assert "resumed at step" in run(what, 1.0)
    assert "pictures=" in run("annealing", 0.5)
    assert "runs=4, of=4" in run("linear-ag", 60)
    assert "MB" in run("export", 1)

    guidances = [
        AutoGuidance(network=str(tmp_path / "weak")),
        InternalGuidance(head=str(tmp_path / "head")),
        FeedbackGuidance(str(tmp_path / "scorer")),
        AnnealingGuidance(str(tmp_path / "annealing.safetensors")),
        LinearAG(None, str(tmp_path / "linear-ag.json")),
    ]
    pipe = training.MODELS[model].load("cpu")
    for guidance in guidances:
        assert torch.isfinite(draw(pipe, guidance, steps=4)).all()


def test_attributes_are_numbered_within_their_values():
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng) for _ in range(200)]
    answers, values = training.attributes(drawn), torch.tensor(training.values())
    assert answers.shape == (200, len(values))
    assert (answers >= 0).all() and (answers < values).all()
    assert (answers.amax(0) == values - 1).all()  # every last value occurs, absence too
    scene = Scene((Thing("ring", "blue", "large", "plain"),), None, "navy")
    present = training.attributes([scene])[0, -18:]
    assert present.sum() == 2  # a ring, and something blue
