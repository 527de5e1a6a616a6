"""The app: its work as plain data, what it accepts, and its handlers through a real server."""

from __future__ import annotations

import json
import struct
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from guidancekit import APG, CFG, SAG, GuidanceError, Interval
from guidancekit.app import checks, controls, show
from guidancekit.app.jobs import Job
from guidancekit.axes import Axis
from guidancekit.cli import main
from guidancekit.generate import run
from guidancekit.loading import load_pipeline
from guidancekit.recipe import CHUNK, read_recipe, save_picture
from guidancekit.registry import methods, parse
from guidancekit.studio import Result, Studio, spread

STEPS = 4
MODEL = "scenes-unet"
PROMPT = "a red star on a white background"


@pytest.fixture(scope="module")
def studio():
    studio = Studio()
    studio.load(MODEL)
    return studio


def recipe(studio, guidance="CFG()", **changes):
    values = {"prompt": PROMPT, "guidance": guidance, "steps": STEPS, "guidance_scale": 6.0}
    return studio.recipe(**{**values, **changes})


def pixels(image):
    return np.asarray(image)


def ignore(told):
    pass


# --- the studio -----------------------------------------------------------------------------------


def test_a_comparison_is_the_pictures_of_runs_of_their_own(studio):
    recipes = [recipe(studio, text) for text in ("CFG()", "APG(scale=9.0)")]
    told = []
    results = studio.compare(recipes, told.append)
    assert [each for each in told if isinstance(each, Result)] == results
    for result, each in zip(results, recipes, strict=True):
        alone = run(load_pipeline(each, "cpu"), each)
        assert np.array_equal(pixels(result.picture.image), pixels(alone.image))
        assert result.picture.evaluations == alone.evaluations == 2 * STEPS
    a, b = (pixels(each.picture.image) / 255 for each in results)
    assert results[0].distance is None
    assert results[1].distance == pytest.approx(np.sqrt(np.square(a - b).mean()), rel=1e-5)
    assert results[1].distance > 0


def test_fair_is_cfg_at_the_mean_effective_scale_of_b(studio):
    recipes = [recipe(studio), recipe(studio, "CFG(scale=Interval(8.0, 0.5, 5.0))")]
    *_, b, fair = studio.compare(recipes, ignore, fair=True)
    inside = b.picture.effective_scale.count(8.0)
    assert 0 < inside < STEPS
    expected = round((8 * inside + STEPS - inside) / STEPS, 2)
    assert parse(fair.picture.recipe.guidance) == CFG(scale=expected)
    assert fair.scale == pytest.approx(b.scale, abs=0.01)
    assert fair.picture.recipe.seed == b.picture.recipe.seed


def test_every_step_is_traced(studio):
    cfg, late = studio.compare(
        [recipe(studio), recipe(studio, "CFG(scale=Interval(8.0, 0.0, 1.0))")], ignore
    )
    assert [point.index for point in cfg.points] == list(range(STEPS))
    noise = [point.noise for point in cfg.points]
    assert noise == sorted(noise, reverse=True)
    for point in cfg.points:
        assert point.cosine == pytest.approx(1, rel=1e-4)
        assert point.difference > 0
    unguided = [point for point in late.points if point.noise > 1.01]
    assert unguided
    assert all(np.isnan([p.difference, p.cosine]).all() for p in unguided)
    assert show.curves([late], "cosine")["step"].tolist() == [
        p.index + 1 for p in late.points if p not in unguided
    ]
    scales = show.curves([late], "scale")["scale"].tolist()
    assert scales == pytest.approx([1.0 if p in unguided else 8.0 for p in late.points], rel=1e-3)


def test_the_scale_of_what_acts_after_the_step_is_seen(studio):
    result = studio.compare([recipe(studio, "CFGPlusPlus(scale=0.6)")], ignore)[0]
    assert all(np.isnan(point.cosine) for point in result.points)
    scales = show.curves([result], "scale")["scale"].tolist()
    assert scales == pytest.approx(result.picture.effective_scale, rel=1e-3) and min(scales) > 0.5


def test_apg_leaves_the_direction_of_cfg(studio):
    apg = studio.compare([recipe(studio, "APG(scale=9.0)")], ignore)[0]
    assert all(point.cosine < 0.999 for point in apg.points[1:])


def test_stopping_leaves_the_pipeline_as_it_was(studio):
    before = studio.compare([recipe(studio)], ignore)[0]

    def stop(told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.compare([recipe(studio, "SAG()")], stop)
    assert not hasattr(studio._pipe.unet, "_diffusers_hook")
    after = studio.compare([recipe(studio)], ignore)[0]
    assert np.array_equal(pixels(before.picture.image), pixels(after.picture.image))


def test_a_scheduler_is_for_one_run_only(studio):
    own = studio.compare([recipe(studio)], ignore)[0]
    other = studio.compare([recipe(studio, scheduler="dpm++2m")], ignore)[0]
    again = studio.compare([recipe(studio)], ignore)[0]
    assert np.array_equal(pixels(own.picture.image), pixels(again.picture.image))
    assert not np.array_equal(pixels(own.picture.image), pixels(other.picture.image))


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(studio, tmp_path):
    with pytest.raises(GuidanceError, match="no model folder"):
        studio.load(str(tmp_path / "nothing"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    with pytest.raises(GuidanceError, match="cannot load"):
        studio.load(str(tmp_path))
    assert studio.compare([recipe(studio)], ignore)


def test_another_model_is_loaded_and_back(tiny_folder):
    studio = Studio()
    first = studio.compare([recipe(studio)], ignore)[0]
    other = studio.compare([recipe(studio, model=tiny_folder)], ignore)[0]
    again = studio.compare([recipe(studio)], ignore)[0]
    assert other.picture.recipe.model == tiny_folder
    assert np.array_equal(pixels(first.picture.image), pixels(again.picture.image))


def test_the_cost_is_known_before(studio):
    two = [recipe(studio), recipe(studio, "SAG()", steps=10)]
    studio.seconds_per_row[MODEL] = 0.5
    cost = studio.cost(two)
    assert (cost.pictures, cost.evaluations, cost.seconds) == (2, 2 * STEPS + 20, 14.0)
    assert str(cost) == "2 pictures, at most 28 network evaluations, about 14 s"
    assert studio.cost([recipe(studio, model="another/model")]).seconds is None


def test_the_film_strips_end_in_the_picture(studio):
    told = []
    recipes = [recipe(studio), recipe(studio, "APG()")]
    strips = studio.trajectory(recipes, 3, told.append)
    assert told[-1] is strips
    assert strips.width > 4 * 160
    assert spread(30, 4) == [0, 10, 19, 29]
    assert spread(2, 8) == [0, 1]
    with pytest.raises(GuidanceError, match="no method"):
        studio.trajectory([], 3, ignore)


def test_strangers_load_no_models_and_name_no_files(tmp_path):
    public = Studio(public=True)
    with pytest.raises(GuidanceError, match="open to others"):
        public.load(str(tmp_path))
    for text in (f"LinearAG(table={str(tmp_path)!r})", "AutoGuidance(network='a/b')"):
        with pytest.raises(GuidanceError, match="name files"):
            recipe(public, text)
    with pytest.raises(GuidanceError, match="name files"):
        public.allow(repr(Axis.read("linear-ag.table", f"{tmp_path}/table.json").values))
    assert recipe(public, "AutoGuidance(network='scenes:weak')")
    assert recipe(Studio(), "AutoGuidance(network='a/b')")


# --- jobs -----------------------------------------------------------------------------------------


def test_a_job_tells_what_it_does_and_what_it_fails_of():
    def work(tell):
        tell(1)
        tell(None)
        tell(2)
        raise ValueError("broken")

    job, seen = Job(), []
    with pytest.raises(ValueError, match="broken"):
        for told in job.stream(work):
            seen.append(told)
    assert seen == [1, 2]
    assert not job.stopped


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_job_stops_at_its_next_step(how):
    step, go = [], threading.Semaphore(1)

    def work(tell):
        for i in range(1000):
            go.acquire()
            step.append(i)
            tell(i)

    job = Job()
    stream = job.stream(work)
    assert next(stream) == 0
    if how == "stop":
        job.stop()
        go.release()
        assert list(stream) == []
    else:
        threading.Timer(0.2, go.release).start()  # close() waits for the step under way
        stream.close()
    assert step == [0, 1]
    assert job.stopped


# --- controls: text in, text out ------------------------------------------------------------------


def test_controls_edit_the_text():
    text = "APG(scale=12.0) + SAG(scale=0.5)"
    assert controls.edit(text, (0, "eta"), 0.5) == "APG(scale=12.0, eta=0.5) + SAG(scale=0.5)"
    assert parse(controls.edit(text, (1, "scale"), 0.25)).terms[1] == SAG(scale=0.25)
    under = controls.set_schedule(text, (0, "scale"), "interval", None)
    assert parse(under).terms[0] == APG(scale=Interval(12.0))
    lower = controls.edit(under, (0, "scale", "low"), 0.5)
    assert parse(lower).terms[0] == APG(scale=Interval(12.0, low=0.5))
    back = controls.set_schedule(lower, (0, "scale"), controls.NUMBER, None)
    assert back == text
    assert controls.set_method(text, 2, "cfg", None).endswith(" + CFG()")
    assert controls.set_preset("APG()", 0, "sdxl") == repr(APG.preset("sdxl"))
    assert controls.remove(text, 0) == "SAG(scale=0.5)"
    for path in ((0, "nothing"), (2, "scale"), (0, "eta", "deeper")):
        with pytest.raises(GuidanceError, match="has"):
            controls.edit(text, path, 1.0)
    with pytest.raises(GuidanceError, match="from 0 to 1"):
        controls.edit(text, (0, "eta"), 7.0)


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_has_controls(name):
    import gradio as gr

    try:
        text = controls.set_method("CFG()", 0, name, "scenes")
    except GuidanceError as error:
        pytest.fail(f"{name}: {error}") if name not in NEED_MORE else None
        return
    with gr.Blocks():
        box, drawn = gr.Textbox(text), gr.State(text)
        controls._draw(text, MODEL, guidance=box, drawn=drawn, allow=ignore)
        labels = [
            b.label for b in gr.context.Context.root_block.blocks.values() if hasattr(b, "label")
        ]
    from guidancekit.parameters import parameters

    for parameter in parameters(methods()[name]):
        shown = [label for label in labels if label and label.startswith(parameter.name)]
        assert shown or parameter.kind == "object", parameter.name


NEED_MORE: set[str] = set()

# --- what the server accepts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (checks.text, ("prompt", "a" * 1001, 1000)),
        (checks.text, ("prompt", 3, 1000)),
        (checks.number, ("scale", float("nan"), 0, 10)),
        (checks.number, ("scale", "7", 0, 10)),
        (checks.number, ("scale", True, 0, 10)),
        (checks.number, ("scale", 11, 0, 10)),
        (checks.whole, ("seed", 1.5, 0, 10)),
        (checks.whole, ("seed", -1, 0, 10)),
        (checks.whole, ("seed", None, 0, 10)),
    ],
)
def test_values_out_of_bounds_are_refused(check, arguments):
    with pytest.raises(GuidanceError, match=f"{arguments[0]}: found .*, expected"):
        check(*arguments)


def png(chunks: bytes = b"") -> bytes:
    """A one-pixel PNG with further chunks."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
    extra = chunk(b"zTXt", chunks) if chunks else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"no png", "not a PNG"),
        ("a.png", png(), "no guidancekit recipe"),
        ("a.png", png()[:-20], "cannot be read|no guidancekit recipe"),
        ("a.png", png(CHUNK.encode() + b"\0\0" + zlib.compress(b"a" * 50_000_000)), "."),
        ("a.png", png(CHUNK.encode() + b"\0\0" + zlib.compress(b'{"prompt": 3}')), "lacks|found"),
        ("a.json", b"\xff\xfe", "UTF-8"),
        ("a.json", b"[" * 60_000, "not valid JSON"),
        ("a.json", b" " * 70_000, "bytes, expected at most"),
        ("a.json", b'{"prompt": "x", "model": "y", "guidance": "__import__(1)"}', "no method"),
        ("a.gif", b"GIF89a", "expected .png or .json"),
        ("a.png", b"\0" * (checks.MAX_FILE + 1), "bytes, expected at most"),
    ],
)
def test_files_of_strangers_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GuidanceError, match=message):
        checks.recipe_in(str(path))


def test_no_file_is_no_recipe():
    with pytest.raises(GuidanceError, match="no file"):
        checks.recipe_in(None)


def test_errors_of_handlers_are_messages(caplog):
    import gradio as gr

    def refused(x):
        raise GuidanceError("found <b>, expected better.")

    def broken(x):
        yield x
        raise RuntimeError("secret /path")

    with pytest.raises(gr.Error, match="found &lt;b&gt;, expected better"):
        checks.readable(refused)(1)
    stream = checks.readable(broken)(1)
    assert next(stream) == 1
    with pytest.raises(gr.Error, match="RuntimeError") as raised:
        next(stream)
    assert "secret" not in str(raised.value)
    assert "secret" in caplog.text


def test_text_of_others_cannot_become_markup():
    assert "<script>" not in show.status("<script>alert(1)</script>")
    assert show.escaped("a|b *c* <d>") == r"a\|b \*c\* \<d\>"


# --- through a real server ------------------------------------------------------------------------


@pytest.fixture
def client(url):
    return Client(url, verbose=False)


def settings(steps=STEPS, seed=0, prompt=PROMPT, scale=6.0, **rest):
    values = {"negative": "", "scheduler": "the model's own", "width": None, "height": None, **rest}
    return [
        prompt,
        values["negative"],
        scale,
        seed,
        steps,
        values["scheduler"],
        values["width"],
        values["height"],
    ]


COMPARED = ["seed", "status", "wipe", "fair", "figures", "scale", "difference", "cosine"]


def compare(client, a="CFG()", b="APG()", fair=False, lock=True, **options):
    found = client.predict(*settings(**options), lock, a, b, fair, api_name="/compare")
    return dict(zip([*COMPARED, "py_a", "py_b", "sh_a", "sh_b", "files"], found, strict=True))


def files_of(found):
    value = found["files"]
    return [Path(each) for each in (value["value"] if isinstance(value, dict) else value)]


def test_compare_through_the_server(client, studio, tmp_path, monkeypatch):
    found = compare(client, a="CFG(rescale=0.5)", b="APG(scale=9.0) + SAG(scale=0.5)", fair=True)
    assert "Done" in found["status"]
    files = files_of(found)
    assert len(files) == 3
    made = read_recipe(files[1])
    assert parse(made.guidance) == APG(scale=9.0) + SAG(scale=0.5)
    expected = studio.compare([made], ignore)[0].picture.image
    assert np.array_equal(pixels(Image.open(files[1])), pixels(expected))
    for which, file in (("a", files[0]), ("b", files[1])):
        monkeypatch.chdir(tmp_path)
        exec(found[f"py_{which}"], {})
        assert np.array_equal(pixels(Image.open("picture.png")), pixels(Image.open(file)))


def test_a_new_seed_is_drawn_unless_it_is_kept(client):
    assert compare(client, lock=True, seed=7)["seed"] == 7
    seeds = {compare(client, lock=False, seed=7, steps=1)["seed"] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a" * 1001}, "1,001 characters"),
        ({"steps": 151}, "151 is greater than maximum value 150"),
        ({"seed": 2**33}, "seed: found"),
        ({"scale": 1000}, "1000 is greater than maximum value 20"),
        ({"width": 4096, "height": 64}, "width: found"),
        ({"scheduler": "no-such"}, "no-such is not in the list"),
        ({"a": "nonsense("}, "expected a method"),
        ({"b": "APG(eta=7)"}, "from 0 to 1"),
        ({"b": "PAG(layers='no_such_layer')"}, "no_such_layer"),
    ],
)
def test_bad_input_is_a_message(client, change, message):
    with pytest.raises(Exception, match=message):
        compare(client, **change)
    assert "Done" in compare(client, steps=1)["status"]


def test_a_run_is_stopped_within_a_step_and_the_app_goes_on(client):
    job = client.submit(*settings(steps=150), True, "CFG()", "APG()", False, api_name="/compare")
    waited = time.monotonic()
    while len(job.outputs()) < 3:
        assert time.monotonic() - waited < 120
        time.sleep(0.02)
    client.predict(api_name="/stop")
    assert "Stopped" in str(job.result(timeout=60))
    assert "Done" in compare(client, steps=1)["status"]


def test_two_visitors_at_once_get_their_own(url):
    clients = [Client(url, verbose=False) for _ in range(2)]
    jobs = [
        each.submit(*settings(seed=seed), True, "CFG()", "APG()", False, api_name="/compare")
        for seed, each in enumerate(clients)
    ]
    for seed, job in enumerate(jobs):
        found = dict(zip([*COMPARED, 1, 2, 3, 4, "files"], job.result(timeout=300), strict=True))
        assert found["seed"] == seed
        assert all(read_recipe(file).seed == seed for file in files_of(found))


def test_a_recipe_sets_the_controls(client, tmp_path, studio):
    made = replace(recipe(studio, "APG(scale=9.0)"), negative="blue", seed=5, scheduler="euler")
    path = tmp_path / "made.png"
    save_picture(Image.new("RGB", (8, 8)), made, path)
    found = client.predict(handle_file(str(path)), api_name="/load_recipe")
    assert found[:6] == (PROMPT, "blue", 6.0, 5, STEPS, "euler")
    assert "APG(scale=9.0)" in found
    other = tmp_path / "foreign.png"
    Image.new("RGB", (8, 8)).save(other)
    with pytest.raises(Exception, match="carries no guidancekit recipe"):
        client.predict(handle_file(str(other)), api_name="/load_recipe")


def test_a_grid_through_the_server(client, tmp_path):
    found = client.predict(
        *settings(),
        "CFG()",
        "method",
        "cfg, apg(eta=0.5)",
        "scale",
        "2, 8",
        "3, 4",
        api_name="/grid",
    )
    files = [
        Path(each) for value in found if isinstance(value, dict) for each in value.get("value", [])
    ]
    table = json.loads(next(each for each in files if each.suffix == ".json").read_text())
    assert len(table["pictures"]) == 2 * 2 * 2
    assert {each["recipe"]["seed"] for each in table["pictures"]} == {3, 4}
    assert {each["recipe"]["guidance_scale"] for each in table["pictures"]} == {2.0, 8.0}
    with pytest.raises(Exception, match="200 cells, expected up to 100"):
        values = ", ".join(map(str, range(1, 201)))
        client.predict(*settings(), "CFG()", "steps", values, "nothing", "", "", api_name="/grid")


def test_a_trajectory_through_the_server(client):
    found = client.predict(*settings(), "CFG()", "APG()", "cfg++", 3, api_name="/trajectory")
    assert Image.open(found[-1]["value"] if isinstance(found[-1], dict) else found[-1]).width > 500


def test_a_model_that_cannot_be_loaded_is_a_message(client):
    *_, told = client.predict("no/such-model", api_name="/load")
    assert "The model before stays in use" in told
    assert "Done" in compare(client, steps=1)["status"]


def test_the_command_says_what_is_wrong(url, capsys):
    assert main(["app", "--model", "./nothing"]) == 2
    assert "no model folder" in capsys.readouterr().err
    port = url.rstrip("/").rpartition(":")[2]
    assert main(["app", "--port", port]) == 2
    assert "cannot serve the app" in capsys.readouterr().err


def test_a_recipe_runs_in_its_own_dtype(tiny_folder):
    studio = Studio(tiny_folder)
    first = recipe(studio, model=tiny_folder)
    half = replace(first, dtype="bfloat16")
    studio.compare([half], ignore)
    assert studio._pipe.unet.dtype == torch.bfloat16
    studio.compare([first], ignore)
    assert studio._pipe.unet.dtype == torch.float32
