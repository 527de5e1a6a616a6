"""The laboratory's runs: the same whoever makes them, resumed, refused, matched, judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from tiny import tiny_clip

from guidancekit import bundled, measures
from guidancekit.cli import main
from guidancekit.errors import GuidanceError
from guidancekit.lab import claims, report
from guidancekit.lab.bench import Bench, Result, make_arms
from guidancekit.lab.claims import CLAIMS, Claim, Setting, Trial, Verdict
from guidancekit.lab.experiment import Questions, arm
from guidancekit.lab.matching import HIGHEST, LOWEST, ROUNDS, match
from guidancekit.lab.measuring import WORDS, Measured
from guidancekit.lab.metrics import Figure
from guidancekit.lab.scenes import captions
from guidancekit.recipe import Recipe
from guidancekit.registry import methods
from guidancekit.scoring import CLIPScore
from guidancekit.series import Process

STEPS = 3
BASE = Recipe(prompt="-", model="scenes-unet", steps=STEPS)
ASKED = Questions(("a red star", "a ring", "a blue heart above a cross"), seeds=2, batch=4)


def test_the_noise_hangs_on_prompt_and_seed_alone():
    more = replace(ASKED, seeds=3, batch=1)
    assert set(ASKED.asks) < set(more.asks)
    assert len({ask.seed for ask in more.asks}) == 9
    assert not set(ASKED.asks) & set(replace(ASKED, first_seed=50).asks)
    assert [len(batch) for batch in ASKED.batches] == [4, 2]


@pytest.mark.parametrize(
    ("change", "words"), [({"prompts": ()}, "no prompts"), ({"seeds": 0}, "seeds: found 0")]
)
def test_questions_that_ask_nothing_are_refused(change, words):
    with pytest.raises(GuidanceError, match=words):
        replace(ASKED, **change)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bench made by one process, and its arms."""
    bench = Bench(tmp_path_factory.mktemp("whole"), ASKED)
    arms = make_arms(BASE, ["cfg", "apg", "rectified-cfg++"], [2.0, 5.0])
    bench.run(arms)
    return bench, arms


def test_cfg_has_its_scale_and_costs_two_rows_a_step(whole):
    bench, arms = whole
    for each in arms[:2]:
        found = bench.result(each).measured
        assert found.figures["effective_scale"].value == pytest.approx(each.scale, rel=1e-4)
        assert found.rows == 2 * STEPS


def test_what_is_refused_is_said_and_does_not_stop_the_others(whole):
    bench, arms = whole
    results = bench.results(arms)
    refused = [each for each in results if each.refused]
    assert {each.arm.method for each in refused} == {"rectified-cfg++"}
    assert "flow" in refused[0].refused
    text = report.table(results, {})
    assert text.count("refused:") == len(refused) and "cfg 5" in text


def test_two_processes_make_what_one_makes(whole, tmp_path):
    bench, arms = whole
    first, second = (Bench(tmp_path, ASKED, Process("cpu", index, 2)) for index in range(2))
    first.run(arms[:2])
    assert first.results(arms[:2]) is None  # the other half is missing
    second.run(arms[:2])
    for each in arms[:2]:
        assert np.array_equal(second.sample(each).pictures, bench.sample(each).pictures)
    alone, together = (
        json.loads(report.as_json(made.results(arms[:2]), {}, {}))["arms"]
        for made in (bench, second)
    )
    assert [each["figures"] for each in alone] == [each["figures"] for each in together]


def test_a_broken_run_goes_on_where_it_was(whole):
    bench, arms = whole
    paths = [call.path for call in bench.calls(arms[:1])]
    before = bench.sample(arms[0])
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    assert Bench(bench.out, ASKED).result(arms[0]) is None
    bench.run(arms[:1])
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [
        True,
        False,
    ]
    assert np.array_equal(bench.sample(arms[0]).pictures, before.pictures)


def test_a_damaged_file_is_named(whole, tmp_path):
    bench, arms = whole
    path = bench.calls(arms[1:2])[0].path
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(GuidanceError, match=r"damaged.*delete it"):
            bench.sample(arms[1])
    finally:
        path.write_bytes(kept)


def test_methods_with_a_scale_of_their_own_stand_there_once():
    arms = make_arms(BASE, ["cfg", "pag", "cfg(scale=3)"], [2.0, 5.0])
    assert [each.label for each in arms] == ["cfg 2", "cfg 5", "pag", "cfg(scale=3)"]
    assert {each.method for each in make_arms(BASE, ["all"], [])} <= set(methods())
    with pytest.raises(GuidanceError, match="cfgg"):
        make_arms(BASE, ["cfgg"], [])


def test_the_scale_of_cfg_is_found_again():
    found = match(lambda scale: scale, 6.0, start=4.0)
    assert found.reached and found.scale == pytest.approx(6, rel=0.02)
    found = match(lambda scale: 1 / scale, 0.25, start=10.0, falling=True)
    assert found.reached and found.scale == pytest.approx(4, rel=0.02)
    assert not match(lambda scale: 0.2, 1.0, start=4.0).reached


@given(
    target=st.floats(0.05, 0.95),
    slope=st.floats(0.3, 3.0),
    start=st.floats(LOWEST, HIGHEST),
    falling=st.booleans(),
)
def test_any_monotone_figure_is_matched_in_few_runs(target, slope, start, falling):
    tried = []

    def value(scale):
        tried.append(scale)
        risen = scale**slope / (scale**slope + 5**slope)
        return 1 - risen if falling else risen

    ends = sorted(value(scale) for scale in (LOWEST, HIGHEST))
    tried.clear()
    found = match(value, target, start, falling)
    assert len(tried) <= ROUNDS and found.value == value(found.scale)
    assert all(LOWEST <= scale <= HIGHEST for scale in tried)
    if ends[0] <= target <= ends[1]:
        assert found.reached and abs(found.value - target) < 0.1


def test_methods_are_matched_to_the_strength_of_cfg(tmp_path):
    bench = Bench(tmp_path, replace(ASKED, prompts=ASKED.prompts[:2]))
    baseline = arm(BASE, "cfg", 4.0)
    first, second = bench.matched(baseline, ["interval"], "effective-scale")
    assert first.arm == baseline and second.match.target == pytest.approx(4, rel=1e-3)
    value = second.measured.figures["effective_scale"].value
    assert value == second.match.value and value == pytest.approx(4, rel=0.1)
    assert second.arm.scale > 4  # it guides in fewer steps


def test_the_last_of_two_processes_has_all_matches(tmp_path):
    asked = replace(ASKED, prompts=ASKED.prompts[:2])
    baseline, names = arm(BASE, "cfg", 4.0), ["interval", "rescaled-cfg"]
    first, second = (Bench(tmp_path, asked, Process("cpu", index, 2)) for index in range(2))
    assert first.matched(baseline, names, "effective-scale") is None
    found = second.matched(baseline, names, "effective-scale")
    assert [each.arm.method for each in found] == ["cfg", *names]
    again = first.matched(baseline, names, "effective-scale")
    assert [each.arm for each in again] == [each.arm for each in found]


def test_the_steps_say_the_effective_scale_also_of_what_acts_later(tmp_path):
    bench = Bench(tmp_path, replace(ASKED, prompts=ASKED.prompts[:2]))
    made = arm(BASE, "cfg++", 6.0)
    bench.run([made])
    measured = bench.result(made).measured
    scales, cosines = measured.steps[:, 1], measured.steps[:, 3]
    assert scales.mean() == pytest.approx(measured.figures["effective_scale"].value, rel=1e-4)
    assert scales.min() > 1 and np.isnan(cosines).all()


@pytest.mark.parametrize("model", bundled.MODELS)
def test_an_inverted_picture_comes_back(model, tmp_path):
    bench = Bench(tmp_path, replace(ASKED, inverted=True, batch=8))
    base = replace(BASE, model=model, steps=20)
    settings = [("cfg", 1.0), ("cfg", 8.0), ("cfg++", 0.6)]
    arms = [arm(base, method, scale) for method, scale in settings]
    bench.run(arms)
    plain, guided, corrected = (bench.result(each).measured.figures for each in arms)
    assert plain["reconstruction"].value < 0.8 * guided["reconstruction"].value
    assert corrected["reconstruction"].value < 0.8 * guided["reconstruction"].value
    sample = bench.sample(arms[0])
    shown = measures.distance(*(x / 255 for x in (sample.pictures, sample.originals)))
    assert plain["reconstruction"].value == pytest.approx(shown.mean(), rel=1e-4)
    assert len(np.unique(sample.originals, axis=0)) == 6


def test_inverted_runs_have_files_of_their_own(tmp_path):
    bench = Bench(tmp_path, replace(ASKED, inverted=True, batch=8))
    arms = [arm(BASE, "cfg", 1.0)]
    paths = {call.path for call in bench.calls(arms)}
    drawn = Bench(tmp_path, replace(ASKED, batch=8))
    assert not paths & {call.path for call in drawn.calls(arms)}
    euler = arm(replace(BASE, scheduler="euler"), "cfg", 1.0)
    bench.run([euler])
    assert "expected DDIMScheduler" in bench.result(euler).refused


def test_what_a_method_gains_is_said_where_it_is_certain(tmp_path):
    def result(method, **figures):
        found = {name: _figure(*values) for name, values in figures.items()}
        measured = Measured(found, np.ones((4, 4)), rows=60.0, seconds=1.0, memory=float("nan"))
        return Result(arm(BASE, method, 4.0), measured)

    still = dict(adherence=(0.5, 0.0), recall=(0.5, 0.0), frechet=(0.10, 0.0))
    first = result("cfg", **still)
    better = result("apg", adherence=(0.6, 0.01), recall=(0.6, 0.09), frechet=(0.05, 0.01))
    worse = result("cads", adherence=(0.4, 0.01), recall=(0.5, 0.01), frechet=(0.15, 0.01))
    refused = Result(arm(BASE, "tcfg", 4.0), refused="why")
    lines = report.differences(first, [better, worse, refused]).splitlines()[2:]
    gain = "adherence +0.100 ±0.020, frechet -0.0500 ±0.0196"
    loss = "adherence -0.100 ±0.020, frechet +0.0500 ±0.0196"
    assert lines[0] == f"| apg 4 | {gain} | nothing certain | 1.00 | 1.00 |"
    assert lines[1] == f"| cads 4 | nothing certain | {loss} | 1.00 | 1.00 |"
    assert "refused: why" in lines[2]
    path = tmp_path / "forest.png"
    assert report.forest([first, better, worse, refused], path) and path.stat().st_size > 5000
    assert not report.forest([first], tmp_path / "none.png")


def test_the_steps_are_those_of_the_arm_in_the_middle(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot

    def noted(axes, *values, **style):
        drawn.append(style["label"])
        return plot(axes, *values, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    steps = np.ones((4, 4))
    arms = [arm(BASE, "cfg", scale) for scale in (2.0, 4.0, 8.0)]
    results = [Result(each, Measured({}, steps, 60.0, 1.0, 0.0)) for each in arms]
    assert report.over_steps(results, tmp_path / "steps.png")
    assert drawn == ["cfg 4"] * 3
    assert not report.over_steps([Result(arms[0], refused="why")], tmp_path / "none.png")


def test_what_all_settings_share_is_not_in_their_intervals():
    hard = np.linspace(-1, 1, 16)  # captions that are so for both
    own = np.tile([0.01, -0.01], 8)
    figures = [Figure(0.5, 0.5 + hard), Figure(0.6, 0.6 + hard + own)]
    apart = (figures[1] - figures[0]).error / 2
    assert report._own_errors(figures) == pytest.approx([apart, apart])
    assert apart < 0.1 * figures[0].error


def _figure(value, error, count=16):
    """A figure with a standard error."""
    spread = np.linspace(-1, 1, count)
    spread *= error / np.sqrt((count - 1) * np.square(spread).mean())
    return Figure(value, value + spread)


@pytest.mark.parametrize(
    ("direction", "difference", "error", "verdict"),
    [
        ("lower", -1.0, 0.4, "holds"),
        ("lower", 1.0, 0.4, "does not hold"),
        ("lower", -1.0, 0.6, "inconclusive here"),
        ("higher", 1.0, 0.4, "holds"),
        ("higher", -1.0, 0.4, "does not hold"),
        ("same", 0.1, 0.1, "holds"),
        ("same", 1.0, 0.1, "does not hold"),
        ("same", 0.5, 0.2, "inconclusive here"),
    ],
)
def test_the_verdict_follows_from_the_interval(direction, difference, error, verdict):
    side = (Setting("cfg"),)
    claim = Claim("2207.12598", "", side, side, "frechet", direction, margin=0.5)
    still = _figure(3.0, 0.0)
    assert str(Verdict(claim, "m", _figure(3 + difference, error), still)) == verdict
    assert str(Verdict(claim, "m", refused="why")) == "not tested"


def test_verdicts_are_summed_up_by_model():
    side = (Setting("cfg"),)
    first, second = (Claim("1", words, side, side, "frechet", "lower") for words in ("a", "b"))
    still, lower = _figure(3.0, 0.0), _figure(2.0, 0.1)
    found = [Verdict(claim, "m", lower, still) for claim in (first, second)]
    lines = claims.summary([*found, Verdict(first, "n", refused="why")]).splitlines()
    assert lines[0] == "| claim | m | n |"
    assert lines[2:4] == ["| a | holds | not tested |", "| b | holds |  |"]
    assert lines[4] == "|  | holds: 2 | not tested: 1 |"


def test_every_claim_names_what_there_is():
    for claim in CLAIMS:
        settings = [*claim.ours, *claim.theirs, *([claim.reference] if claim.reference else [])]
        assert {each.method for each in settings} <= {*methods(), "interval"}
        assert claim.figure in {*WORDS, "distance"}
        assert (claim.figure == "distance") == (claim.reference is not None)
        assert (claim.direction == "same") == (claim.margin > 0)


def test_a_small_laboratory_gives_the_safe_verdicts(tmp_path):
    """The sign of a large difference, from few pictures; more would be a matter of luck."""
    safe = [claim for claim in CLAIMS if claim.words.startswith("APG saturates less")]
    asked = Questions(tuple(captions(8)), seeds=2)
    base = replace(BASE, steps=10)
    trial = Trial([base], asked, tmp_path, Process("cpu"), safe)
    assert trial.verdicts() is None
    made = []
    trial.run(made.append)
    assert made == trial.calls
    verdicts = trial.verdicts()
    assert verdicts[0].difference.value < 0, verdicts[0]
    assert str(verdicts[0]) != "does not hold"
    paths = claims.write(tmp_path, verdicts, {"steps": 10})
    assert "APG saturates less" in paths[0].read_text()
    content = json.loads(paths[1].read_text())["claims"]
    assert [each["verdict"] for each in content] == [str(each) for each in verdicts]
    earlier = claims.read_intervals(paths[1])
    assert claims.table(verdicts, earlier).endswith("| yes |")
    moved = {key: (high + 1, high + 2) for key, (_, high) in earlier.items()}
    assert claims.table(verdicts, moved).endswith("| no |")
    with pytest.raises(GuidanceError, match=r"expected a claims\.json"):
        claims.read_intervals(paths[0])


def test_claims_are_chosen_by_method():
    chosen = claims.about(["apg", "cads"])
    assert {claim.ours[0].method for claim in chosen} == {"apg", "cads"}
    assert claims.about([]) == list(CLAIMS)
    with pytest.raises(GuidanceError, match=r"no claim about cfgg.*apg"):
        claims.about(["apg", "cfgg"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "cfgg"], "cfg"),
        (["--models", "nobody/nothing"], "--prompts-file"),
        (["--captions", "0"], "no prompts"),
        (["--seeds", "0"], "seeds: found 0"),
        (["--scheduler", "eulr"], "no scheduler"),
        (["--match", "strength"], "invalid choice"),
        (["--claims", "apg", "--against", "nothing.json"], "claims.json"),
        (["--claims", "cfgg"], "no claim about cfgg"),
        (["--clip-score", "nothing/here"], "CLIPScore cannot load"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, words, tmp_path, capsys):
    assert main(["bench", *arguments, "--out", str(tmp_path / "b")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_clip_is_asked_where_it_is_given(tmp_path):
    tiny_clip(tmp_path / "clip")
    command = ["bench", "--methods", "cfg", "--scales", "2", "--captions", "2", "--seeds", "2"]
    command += ["--steps", "2", "--no-plots", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--pictures", "--clip-score", str(tmp_path / "clip")]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())["arms"][0]["figures"]
    paths = sorted((tmp_path / "pictures").rglob("*.png"))
    prompts = [prompt for prompt in captions(2) for _ in range(2)]
    scores = [
        CLIPScore(str(tmp_path / "clip"), prompt)(pixels).item()
        for prompt, path in zip(prompts, paths, strict=True)
        for pixels in [torch.from_numpy(measures.pixels(Image.open(path))).permute(2, 0, 1)[None]]
    ]
    assert figures["clip_score"]["value"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert figures["clip_diversity"]["value"] > 0


def test_the_command_writes_a_report_and_goes_on(tmp_path, capsys):
    command = ["bench", "--methods", "cfg", "--scales", "2,6", "--captions", "2", "--seeds", "2"]
    command += ["--steps", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "2 calls" in shown.err
    paths = shown.out.split()
    assert {path.rpartition("/")[2] for path in paths} >= {"report.md", "report.json", "report.csv"}
    assert any(path.endswith(".png") for path in paths)
    text = (tmp_path / "report.md").read_text()
    assert "true pictures" in text and "cfg 6" in text
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert [len(each["steps"]["cosine"]) for each in arms] == [2, 2]
    rows = (tmp_path / "report.csv").read_text().splitlines()
    assert sum(",effective_scale," in row for row in rows) == 2
    assert main(command) == 0
    assert "0 calls" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == text
    assert bundled.MODELS[0] in text and "guidancekit bench --methods cfg" in text
    assert main([*command, "--pictures", "--no-plots"]) == 0
    folders = [path for path in capsys.readouterr().out.split() if "pictures" in path]
    assert [len(list(Path(folder).glob("*.png"))) for folder in folders] == [4, 4]
