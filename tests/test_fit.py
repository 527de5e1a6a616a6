"""`guidancekit fit`: what is fitted is right, an interrupted fit goes on, bad input is named."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from mixture import scheduler
from PIL import Image
from tiny import latents_of, tiny_sd

import guidancekit.fitting
from guidancekit import AnnealingGuidance, GuidanceError, LinearAG
from guidancekit.annealing import AnnealingTrainer, fit_annealing_file
from guidancekit.cli import main
from guidancekit.fitting import Products, fit_linear_ag, fit_linear_ag_file
from guidancekit.pictures import FolderPictures, OwnPictures
from guidancekit.recipe import Recipe, save_picture

STEPS = 8
BASE = Recipe(prompt="-", model="tiny", steps=STEPS, guidance_scale=4.0)
PROMPTS = ["a red star", "a moon", "a blue ring"]


# --- LinearAG on a network whose regression is known ----------------------------------------------


class LinearUNet(ModelMixin, ConfigMixin):
    """Random predictions, but for two unconditional ones, which are linear in what went before.

    u_1 = 0.25 + 0.5 c_0 - 0.125 c_1 + 0.75 u_0 and u_3 = 0.5 c_3 + 0.75 u_2.
    """

    @register_to_config
    def __init__(self):
        super().__init__()
        self.register_to_config(in_channels=4, sample_size=4, time_cond_proj_dim=None)
        self.register_buffer("device_and_dtype", torch.zeros(1))
        self.times = make_scheduler().timesteps.tolist()
        self.generator = torch.Generator().manual_seed(0)
        self.cond: list[torch.Tensor] = []
        self.uncond: list[torch.Tensor] = []

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        k, rows = self.times.index(int(timestep)), sample.shape[0]
        if k == 0:
            self.cond, self.uncond = [], []
        draws = torch.randn(2, *sample.shape[1:], generator=self.generator)
        self.cond.append(draws[0])
        c, u = self.cond, self.uncond
        u.append(draws[1])
        if k == 1:
            u[1] = 0.25 + 0.5 * c[0] - 0.125 * c[1] + 0.75 * u[0]
        if k == 3:
            u[3] = 0.5 * c[3] + 0.75 * u[2]
        out = torch.stack([u[k], c[k]]) if rows == 2 else c[k][None]
        return (out,)


def make_scheduler() -> DDIMScheduler:
    made = scheduler()
    made.set_timesteps(STEPS)
    return made


@pytest.fixture
def linear() -> StableDiffusionPipeline:
    parts = {**tiny_sd().components, "unet": LinearUNet(), "scheduler": scheduler()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_fitted_table_is_the_known_regression(linear):
    fitted = fit_linear_ag(linear, PROMPTS * 20, STEPS, 3.0, height=16, width=16)
    rows = fitted.table
    assert rows[0] == rows[2] == [] and rows[4:] == [None] * 4
    assert rows[1] == pytest.approx([0.25, 0.5, -0.125, 0.75], abs=1e-4)
    assert rows[3] == pytest.approx([0, 0, 0, 0, 0.5, 0, 0, 0.75], abs=1e-4)


def test_with_it_the_run_is_the_guided_one_for_fewer_evaluations(linear):
    rows = [[], [0.25, 0.5, -0.125, 0.75], [], [0, 0, 0, 0, 0.5, 0, 0, 0.75], *[None] * 4]
    every = [[]] * 4 + [None] * 4

    def run(table):
        linear.unet.generator.manual_seed(5)
        with LinearAG(3.0, table).attach(linear) as guidance:
            latents = latents_of(linear, steps=STEPS, height=16, width=16)
            return latents, guidance.report().rows

    exact, estimated = run(every), run(rows)
    torch.testing.assert_close(estimated[0], exact[0], atol=1e-4, rtol=1e-4)
    assert (exact[1], estimated[1]) == (12, 10)


def test_errors_are_those_of_the_estimates():
    """Of data that are no exact relation, against the residuals themselves."""
    generator = torch.Generator().manual_seed(3)
    columns = torch.randn(9, 4000, generator=generator, dtype=torch.float64)
    columns[0] = 1
    columns[6] += 0.8 * columns[5] - 0.3 * columns[2]  # u_1 of [1, c_0..c_3, u_0..u_3]
    sums = Products(8, 4.0)
    sums.gram = columns @ columns.T
    row = torch.tensor(sums.table()[1], dtype=torch.float64)
    residual = columns[6] - row @ columns[[0, 1, 2, 5]]
    assert sums.errors()[0] == pytest.approx(float(residual.norm() / columns[6].norm()), rel=1e-6)
    assert 0.7 < sums.errors()[0] < 0.8  # sqrt(1 / (1 + 0.8^2 + 0.3^2))


@pytest.mark.parametrize(("steps", "guided"), [(3, None), (8, 1), (8, 9)])
def test_too_few_guided_steps_are_refused(steps, guided):
    with pytest.raises(GuidanceError, match="guided steps of"):
        Products(steps, 4.0, guided)


# --- LinearAG to a file ---------------------------------------------------------------------------


def to_file(pipe, out, prompts=PROMPTS, steps=(4, 8), **options):
    return fit_linear_ag_file(pipe, BASE, prompts, out, **{"scale": 4.0, "steps": steps, **options})


def test_a_file_holds_a_table_for_each_number_of_steps(sd, tmp_path):
    counted = []
    fitted = to_file(sd, tmp_path / "a.json", advance=lambda: counted.append(1))
    assert (fitted.runs, fitted.of, len(counted)) == (6, 6, 6)
    assert {n: len(errors) for n, errors in fitted.errors.items()} == {4: 1, 8: 2}
    guidance = LinearAG(None, str(tmp_path / "a.json"))
    assert set(guidance.tables) == {4, 8}
    for steps, rows in guidance.tables.items():
        separate = fit_linear_ag(sd, PROMPTS, steps, 4.0).table
        assert [row and pytest.approx(row, rel=1e-3, abs=1e-5) for row in separate] == rows
        with guidance.attach(sd):
            latents_of(sd, steps=steps)
        assert guidance.report().rows == steps + (steps // 2 + 1) // 2
    message = "fitted for 4 or 8 steps, but the run has 5"
    with guidance.attach(sd), pytest.raises(GuidanceError, match=message):
        latents_of(sd, steps=5)


def test_an_interrupted_fit_can_be_used_and_goes_on(sd, tmp_path, monkeypatch):
    to_file(sd, tmp_path / "whole.json")
    add, calls = Products.add, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    out = tmp_path / "again.json"
    monkeypatch.setattr(Products, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_file(sd, out)
    assert json.loads(out.read_text())["fit"]["runs"] == 3
    assert set(LinearAG(None, str(out)).tables) == {4, 8}
    assert to_file(sd, out).runs == 6 and len(calls) == 4 + 3
    whole, again = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "again"))
    assert whole == again
    assert to_file(sd, out).runs == 6 and len(calls) == 4 + 3  # nothing is left to do


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(prompts=["a ring"]), "other prompts"),
        (dict(scale=5.0), "other scale"),
        (dict(steps=(8,)), "other steps"),
        (dict(seeds=(1,)), "other seeds"),
    ],
)
def test_the_file_of_another_fit_is_left_alone(change, named, sd, tmp_path):
    out = tmp_path / "a.json"
    to_file(sd, out, prompts=PROMPTS[:1])
    before = out.read_bytes()
    with pytest.raises(GuidanceError, match=named):
        to_file(sd, out, **{"prompts": PROMPTS[:1], **change})
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"table": []}', '{"fit": {"asked": 3}}'])
def test_a_foreign_file_is_left_alone(content, sd, tmp_path):
    out = tmp_path / "a.json"
    out.write_text(content)
    with pytest.raises(GuidanceError, match="give another --out"):
        to_file(sd, out)
    assert out.read_text() == content


def test_minutes_limit_a_fit(sd, tmp_path, monkeypatch):
    now = iter(range(0, 1000, 25))
    clock = SimpleNamespace(monotonic=lambda: next(now))  # of the fit, not of other threads
    monkeypatch.setattr(guidancekit.fitting, "time", clock)
    fitted = to_file(sd, tmp_path / "a.json", minutes=1.0)  # 25 seconds a run
    assert (fitted.runs, fitted.of) == (2, 6)


# --- annealing ------------------------------------------------------------------------------------


def train(pipe, out, count=4, seed=0, pictures=None, **options):
    if pictures is None:
        pictures = OwnPictures(pipe, BASE, PROMPTS[:2], [0])
    given = dict(count=count, seed=seed, accumulate=2)
    return fit_annealing_file(pipe, BASE, pictures, out, **given, **options)


def weights_of(file):
    return AnnealingGuidance(str(file)).network().state_dict()


def test_a_trained_network_is_a_guidance(sd, tmp_path):
    counted = []
    trained = train(sd, tmp_path / "a.safetensors", advance=lambda: counted.append(1))
    assert trained.pictures == len(counted) == 4
    assert set(trained.means) == {"noise", "delta", "w"}
    assert all(map(math.isfinite, trained.means.values()))
    untrained = AnnealingTrainer(sd, STEPS).network.state_dict()
    made = weights_of(trained.path)
    assert any(not torch.equal(made[name], untrained[name]) for name in made)
    with AnnealingGuidance(str(trained.path)).attach(sd):
        assert torch.isfinite(latents_of(sd)).all()


def test_an_interrupted_training_goes_on(sd, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    train(sd, whole)
    one, calls = AnnealingTrainer.train, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return one(self, *args)

    monkeypatch.setattr(AnnealingTrainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(sd, again)
    assert weights_of(again)  # what is there can be used
    trained = train(sd, again)
    assert trained.pictures == 4 and len(calls) == 5
    torch.testing.assert_close(weights_of(again), weights_of(whole))
    assert train(sd, again).means == {}  # nothing is left to do
    with pytest.raises(GuidanceError, match="other seed"):
        train(sd, again, seed=1)
    with pytest.raises(GuidanceError, match="other prompts"):
        train(sd, again, pictures=OwnPictures(sd, BASE, PROMPTS, [0]))


def test_a_foreign_state_is_refused(sd, tmp_path):
    (tmp_path / "a.training.pt").write_bytes(b"what is this")
    with pytest.raises(GuidanceError, match="delete it"):
        train(sd, tmp_path / "a.safetensors")


def test_own_pictures_are_the_pipelines(sd):
    pictures = OwnPictures(sd, BASE, PROMPTS, [0, 7])
    assert len(pictures) == 6
    latents, prompt = pictures[4]
    assert prompt == PROMPTS[1]
    expected = latents_of(sd, 4.0, seed=8, steps=STEPS, prompt=prompt)
    torch.testing.assert_close(latents, expected)
    assert pictures[4][0] is latents  # made once


def test_pictures_of_a_folder(sd, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text(" a blue ring\n")
    made = Image.new("RGB", (40, 32), "red")
    save_picture(made, Recipe(prompt="a red star", model="tiny"), tmp_path / "a.png")
    pictures = FolderPictures(sd, tmp_path)
    assert [pictures[i][1] for i in range(len(pictures))] == ["a red star", "a blue ring"]
    given = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = sd.vae.encode(given).latents * sd.vae.config.scaling_factor
    torch.testing.assert_close(pictures[1][0], expected)
    assert pictures[0][0].shape == (1, 4, 8, 8)  # the red one was cut
    assert FolderPictures(sd, tmp_path, (16, 32))[0][0].shape == (1, 4, 8, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "holds no pictures"),
        ("a.png", b"", "has no prompt: write it to a.txt"),
        ("a.txt", b"a star", "holds no pictures"),
    ],
)
def test_folders_without_what_it_takes(name, content, message, sd, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(GuidanceError, match=message):
        FolderPictures(sd, tmp_path)


def test_a_broken_picture_is_named(sd, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a star")
    with pytest.raises(GuidanceError, match=r"a\.png cannot be read"):
        FolderPictures(sd, tmp_path)[0]


# --- the command line -----------------------------------------------------------------------------


def test_fit_linear_ag_from_prompts_to_a_picture(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out" / "table.json"
    model = ["--model", tiny_folder]
    fit = ["fit", "linear-ag", *PROMPTS, "--steps", "4,8", "--scale", "4", "--out", str(out)]
    assert main([*fit, *model]) == 0
    output, error = capsys.readouterr()
    assert output == f"{out}\n"
    assert "6 of 6 runs" in error and "8 steps: estimates are off by" in error
    use = ["--method", "linear-ag", "--set", f"table={out}", "--steps", "8", "--scale", "4"]
    assert main(["generate", "a moon", *use, *model, "--out", str(tmp_path / "made")]) == 0
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_fit_annealing_from_prompts_to_a_picture(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out" / "net.safetensors"
    model = ["--model", tiny_folder]
    fit = ["fit", "annealing", *PROMPTS, "--steps", "4", "--scale", "4", "--count", "2"]
    assert main([*fit, "--out", str(out), *model]) == 0
    output, error = capsys.readouterr()
    assert output == f"{out}\n" and "2 pictures; noise" in error
    use = ["--method", "annealing", "--set", f"weights={out}", "--steps", "4"]
    assert main(["generate", "a moon", *use, *model, "--out", str(tmp_path / "made")]) == 0


def test_fit_annealing_on_the_pictures_of_a_folder(tiny_folder, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a red star")
    options = ["--pictures", str(tmp_path / "pictures"), "--count", "1", "--steps", "4"]
    out = tmp_path / "net.safetensors"
    fit = ["fit", "annealing", *options, "--model", tiny_folder, "--out", str(out)]
    assert main(fit) == 0, capsys.readouterr().err
    assert out.is_file()


def test_ctrl_c_keeps_what_was_fitted(tiny_folder, tmp_path, capsys, monkeypatch):
    add, calls = Products.add, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    monkeypatch.setattr(Products, "add", interrupted)
    out = tmp_path / "table.json"
    fit = ["fit", "linear-ag", *PROMPTS, "--steps", "4", "--scale", "4", "--out", str(out)]
    assert main([*fit, "--model", tiny_folder]) == 130
    assert "what was finished is kept" in capsys.readouterr().err
    assert main([*fit, "--model", tiny_folder]) == 0
    assert len(calls) == 2 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "METHOD"),
        (["apg"], "invalid choice: 'apg'"),
        (["linear-ag"], "there is no prompt"),
        (["linear-ag", "a", "--scale", "4", "--out", "table.txt"], "ending in .json"),
        (["linear-ag", "a"], "a table holds for one scale only"),
        (["linear-ag", "a", "--scale", "nan"], "guidance_scale: found nan"),
        (["linear-ag", "a", "--scale", "4", "--steps", "3"], "1 guided steps of 3"),
        (["linear-ag", "a", "--scale", "4", "--steps", "8,2000"], "steps: found 2000"),
        (["linear-ag", "a", "--scale", "4", "--steps", "x"], "--steps"),
        (["linear-ag", "a", "--scale", "4", "--minutes", "0"], "--minutes: found 0"),
        (["linear-ag", "a", "--scale", "4", "--seeds", "-1"], "seed: found -1"),
        (["linear-ag", "a", "--scale", "4", "--scheduler", "eular"], "no scheduler 'eular'"),
        (["linear-ag", "a", "--scale", "4", "--model", "no/such/folder"], "no model folder"),
        (["annealing"], "there is no prompt"),
        (["annealing", "a", "--out", "net.pt"], "ending in .safetensors"),
        (["annealing", "a", "--count", "0"], "--count: found 0"),
        (["annealing", "a", "--steps", "0"], "steps: found 0"),
        (["annealing", "a", "--pictures", "folder"], "the prompts come with the pictures"),
        (["annealing", "--pictures", "no-such-folder"], "there is no folder no-such-folder"),
    ],
)
def test_bad_input_gets_one_clear_line_and_no_file(
    arguments, message, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if arguments[1:] and "--model" not in arguments:
        arguments = [*arguments, "--model", tiny_folder]
    assert main(["fit", *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("guidancekit: error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["linear-ag", "annealing"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main(["fit", command, "--help"])
    assert f"examples:\n  guidancekit fit {command}" in capsys.readouterr().out


def test_the_embedded_model_is_the_default_and_has_a_scale(tmp_path):
    out = tmp_path / "table.json"
    assert main(["fit", "linear-ag", "a red star", "--steps", "4", "--out", str(out)]) == 0
    asked = json.loads(out.read_text())["fit"]["asked"]
    assert (asked["model"], asked["scale"]) == ("scenes-unet", 4.0)
