"""The command line from end to end: `main` on a tiny pipeline folder, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_sd, tiny_sdxl

import guidancekit.compare
import guidancekit.generate
import guidancekit.loading
from guidancekit import GuidanceError
from guidancekit.cli import main
from guidancekit.loading import SCHEDULERS, choose_device, choose_dtype, load_pipeline
from guidancekit.parameters import parameters
from guidancekit.recipe import CHUNK, Recipe, read_recipe, save_picture
from guidancekit.registry import methods, schedules

STEPS = 4


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def generate(tiny_folder, out, capsys):
    """Run `guidancekit generate` on the tiny model; returns the pictures it names on stdout."""

    def run(*arguments: str) -> list[Path]:
        capsys.readouterr()
        options = ["--model", tiny_folder, "--steps", str(STEPS), "--out", str(out)]
        assert main(["generate", *options, *arguments]) == 0, capsys.readouterr().err
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def compare(tiny_folder, out, capsys):
    """Run `guidancekit compare` on the tiny model; returns the grid and the table beside it."""

    def run(*arguments: str) -> tuple[Image.Image, dict]:
        path = out / "grid.png"
        options = ["--model", tiny_folder, "--steps", str(STEPS), "--out", str(path)]
        assert main(["compare", *options, *arguments]) == 0, capsys.readouterr().err
        assert sorted(file.name for file in out.iterdir()) == ["grid.json", "grid.png"]
        return Image.open(path), json.loads(path.with_suffix(".json").read_text())

    return run


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# --- generate -----------------------------------------------------------------------------------


def test_generate_writes_one_png_per_seed_with_its_recipe(generate, tiny_folder, out):
    made = generate("a red circle", "-n", "3", "--seed", "5", "--negative", "a star")
    assert made == [out / f"a-red-circle-cfg-seed{seed}.png" for seed in (5, 6, 7)]
    for path, seed in zip(made, (5, 6, 7), strict=True):
        recipe = read_recipe(path)
        assert (recipe.prompt, recipe.negative, recipe.seed) == ("a red circle", "a star", seed)
        assert (recipe.model, recipe.steps, recipe.size) == (tiny_folder, STEPS, (32, 32))
        assert (recipe.guidance, recipe.guidance_scale) == ("CFG()", 7.5)
        assert torch.__version__.startswith(recipe.versions["torch"])
    assert not np.array_equal(pixels(made[0]), pixels(made[1]))


def test_from_repeats_the_picture_exactly(generate):
    options = ["--method", "apg", "--set", "eta=0.25", "--scale", "9", "--scheduler", "euler"]
    (first,) = generate("a blue star", "--seed", "3", "--negative", "a moon", *options)
    (again,) = generate("--from", str(first))
    assert again != first  # nothing is overwritten
    assert np.array_equal(pixels(again), pixels(first))
    assert read_recipe(again) == read_recipe(first)


def test_from_takes_changes(generate):
    (first,) = generate("a blue star", "--method", "apg", "--seed", "3")
    (other,) = generate("--from", str(first), "--seed", "4", "--scale", "3")
    recipe = read_recipe(other)
    assert (recipe.prompt, recipe.guidance) == ("a blue star", "APG()")
    assert (recipe.seed, recipe.guidance_scale) == (4, 3)


def test_a_picture_does_not_depend_on_its_neighbours(generate):
    several = generate("a red circle", "a moon", "-n", "2")
    (alone,) = generate("a moon", "--seed", "1")
    assert np.array_equal(pixels(alone), pixels(several[3]))


def test_cfg_is_the_pipelines_own_guidance(generate):
    (path,) = generate("a red circle", "--scale", "5", "--seed", "2")
    pipe = tiny_sd()
    plain = pipe(
        "a red circle",
        guidance_scale=5,
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(2),
    ).images[0]
    difference = pixels(path).astype(int) - np.asarray(plain).astype(int)
    assert np.abs(difference).max() <= 1  # rounding to bytes


@pytest.mark.parametrize(
    ("options", "guidance", "scale"),
    [
        (["--scale", "6"], "CFG()", 6),
        (["--scale", "0.5"], "CFG(scale=0.5)", 7.5),
        (["--method", "apg", "--set", "eta=0.5", "--set", "momentum=none"], "APG(eta=0.5)", 7.5),
        (["--method", "apg", "--set", "scale=3"], "APG(scale=3)", 7.5),
        (["--method", "cfg++", "--scale", "0.6"], "CFGPlusPlus(scale=0.6)", 7.5),
        (["--method", "cfg++", "--set", "strength=equivalent_cfg", "--scale", "3"], None, 3),
        (["--method", "fdg", "--scale", "6", "--set", "levels=3"], "FDG(levels=3)", 6),
        (["--method", "fdg", "--preset", "sdxl"], "FDG(scale_low=5.0, scale_high=10.0)", 7.5),
        (["--method", "apg", "--preset", "sdxl", "--scale", "4"], None, 4),
        (["--method", "cfg(3) + apg(eta=1)"], "CFG(scale=3) + APG(eta=1)", 7.5),
    ],
)
def test_options_become_the_guidance_of_the_recipe(generate, options, guidance, scale):
    (path,) = generate("a star", *options)
    recipe = read_recipe(path)
    assert recipe.guidance_scale == scale
    if guidance is not None:
        assert recipe.guidance == guidance


def test_methods_and_scales_change_the_picture(generate):
    base, again, apg, strong = (
        pixels(generate("a red circle", *options)[0])
        for options in ([], [], ["--method", "apg", "--scale", "50"], ["--scale", "50"])
    )
    assert np.array_equal(base, again)
    assert not np.array_equal(base, strong)
    assert not np.array_equal(apg, strong)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "flow-euler"])
def test_every_scheduler_is_made_from_the_models_own(scheduler, generate):
    (path,) = generate("a moon", "--scheduler", scheduler)
    assert read_recipe(path).scheduler == scheduler


def test_a_scheduler_whose_package_is_missing_says_so(tiny_folder, monkeypatch, capsys):
    class Missing:
        @classmethod
        def from_config(cls, *arguments, **options):
            raise ImportError

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", Missing)
    assert main(["generate", "a", "--model", tiny_folder, "--scheduler", "lms"]) == 2
    assert "scheduler 'lms' needs scipy: pip install scipy" in capsys.readouterr().err


def test_sdxl_folders_work(tmp_path, generate):
    tiny_sdxl().save_pretrained(tmp_path / "xl")
    (path,) = generate("a star", "--model", str(tmp_path / "xl"), "--method", "apg")
    assert read_recipe(path).guidance_scale == 5.0  # SDXL's own default


def test_unknown_words_are_named(tiny_folder, out, capsys):
    options = ["--model", tiny_folder, "--steps", "2", "--out", str(out)]
    assert main(["generate", "a red gnu on a zebra", *options]) == 0
    error = capsys.readouterr().err
    assert "does not know 'gnu', 'zebra'" in error
    assert "circle" in error  # the words that it knows
    assert main(["generate", "A red circle", *options]) == 0
    assert capsys.readouterr().err == ""


def test_other_versions_are_named(generate, tiny_folder, tmp_path, out, capsys):
    old = Recipe("a moon", tiny_folder, steps=2, device="cuda", versions={"torch": "1.0"})
    save_picture(Image.new("RGB", (8, 8)), old, tmp_path / "old.png")
    assert main(["generate", "--from", str(tmp_path / "old.png"), "--out", str(out)]) == 0
    assert "torch 1.0 (now " in capsys.readouterr().err


def test_the_best_device_and_its_dtype(monkeypatch):
    for name, value in {"is_available": True, "device_count": 2, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert choose_device(None) == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    assert choose_device("cpu") == "cpu"
    with pytest.raises(GuidanceError, match="found 'cuda:2'"):
        choose_device("cuda:2")
    assert choose_dtype("owner/model", "cuda:1") == "bfloat16"
    assert choose_dtype("owner/model", "cpu") == "float32"
    assert choose_dtype("scenes-unet", "cuda") == "float32"


def test_warnings_are_one_line_each_and_once(tiny_folder, out, capsys):
    idle = ["--method", "interval", "--set", "low=0.01", "--set", "high=0.02"]
    options = ["--model", tiny_folder, "--steps", "2", "--out", str(out), "-n", "2"]
    assert main(["generate", "a moon", *idle, *options]) == 0
    error = capsys.readouterr().err
    assert error.startswith("guidancekit: warning: CFG(scale=Interval(")
    assert "guides none of the 2 steps" in error
    assert error.count("\n") == 1


def test_ctrl_c_keeps_the_finished_pictures(tiny_folder, out, capsys, monkeypatch):
    run, calls = guidancekit.generate.run, []

    def interrupted(pipe, recipe):
        calls.append(recipe)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(pipe, recipe)

    monkeypatch.setattr(guidancekit.generate, "run", interrupted)
    options = ["--model", tiny_folder, "--steps", "2", "--out", str(out)]
    assert main(["generate", "a moon", "-n", "3", *options]) == 130
    (path,) = out.iterdir()
    assert read_recipe(path).seed == 0
    assert pixels(path).shape == (32, 32, 3)


# --- compare ------------------------------------------------------------------------------------


def test_compare_runs_every_method_on_every_prompt_and_seed(compare):
    _, table = compare("a moon", "a star", "--seeds", "0,7", "--methods", "cfg,apg,interval")
    assert [(row["prompt"], row["seed"]) for row in table["rows"]] == [
        ("a moon", 0),
        ("a moon", 7),
        ("a star", 0),
        ("a star", 7),
    ]
    assert [column["method"] for column in table["columns"]] == ["cfg", "apg", "interval"]
    cells = [(picture["row"], picture["column"]) for picture in table["pictures"]]
    assert sorted(cells) == [(r, c) for r in range(4) for c in range(3)]
    for picture in table["pictures"]:
        assert picture["seconds"] > 0
        assert len(picture["effective_scale"]) == STEPS
        if picture["column"] == 2:  # outside its interval a step costs one evaluation
            guided = sum(scale != 1 for scale in picture["effective_scale"])
            assert picture["evaluations"] == STEPS + guided
            assert 0 < guided < STEPS
        else:
            assert picture["evaluations"] == 2 * STEPS


def test_columns_start_from_the_same_noise(compare):
    """Two spellings of CFG are one picture; the cell is the picture of its recipe."""
    grid, table = compare("a moon", "--methods", "cfg,cfg(rescale=0.0),apg(scale=50)")
    sheet = np.asarray(grid).astype(int)
    width = 160 + 12  # the cell and the gap
    left = grid.width - 28 - 3 * width + 12
    first, second, third = (sheet[-188:-28, left + c * width :][:, :160] for c in range(3))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
    recipe = Recipe.from_json(json.dumps(table["pictures"][0]["recipe"]))
    pipe = load_pipeline(recipe)
    again = guidancekit.generate.run(pipe, recipe).image
    enlarged = again.resize((160, 160), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(enlarged), first)


def test_scales_multiply_the_columns_that_follow_them(compare):
    _, table = compare("a moon", "--methods", "cfg,apg(scale=3),cfg++,fdg", "--scales", "1,2.5,6")
    columns = [(c["guidance"], c["guidance_scale"]) for c in table["columns"]]
    assert columns == [
        ("CFG(scale=1.0)", None),
        ("CFG()", 2.5),
        ("CFG()", 6),
        ("APG(scale=3)", None),
        ("CFGPlusPlus(scale=1.0)", None),
        ("CFGPlusPlus()", 2.5),
        ("CFGPlusPlus()", 6),
        ("FDG()", 1),
        ("FDG()", 2.5),
        ("FDG()", 6),
    ]
    scales = [table["pictures"][c]["effective_scale"] for c in range(3)]
    assert scales == [[1] * STEPS, [2.5] * STEPS, [6] * STEPS]
    for column in (0, 7):  # no guidance, no unconditional pass
        assert table["pictures"][column]["evaluations"] == STEPS


def test_all_methods_are_shown_or_left_out_with_the_reason(compare):
    grid, table = compare("a moon", "a star", "--methods", "apg,all")
    names = [column["method"] for column in table["columns"]]
    assert names == ["apg", *(name for name in methods() if name != "apg")]
    left_out = [c for c, column in enumerate(table["columns"]) if column["left_out"]]
    assert {names[c] for c in left_out}.isdisjoint({"cfg", "apg", "cfg++", "fdg"})
    cells = {(picture["row"], picture["column"]) for picture in table["pictures"]}
    assert cells == {(r, c) for r in (0, 1) for c in range(len(names)) if c not in left_out}
    shown = len(names) - len(left_out)
    assert grid.height > shown * (160 + 12) > grid.width  # so many stand below each other


def test_a_method_that_was_asked_for_is_never_left_out(tiny_folder, out, capsys):
    options = ["--scheduler", "heun", "--model", tiny_folder, "--out", str(out / "grid.png")]
    assert main(["compare", "a moon", "--methods", "cfg++,all", *options]) == 2
    assert "CFGPlusPlus" in capsys.readouterr().err
    assert not out.exists()


def test_several_models_are_rows(compare, tmp_path):
    tiny_sd(seed=1).save_pretrained(tmp_path / "other")
    _, table = compare("a moon", "--methods", "cfg", "--model", str(tmp_path / "other"))
    assert [Path(row["model"]).name for row in table["rows"]] == ["tiny-sd", "other"]


def test_prompts_come_from_a_file(compare, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\n\na moon\n  a star  \n", encoding="utf-8")
    _, table = compare("a ring", "--prompts-file", str(file), "--methods", "cfg")
    assert [row["prompt"] for row in table["rows"]] == ["a ring", "a moon", "a star"]


def test_ctrl_c_keeps_the_finished_cells(tiny_folder, out, monkeypatch):
    run, calls = guidancekit.compare.run, []

    def interrupted(pipe, recipe):
        calls.append(recipe)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(pipe, recipe)

    monkeypatch.setattr(guidancekit.compare, "run", interrupted)
    options = ["--model", tiny_folder, "--steps", "2", "--out", str(out / "grid.png")]
    assert main(["compare", "a moon", "a star", "--methods", "cfg,apg", *options]) == 130
    assert sorted(file.name for file in out.iterdir()) == ["grid-partial.json", "grid-partial.png"]
    table = json.loads((out / "grid-partial.json").read_text())
    assert [(p["row"], p["column"]) for p in table["pictures"]] == [(0, 0), (0, 1)]
    Image.open(out / "grid-partial.png").load()


# --- methods ------------------------------------------------------------------------------------


def test_methods_lists_every_strategy_and_schedule(capsys):
    assert main(["methods"]) == 0
    output = capsys.readouterr().out
    for name, cls in {**methods(), **schedules()}.items():
        line = next(line for line in output.splitlines() if line.split()[:1] == [name])
        assert cls.__name__ in line
        assert cls.paper in line


@pytest.mark.parametrize("name", [*methods(), *schedules()])
def test_methods_explains_each(name, capsys):
    assert main(["methods", name]) == 0
    output = capsys.readouterr().out
    cls = {**methods(), **schedules()}[name]
    for parameter in parameters(cls):
        assert f"\n  {parameter.name} (" in output
    for preset in getattr(cls, "presets", {}).values():
        assert preset.source in output
    assert max(map(len, output.splitlines())) <= 160


# --- bad input ----------------------------------------------------------------------------------

BAD_INPUT = [
    ("generate", [], "there is no prompt"),
    ("generate", [" "], "prompt: found ' ', expected text that is not blank"),
    ("generate", ["a", ""], "prompt: found '', expected text that is not blank"),
    ("generate", ["a", "--steps", "0"], "steps: found 0, expected a whole number from 1 to 1000"),
    ("generate", ["a", "--steps", "many"], "--steps"),
    ("generate", ["a", "-n", "0"], "-n: found 0, expected at least 1"),
    ("generate", ["a", "--seed", "-1"], "seed: found -1"),
    ("generate", ["a", "--method", "apgg"], "did you mean apg"),
    ("generate", ["a", "--method", "apg(eta=2)"], "eta"),
    ("generate", ["a", "--method", "cfg(__import__('os'))"], "no method '__import__'"),
    ("generate", ["a", "--method", "apg", "--set", "eta=2"], "APG(eta=...): found 2"),
    ("generate", ["a", "--method", "apg", "--set", "eta=big"], "APG(eta=...): found 'big'"),
    ("generate", ["a", "--method", "apg", "--set", "eta=nan"], "APG(eta=...): found nan"),
    ("generate", ["a", "--method", "apg", "--set", "etha=1"], "did you mean eta"),
    ("generate", ["a", "--method", "apg", "--set", "eta"], "expected key=value"),
    ("generate", ["a", "--method", "apg", "--preset", "sd9"], "no published settings for 'sd9'"),
    ("generate", ["a", "--method", "interval", "--preset", "sd9"], "has no presets"),
    ("generate", ["a", "--scale", "nan"], "scale"),
    ("generate", ["a", "--scale", "inf"], "guidance_scale: found inf, expected a finite number"),
    ("generate", ["a", "--scale", "-1"], "scale"),
    ("generate", ["a", "--method", "fdg", "--scale", "0.5"], "FDG() cannot take it"),
    ("generate", ["a", "--method", "apg(eta=1)", "--scale", "0.5"], "APG(eta=1) cannot take it"),
    ("generate", ["a", "--method", "apg(scale=3)", "--scale", "5"], "APG(scale=3) cannot take it"),
    ("generate", ["a", "--scheduler", "eular"], "there is no scheduler 'eular'. There are: ddim"),
    ("generate", ["a", "--scheduler", "flow-euler"], "does not fit a model made for DDIMScheduler"),
    ("generate", ["a", "--device", "cuda:99"], "device: found 'cuda:99'"),
    ("generate", ["a", "--device", "toaster"], "device: found 'toaster'"),
    ("generate", ["a", "--dtype", "int4"], "--dtype"),
    ("generate", ["a", "--size", "big"], "expected WxH"),
    ("generate", ["a", "--size", "30x30"], "refused the run: `height` and `width`"),
    ("generate", ["a", "--from", "missing.png"], "missing.png: there is no such file"),
    ("generate", ["a", "--model", "no/such/folder"], "there is no model folder"),
    ("generate", ["a", "--model", "nobody/nothing"], "cannot load the model 'nobody/nothing'"),
    ("generate", ["a", "--colour", "red"], "unrecognized arguments: --colour red"),
    (
        "generate",
        ["a", "--method", "cfg++", "--scheduler", "heun"],
        "CFGPlusPlus",
    ),
    ("compare", [], "there is no prompt"),
    ("compare", ["a", "--methods", "cfg,apgg"], "did you mean apg"),
    ("compare", ["a", "--methods", ","], "there is no method to compare"),
    ("compare", ["a", "--seeds", "1,x"], "--seeds"),
    ("compare", ["a", "--seeds", "-3"], "seed: found -3"),
    ("compare", ["a", "--scales", "2,nan"], "scale"),
    ("compare", ["a", "--steps", "-4"], "steps: found -4"),
    ("compare", ["a", "--prompts-file", "missing.txt"], "missing.txt"),
    ("methods", ["intervall"], "did you mean interval"),
    ("draw", [], "invalid choice: 'draw'"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), BAD_INPUT)
def test_bad_input_gets_one_clear_line_and_no_file(
    command, arguments, message, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if command in ("generate", "compare") and "--model" not in arguments:
        arguments = [*arguments, "--model", tiny_folder]
    assert main([command, *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("guidancekit: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_pipeline(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["generate", "a", "--model", str(tmp_path / "empty")]) == 2
    assert "has no model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize("index", ["{", "[]", '{"_class_name": "Nonsense"}', "{}"])
def test_a_broken_pipeline_folder(index, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(index)
    assert main(["generate", "a", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "cannot load the model" in error
    assert error.count("\n") == 1


def test_out_is_checked_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "file").touch()
    missing = ["--model", "no/such/folder"]
    assert main(["generate", "a", "--out", str(tmp_path / "file"), *missing]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    for path in ("file/grid.png", "grid.jpg", "grid"):
        assert main(["compare", "a", "--out", str(tmp_path / path), *missing]) == 2
        error = capsys.readouterr().err
        assert "is a file, expected a folder" in error or "ending in .png" in error


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": "-" * 5000 + "1"},
        {"guidance": "(" * 5000},
        {"guidance": "cfg(" + "+".join(["cfg"] * 1500) + ")"},
        {"guidance": "+".join(["cfg()"] * 1500)},
        {"guidance": "cfg(**{})"},
        {"guidance": "cfg(scale=[1])"},
        {"guidance": "cfg(scale='x')"},
        {"guidance": "\x00"},
        {"guidance": "open('x', 'w')"},
        {"guidance": "7"},
        {"guidance_scale": "seven"},
        {"steps": 10**9},
        {"scheduler": "nonsense"},
        {"model": "../../etc"},
        {"surprise": 1},
    ],
)
def test_a_forged_recipe_is_refused(changes, tiny_folder, tmp_path, out, capsys, monkeypatch):
    if "model" not in changes:  # before any model is loaded
        monkeypatch.delattr(guidancekit.loading, "load_pipeline")
    values = {"prompt": "a moon", "model": tiny_folder, "steps": 2, **changes}
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(values))
    Image.new("RGB", (8, 8)).save(tmp_path / "forged.png", pnginfo=chunks)
    assert main(["generate", "--from", str(tmp_path / "forged.png"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("guidancekit: error: ")
    assert error.count("\n") == 1
    assert not out.exists()


# --- as a program -------------------------------------------------------------------------------


def test_python_m_guidancekit_runs_and_reports_errors_by_exit_code():
    call = [sys.executable, "-m", "guidancekit"]
    bad = subprocess.run([*call, "methods", "agp"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("guidancekit: error: there is no method 'agp'")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "compare", "methods"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"guidancekit {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_grid_over_two_settings(tiny_folder, out, capsys):
    path = out / "grid.png"
    run = ["grid", "a red star", "--model", tiny_folder, "--steps", "2", "--out", str(path)]
    assert main([*run, "--x", "scale=2,8", "--y", "method=cfg,apg", "--seeds", "1,2"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    table = json.loads(path.with_suffix(".json").read_text())
    assert len(table["pictures"]) == 8
    assert Image.open(path).width > 2 * 160
    for bad in (["--x", "scale"], ["--x", "no-such=1"], ["--x", "steps=0"], ["--x", "eta="]):
        assert main([*run, *bad]) == 2
        assert "error" in capsys.readouterr().err


def test_many_methods_stand_below_each_other(compare):
    names = ",".join(f"cfg({w})" for w in range(2, 14))
    tall, _ = compare("a red star", "--methods", names)
    assert tall.height > tall.width
    wide, _ = compare("a red star", "--methods", "cfg(2),cfg(3),cfg(4)")
    assert wide.width > wide.height
