"""A series of pictures in several processes: each picture once, and a killed one is made up for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

import guidancekit.loading
from guidancekit import GuidanceError
from guidancekit.cli import main
from guidancekit.recipe import Recipe, read_recipe, save_picture
from guidancekit.series import Process, file_name, is_finished, this_process

RECIPE = Recipe("a red star", "scenes-unet", guidance="APG(eta=0.5)", guidance_scale=4.0, seed=3)
PROMPTS = ["a big red circle", "a blue star", "a green heart"]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def state(folder: Path) -> dict[str, tuple]:
    """What changes if a file is written again, though it be with the same content."""
    files = {path.name: path for path in folder.glob("*.png")}
    return {
        name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for name, path in files.items()
    }


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["# comment", *PROMPTS, ""]))
    return str(path)


@pytest.fixture
def series(tiny_folder, prompts, tmp_path, capsys):
    """Run `generate --prompts-file` on the tiny model; returns what it printed."""

    def run(*arguments: str) -> tuple[list[Path], str]:
        options = ["--prompts-file", prompts, "--model", tiny_folder, "--steps", "2"]
        code = main(["generate", *options, "--out", str(tmp_path / "out"), *arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return [Path(line) for line in out.splitlines()], err

    return run


@pytest.fixture
def launched(monkeypatch):
    """Pretend that a launcher has started this process as one of several."""

    def pretend(index: int, count: int, device: str = "cpu") -> None:
        found = SimpleNamespace(
            num_processes=count, process_index=index, device=torch.device(device)
        )
        monkeypatch.setattr(accelerate, "PartialState", lambda cpu: found)
        monkeypatch.setattr("atexit.register", lambda function: None)  # there is no group to leave

    return pretend


# --- names and shares ---------------------------------------------------------------------------


def test_a_name_follows_from_the_recipe_and_from_nothing_else():
    name = file_name(7, RECIPE)
    assert name.startswith("00007-a-red-star-apg-seed3-")
    elsewhere = replace(RECIPE, device="cuda", versions={"torch": "1.0"})
    spelled = replace(RECIPE, guidance="apg( eta = 0.5 )")
    assert file_name(7, elsewhere) == file_name(7, spelled) == name
    changes = dict(
        negative="a moon",
        guidance="APG(eta=0.6)",
        guidance_scale=5.0,
        steps=31,
        scheduler="euler",
        size=(32, 32),
        model="other/model",
        dtype="float16",
    )
    others = [replace(RECIPE, **{key: value}) for key, value in changes.items()]
    assert len({name, *(file_name(7, other) for other in others)}) == 1 + len(changes)


@pytest.mark.parametrize("count", [1, 2, 3, 11, 20])
def test_shares_are_equal_disjoint_and_complete(count):
    jobs = [(Path(str(k)), RECIPE) for k in range(11)]
    shares = [Process("cpu", index, count).share(jobs) for index in range(count)]
    assert sorted((job for share in shares for job in share), key=jobs.index) == jobs
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_recipe_inside_decides_not_the_name(tmp_path):
    def saved(recipe: Recipe) -> Path:
        save_picture(Image.new("RGB", (16, 16)), recipe, tmp_path / "picture.png")
        return tmp_path / "picture.png"

    where = dict(size=(16, 16), device="cuda", versions={"torch": "1.0"})
    assert is_finished(saved(replace(RECIPE, **where)), RECIPE)
    assert is_finished(saved(RECIPE), replace(RECIPE, guidance_scale=None))  # which was the default
    assert not is_finished(saved(replace(RECIPE, guidance_scale=5.0)), RECIPE)
    for change in dict(seed=4), dict(steps=31), dict(prompt="a moon"), dict(guidance="APG()"):
        assert not is_finished(saved(replace(RECIPE, **change)), RECIPE)
    assert not is_finished(tmp_path / "none.png", RECIPE)
    whole = saved(RECIPE).read_bytes()
    for damaged in whole[:-5], b"", whole.replace(b"IDAT", b"IDAX"):
        (tmp_path / "picture.png").write_bytes(damaged)
        assert not is_finished(tmp_path / "picture.png", RECIPE)


# --- which process this is ----------------------------------------------------------------------


def test_without_a_launcher_there_is_one_process():
    assert this_process("cpu") == Process("cpu", 0, 1)
    with pytest.raises(GuidanceError, match="found 'tpu'"):
        this_process("tpu")


def test_each_process_has_its_own_device(launched, monkeypatch):
    launched(1, 2)
    assert this_process() == Process("cpu", 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched(1, 2, "cuda:1")
    assert this_process() == this_process("cuda") == Process("cuda:1", 1, 2)
    assert this_process("cpu") == Process("cpu", 1, 2)
    with pytest.raises(GuidanceError, match="found 'cuda:0' for 2 processes"):
        this_process("cuda:0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert this_process() == Process("cpu", 1, 2)


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    def lost(cpu):
        raise RuntimeError("The server socket has failed to listen.\nmore")

    monkeypatch.setattr(accelerate, "PartialState", lost)
    with pytest.raises(GuidanceError, match="launcher: The server socket has failed to listen"):
        this_process("cpu")


def test_several_processes_share_a_prompts_file_only(launched, capsys):
    launched(0, 2)
    assert main(["generate", "a star"]) == 2
    assert "2 processes share a --prompts-file only: give one" in capsys.readouterr().err


# --- a series in one process --------------------------------------------------------------------


def test_a_series_is_what_single_pictures_would_be(series, tiny_folder, tmp_path, capsys):
    made, err = series("a moon", "-n", "2", "--seed", "5")
    assert err == ""
    recipes = [read_recipe(path) for path in made]
    expected = [(prompt, seed) for prompt in ("a moon", *PROMPTS) for seed in (5, 6)]
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == expected
    assert [path.name[:6] for path in made] == [f"{k:05d}-" for k in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert sorted((tmp_path / "out").iterdir()) == sorted(made)
    single = ["--model", tiny_folder, "--steps", "2", "--out", str(tmp_path / "single")]
    assert main(["generate", PROMPTS[1], "--seed", "6", *single]) == 0
    (alone,) = capsys.readouterr().out.splitlines()
    assert np.array_equal(pixels(alone), pixels(made[5]))


def test_a_finished_series_is_not_touched_and_loads_no_model(series, tmp_path, monkeypatch):
    series()
    before = state(tmp_path / "out")
    monkeypatch.setattr(guidancekit.loading, "load_pipeline", None)
    made, err = series()
    assert made == []
    assert err == "guidancekit: 3 of 3 pictures are there already.\n"
    assert state(tmp_path / "out") == before


def test_what_is_missing_damaged_or_another_picture_is_made_again(series, tmp_path):
    made, _ = series("-n", "2")
    before = state(tmp_path / "out")
    gone, damaged, forged = made[0], made[2], made[5]
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-20])
    forged.write_bytes(made[4].read_bytes())  # the same prompt at another seed
    again, err = series("-n", "2")
    assert again == [gone, damaged, forged]
    for path in damaged, forged:
        assert f"{path} is damaged or another picture: it is made again" in err
    after = state(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(after[name][2] == before[name][2] for name in before)  # the same bytes
    kept = before.keys() - {path.name for path in again}
    assert all(after[name] == before[name] for name in kept)


def test_another_setting_is_another_series(series, tmp_path):
    first, _ = series()
    second, _ = series("--method", "apg")
    more, _ = series("-n", "2")  # goes on where the first one ended
    assert len({*first, *second, *more}) == 9
    assert all(read_recipe(path).seed == 1 for path in more)


def test_processes_other_than_the_first_are_silent(series, launched, tmp_path):
    launched(1, 2)
    made, err = series("an unknowable gnu")
    assert [read_recipe(path).prompt for path in made] == [PROMPTS[0], PROMPTS[2]]
    assert err == ""
    launched(0, 2)
    rest, err = series("an unknowable gnu")
    assert "the model does not know 'unknowable', 'gnu'" in err
    assert sorted(made + rest) == sorted((tmp_path / "out").iterdir())


def test_the_errors_of_other_processes_are_heard(launched, prompts, capsys):
    launched(1, 2)
    assert main(["generate", "--prompts-file", prompts, "--model", "./none"]) == 2
    assert capsys.readouterr().err.startswith("guidancekit: error: there is no model folder")


# --- processes that are really launched ---------------------------------------------------------

# The second process is killed halfway through writing its second picture.
KILLED = """
import os, signal, sys
from PIL import Image

save, count = Image.Image.save, 0

def deadly(image, file, **options):
    global count
    count += 1
    if os.environ["RANK"] == "1" and count == 2:
        file.write(b"half a picture")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(image, file, **options)

Image.Image.save = deadly

from guidancekit.cli import main
sys.exit(main())
"""


def launch(*command: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes; --multi_gpu is its name for having several at all."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # as in this process: the order of sums is part of the pixels
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.run(
        [*launcher, *options, *command], env=environment, capture_output=True, text=True
    )


def test_a_killed_process_loses_nothing_and_a_rerun_completes_the_series(prompts, tmp_path, capsys):
    options = ["--prompts-file", prompts, "-n", "2", "--steps", "2", "--device", "cpu"]
    command = ["generate", *options, "--out", str(tmp_path / "out")]
    (tmp_path / "killed.py").write_text(KILLED)

    broken = launch(str(tmp_path / "killed.py"), *command)
    assert broken.returncode != 0
    before = state(tmp_path / "out")

    rerun = launch("--module", "guidancekit", *command)
    assert rerun.returncode == 0, rerun.stderr
    after = state(tmp_path / "out")
    made = [Path(line) for line in rerun.stdout.splitlines()]

    assert main(["generate", *options, "--out", str(tmp_path / "alone")]) == 0  # in one process
    alone = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = [path.name for path in alone]
    # Of its share, every other one, the killed process had made the first and no more.
    assert names[1] in before
    assert not {names[3], names[5]} & before.keys()
    assert sorted(after) == sorted(names)  # none is missing, none is there twice
    assert {name: after[name] for name in before} == before  # what was finished is untouched
    assert sorted(path.name for path in made) == sorted(after.keys() - before.keys())
    assert rerun.stderr.count("pictures are there already") <= 1  # only the first process speaks
    for path in alone:
        assert np.array_equal(pixels(tmp_path / "out" / path.name), pixels(path))
