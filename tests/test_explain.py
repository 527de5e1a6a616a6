"""`guidancekit explain`: its figures against closed forms, and the page that they are drawn on."""

from __future__ import annotations

import html
import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from steps import random_triple
from tiny import TEXT_WIDTH, _unet, sd3_prompt, tiny_sd, tiny_sd3
from tiny_families import final_latents, pipeline

from guidancekit import CFG, GuidanceError
from guidancekit.cli import main
from guidancekit.generate import run
from guidancekit.lab.explain import FIGURES, Watcher, explain, rms, shares, split, watch
from guidancekit.lab.explain_page import page
from guidancekit.lab.svg import Axis, Line, legend, number, plot
from guidancekit.methods.cfgpp import gains
from guidancekit.recipe import Recipe

STEPS, W, SEEDS = 5, 5.0, [3, 0, 7]
RECIPE = Recipe("a red circle", "tiny", guidance_scale=W, steps=STEPS)


def seen(guidance, pipe=None, seeds=SEEDS, **changes):
    return watch(pipe or tiny_sd(), replace(RECIPE, guidance=guidance, **changes), seeds)


# --- the figures of one step --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 9, 7), (4, 3, 6, 8)], ids=str)
def test_a_change_is_the_sum_of_its_parts(shape):
    cond, uncond, _ = random_triple(3, *shape)
    parts = split(cond - uncond, cond)
    for pair in (("parallel", "orthogonal"), ("low", "high")):
        torch.testing.assert_close(sum(parts[name] for name in pair), parts["size"])
    size, parallel, orthogonal = (rms(parts[k]) for k in ("size", "parallel", "orthogonal"))
    torch.testing.assert_close(parallel**2 + orthogonal**2, size**2)
    by_hand = [  # each sample for itself
        abs(float((d * c).sum())) / float(c.norm()) / math.sqrt(c.numel())
        for d, c in zip(cond - uncond, cond, strict=True)
    ]
    torch.testing.assert_close(parallel, torch.tensor(by_hand))


def test_a_flat_change_is_low_and_a_checkerboard_high():
    rows = torch.arange(8)
    checkers = (-1.0) ** (rows + rows[:, None]).expand(1, 4, 8, 8)
    _, cond, _ = random_triple(1, 4, 8, 8)
    flat = split(torch.full((1, 4, 8, 8), 0.5), cond)
    assert rms(flat["low"]) == pytest.approx(0.5)
    assert rms(flat["high"]) == pytest.approx(0, abs=1e-6)
    # The binomial kernel has no response at this frequency, but at the borders.
    rough = split(checkers, cond)
    assert rms(rough["high"]) == pytest.approx(1, abs=0.01)
    assert rms(rough["low"]) < 0.1


def test_latents_without_a_grid_have_no_frequencies():
    cond, uncond, _ = random_triple(2, 5, 6)
    assert split(cond - uncond, cond).keys() == {"size", "parallel", "orthogonal"}
    cond, uncond, _ = random_triple(2, 4, 2, 2)
    assert split(cond - uncond, cond).keys() == {"size", "parallel", "orthogonal"}


@pytest.mark.parametrize("wide", [0.5, 2.0])
def test_shares_of_two_gaussians_are_those_of_the_linear_decomposition(wide):
    """x0 ~ N(m, s^2) given the prompt and N(0, 1) without: the optimal predictions are linear."""
    generator = torch.Generator().manual_seed(0)
    sigma, mean = 2.0, torch.randn(1, 4, 6, 6, generator=generator)
    noisy = torch.randn(16, 4, 6, 6, generator=generator)
    x = mean + noisy - noisy.mean(0)  # so that the batch has the mean of the class
    of_class, of_all = wide**2 / (wide**2 + sigma**2), 1 / (1 + sigma**2)
    cond, uncond = mean + of_class * (x - mean), of_all * x
    shift = ((1 - of_all) * mean).square().sum()
    rest = ((of_class - of_all) * (x - mean)).square().sum((1, 2, 3)).mean()
    expected = [shift, rest if wide > 1 else 0, 0 if wide > 1 else rest]
    found = shares(cond - uncond, x)
    torch.testing.assert_close(found, torch.tensor(expected) / (shift + rest))


def test_shares_are_counted_sample_by_sample():
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(4, 1, 1, 1)
    d = 2 + torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1) * x  # takes back, enlarges, ...
    # The mean difference is 2 + (-3 + 1 + 1 - 3) / 4 = 1; the rests are -2, 2, 2, -2.
    torch.testing.assert_close(shares(d, x), torch.tensor([1 / 5, 2 / 5, 2 / 5]))
    alone = shares(torch.eye(6).view(6, 6, 1, 1), torch.eye(6).view(6, 6, 1, 1))
    assert alone[0] == pytest.approx(1 / 6)  # what the page calls chance
    assert torch.isnan(shares(d[:1], x[:1])).all()


# --- whole runs -----------------------------------------------------------------------------------


def scales(found):
    """The effective scale [steps - 1, seeds]; the last of these DDIM steps leads nowhere."""
    scale = found.figures["scale"]
    assert np.isnan(scale[-1]).all()
    return scale[:-1]


def test_plain_cfg_is_its_closed_form():
    found = seen("CFG()")
    figures = found.figures
    assert figures.keys() == set(FIGURES)
    assert all(figures[name].shape == (STEPS, len(SEEDS)) for name in FIGURES)
    np.testing.assert_allclose(scales(found), W, rtol=1e-4)
    np.testing.assert_allclose(figures["cosine"], 1, rtol=1e-5)
    for part in ("size", "parallel", "orthogonal", "low", "high"):
        update, difference = figures[f"update {part}"], figures[f"difference {part}"]
        np.testing.assert_allclose(update, (W - 1) * difference, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.shares.sum(1), 1, rtol=1e-5)
    assert found.evaluations.tolist() == [2] * STEPS
    assert (np.diff(found.noise) < 0).all()
    assert not found.notes


def test_the_size_of_the_guided_prediction_is_that_of_the_predictions():
    """By hand, from the predictions of every step."""
    pipe, ratios = tiny_sd(), []

    def look(step, guided):
        pairs = zip(guided.x0, step.cond.x0, strict=True)
        ratios.append([float(a.norm() / b.norm()) for a, b in pairs])

    draws = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    with CFG().attach(pipe, watch=look):
        pipe(
            [RECIPE.prompt] * len(SEEDS), guidance_scale=W, num_inference_steps=STEPS,
            generator=draws,
        )  # fmt: skip
    np.testing.assert_allclose(seen("CFG()").figures["ratio"], ratios, rtol=1e-5)


def test_apg_takes_out_the_parallel_part_and_no_more():
    figures = seen("APG(eta=0.0, norm_threshold=0, momentum=0)").figures
    np.testing.assert_allclose(figures["update parallel"], 0, atol=1e-6)
    np.testing.assert_allclose(
        figures["update orthogonal"], (W - 1) * figures["difference orthogonal"], rtol=1e-4
    )
    cosine = figures["difference orthogonal"] / figures["difference size"]
    np.testing.assert_allclose(figures["cosine"], cosine, rtol=1e-4)


@pytest.mark.parametrize("lam", [0.6, 1.5])
def test_cfg_plus_plus_shows_the_clean_estimate_behind_the_next_latent(lam):
    found = seen(f"CFGPlusPlus(scale={lam})")
    figures = found.figures
    np.testing.assert_allclose(
        figures["update size"], abs(lam - 1) * figures["difference size"], rtol=1e-3
    )
    np.testing.assert_allclose(figures["cosine"], math.copysign(1, lam - 1), rtol=1e-4)
    last = 0.0292  # sigma / alpha after the last of these DDIM steps, which ends at timestep 0
    expected = lam * np.array(gains((*found.noise, last)))
    np.testing.assert_allclose(scales(found).mean(1), expected[:-1], rtol=1e-2)


def test_steps_outside_of_an_interval_are_unguided():
    found = seen("CFG(scale=Interval(6.0, low=0.3, high=3.0))")
    inside = (found.noise > 0.3) & (found.noise <= 3)
    assert 0 < inside.sum() < STEPS
    assert found.evaluations.tolist() == (1 + inside).tolist()
    np.testing.assert_allclose(scales(found).mean(1), np.where(inside, 6, 1)[:-1], rtol=1e-4)
    assert (np.isnan(found.figures["difference size"]).all(1) == ~inside).all()
    assert ((found.figures["update size"] == 0).all(1) == ~inside).all()
    assert (np.isnan(found.shares).all(1) == ~inside).all()


def test_pictures_are_those_of_generate():
    pipe = tiny_sd()
    recipe = replace(RECIPE, guidance="APG()", negative="a blue star")
    for picture, seed in zip(watch(pipe, recipe, SEEDS).pictures, SEEDS, strict=True):
        alone = run(pipe, replace(recipe, seed=seed)).image
        away = np.abs(np.asarray(picture, int) - np.asarray(alone, int))
        assert away.max() <= 1  # of 255: a batch is summed in another order


def test_only_chosen_steps_are_decoded_and_an_unguided_row_has_no_uncond():
    strip = watch(tiny_sd(), replace(RECIPE, guidance="CFG()"), [0], frames=3).strip
    assert sorted(strip) == [0, 2, 4]
    assert strip[0].keys() == {"cond", "uncond", "guided", "cfg"}
    assert strip[0]["cond"].shape == (32, 32, 3)
    np.testing.assert_array_equal(strip[2]["guided"], strip[2]["cfg"])
    strip = watch(tiny_sd(), replace(RECIPE, guidance="PAG()"), [0], frames=2).strip
    assert strip[4].keys() == {"cond", "guided"}


# --- what cannot be had ------------------------------------------------------------------------


def test_a_method_without_an_unconditional_branch_says_what_is_left_out():
    found = explain(tiny_sd(), replace(RECIPE, guidance="PAG()"), SEEDS)
    assert np.isnan(found.method.figures["scale"]).all()  # there is nothing to count along
    assert (found.method.figures["update size"] > 0).all()
    assert any("does not evaluate both branches" in text for text in found.notes)
    text = page(found)
    assert "Size of the update" in text
    for missing in ("Effective scale", "Size of the difference", "What the difference consists"):
        assert missing not in text


def test_a_distilled_model_is_shown_without_cfg():
    pipe = tiny_sd()
    pipe.unet = _unet(TEXT_WIDTH, time_cond_proj_dim=8).eval()
    found = explain(pipe, replace(RECIPE, guidance="PAG()"), [0, 1])
    assert found.baseline is None
    assert any(text.startswith("Left out: CFG beside it.") for text in found.notes)
    assert "plain CFG" not in re.sub(r"<figcaption>.*?</figcaption>", "", page(found))


def test_plain_cfg_is_not_held_against_itself():
    found = explain(tiny_sd(), replace(RECIPE, guidance="CFG()"), [0])
    assert found.baseline is None
    assert found.notes == [
        "Left out: what the difference consists of. That takes two seeds or more."
    ]
    assert explain(tiny_sd(), replace(RECIPE, guidance="CFG(rescale=0.7)"), [0]).baseline


def test_the_latent_s_later_moves_are_mentioned():
    found = explain(tiny_sd(), replace(RECIPE, guidance="PCG()"), [0])
    assert any("after the scheduler's step" in text for text in found.notes)


@pytest.mark.parametrize("guidance", ["NAG()", "CADS()", "CFG(3.0) + CADS()"])
def test_what_is_in_the_conditional_prediction_already_is_mentioned(guidance):
    found = explain(tiny_sd(), replace(RECIPE, guidance=guidance, negative="a star"), [0])
    assert any(text.startswith("Not in the update: ") for text in found.notes)
    assert ("The update, along and across" in page(found)) == (guidance != "NAG()")


def test_a_flow_model_starts_with_noise_alone():
    pipe, texts = tiny_sd3(), sd3_prompt(2)  # it has no text encoders
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
    encoded = [texts[name] for name in (*names, "negative_pooled_prompt_embeds")]
    pipe.encode_prompt = lambda **_: encoded
    found = explain(pipe, replace(RECIPE, guidance="CFGZeroStar()"), [0, 1])
    assert math.isinf(found.method.noise[0])
    text = page(found)
    assert "noise level σ/(α+σ)" in text
    assert "nan" not in text


def test_an_unknown_scheduler_has_neither_noise_levels_nor_clean_latents():
    pipe = tiny_sd()
    pipe.scheduler = diffusers.IPNDMScheduler.from_config(pipe.scheduler.config)
    found = explain(pipe, replace(RECIPE, guidance="CFG(scale=3.0)"), [0, 1])
    assert np.isnan(found.method.noise).all()
    np.testing.assert_allclose(found.method.figures["scale"], 3, rtol=1e-4)
    assert any(text.startswith("Left out: all that needs clean latents.") for text in found.notes)
    text = page(found)
    assert "Effective scale" in text
    assert "Size of the update" not in text
    assert "step by step" not in text


@pytest.mark.parametrize("name", ["flux", "flux-img2img", "qwen-image", "dit", "wan", "ltx"])
def test_packed_and_video_latents_are_measured_too(name):
    watcher = Watcher(CFG(3.0), 2, lambda: None)
    with watcher.guidance.attach(pipeline(name), watch=watcher):
        final_latents(name, pipeline(name), 4.0, (0, 1))
    for figures in watcher.figures:
        assert figures.keys() == set(FIGURES) - {"scale"}
        torch.testing.assert_close(figures["update size"], 2 * figures["difference size"])
    decodes = name in ("flux-img2img", "dit")  # the others have no image autoencoder
    assert bool(watcher.strip) == decodes
    assert bool(watcher.notes) != decodes


@pytest.mark.parametrize(
    ("seeds", "match"), [([], "seeds: found none"), ([0, -1], "seed: found -1, expected a whole")]
)
def test_seeds_are_checked(seeds, match):
    with pytest.raises(GuidanceError, match=match):
        watch(tiny_sd(), RECIPE, seeds)


# --- the page -------------------------------------------------------------------------------------

HOSTILE = """</title><script>alert("1")</script><img src=x onerror='alert(1)'>&amp;]]>\u202e{}"""
VOID = {"meta", "img", "br"}


class Checker(html.parser.HTMLParser):
    """Collects tags, attributes and text, and counts that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def hostile_page():
    texts = {"prompt": f"a red circle {HOSTILE}", "negative": HOSTILE, "model": HOSTILE}
    recipe = replace(RECIPE, **texts, guidance="APG()")
    return page(explain(tiny_sd(), recipe, SEEDS))


def test_the_page_is_well_formed_and_shows_hostile_texts_as_text(hostile_page):
    found = Checker(hostile_page)
    assert found.tags <= set(
        "html head meta title style body header h1 h2 h3 p a dl div dt dd table thead tbody tr th "
        "td small img span br figure figcaption ul li svg path text circle details summary footer"
        .split()
    )  # fmt: skip
    assert "".join(found.words).count(HOSTILE) == 4  # title, heading, negative prompt, model
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_nothing_is_fetched_and_nothing_is_run(hostile_page):
    links = [v for k, v in Checker(hostile_page).attributes if k in ("src", "href", "srcset")]
    assert links
    for link in links:
        assert link.startswith(("data:image/png;base64,", "https://arxiv.org/abs/"))
    assert "url(" not in hostile_page
    assert "@import" not in hostile_page
    assert "default-src 'none'; img-src data:" in html.unescape(hostile_page)


def test_every_plot_is_xml_with_finite_numbers(hostile_page):
    drawn = re.findall(r"<svg.*?</svg>", hostile_page)
    plots = [svg for svg in map(ElementTree.fromstring, drawn) if svg.get("role") == "img"]
    assert len(plots) == 12
    for svg in plots:
        assert svg.get("aria-label")
        assert svg.findall(".//circle/title")
    assert not re.search(r"\b(nan|inf)\b", "".join(drawn))


def test_every_colour_is_there_in_light_and_dark_and_on_paper(hostile_page):
    style = re.search(r"<style>(.*?)</style>", hostile_page, re.S).group(1)
    roots = re.findall(r":root \{(.*?)\}", style, re.S)
    defined = [set(re.findall(r"--(\w+):", root)) for root in roots]
    assert len(defined) == 3
    assert defined[0] == defined[1] == defined[2]
    used = set(re.findall(r"var\(--(\w+)\)", hostile_page)) - {"own"}  # set where it is used
    assert {"method", "cfg", "one", "two", "three"} <= used <= defined[0]


def test_figures_at_a_glance_are_those_of_the_runs():
    found = explain(tiny_sd(), replace(RECIPE, guidance="APG(norm_threshold=0, momentum=0)"), SEEDS)
    text = page(found)

    def row(name):
        (cells,) = re.findall(rf"<th>{re.escape(name)}</th>(.*?)</tr>", text)
        return re.findall(r"<td>(.*?)</td>", cells)

    assert row("network evaluations per picture") == ["10", "10"]
    assert row("effective scale, mean over the steps")[1] == "5"
    assert row("share of the update along x0(cond), in energy")[0] == "0 %"
    squares = [found.baseline.figures[f"update {k}"] ** 2 for k in ("parallel", "size")]
    expected = 100 * squares[0].mean() / squares[1].mean()
    assert row("share of the update along x0(cond), in energy")[1] == f"{expected:.0f} %"


# --- plots ----------------------------------------------------------------------------------------


def test_axes_end_at_round_numbers():
    axis = Axis.over("", [0.13, 7.2, math.nan, math.inf], include=[0])
    assert (axis.start, axis.end) == (0, 8)
    assert axis.ticks == [0, 2, 4, 6, 8]
    assert Axis.over("", [1 + 1e-9, 0]).end == 1  # not the next one for a rounding error
    for values in ([2.0, 2.0], [0.0], [-3.0], [-1e-7, 1e9], [1e-12, 2e-12], []):
        axis = Axis.over("", values)
        assert len(axis.ticks) > 1
        assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in (*values, *axis.ticks))
    assert Axis.over("", [-0.4, 0.9]).ticks == [-0.5, 0, 0.5, 1]


def test_a_logarithmic_axis_may_run_down():
    axis = Axis("", 100, 1, log=True)
    assert [axis.at(value) for value in (100, 10, 1)] == pytest.approx([0, 0.5, 1])
    assert sorted(axis.ticks) == [1, 2, 5, 10, 20, 50, 100]
    assert Axis("", 1e6, 1e-2, log=True).ticks[0] == 0.01


def test_a_gap_interrupts_a_curve():
    line = Line("a", [1, 2, 3, 4, 5], [1, 1, math.nan, 2, 2], "one", low=[0] * 2 + [math.nan] * 3,
                high=[2] * 2 + [math.nan] * 3)  # fmt: skip
    svg = plot([line], Axis("x", 1, 5), Axis("y", 0, 2), "title")
    assert svg.count('class="curve"') == 2
    assert svg.count("<circle") == 4
    assert svg.count('class="band"') == 1


def test_points_lie_where_their_values_are():
    line = Line("a", [0, 10], [0, 4], "one")
    svg = ElementTree.fromstring(plot([line], Axis("x", 0, 10), Axis("y", 0, 4), "title"))
    (first, last) = svg.findall("circle")
    assert float(first.get("cx")) < float(last.get("cx"))
    assert float(first.get("cy")) > float(last.get("cy"))  # up is more
    assert last.find("title").text == "a: 4 at x 10"


def test_plots_escape_their_texts():
    svg = plot([Line("<b>", [0], [1], "one")], Axis("&x", 0, 1), Axis.over("", [1]), '"t"<')
    ElementTree.fromstring(svg)
    assert "<b>" not in svg + legend([Line("<b>", [0], [1], "one")])


def test_numbers_are_short():
    assert [number(value) for value in (0.5, 12.34567, -3, 1e-5, 0)] == [
        "0.5", "12.35", "−3", "1e−5", "0",
    ]  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_names_it(tiny_folder, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    options = ["--model", tiny_folder, "--steps", "3", "--seeds", "0,1", "--out", str(out)]
    settings = ["--method", "apg", "--scale", "6", "--set", "eta=0.5", "--negative", "a star"]
    assert main(["explain", "a red circle", *options, *settings]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    Checker(text)
    for shown in ("APG(eta=0.5)", "negative prompt", "a red circle", "plain CFG", "seed 1"):
        assert shown in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--out", "page.png"], "expected a file name ending in .html"),
        (["--seeds", "one"], "--seeds"),
        (["--seeds", "0,-1"], "seed: found -1"),
        (["--method", "agp"], "there is no method 'agp'"),
        (["--set", "eta"], "expected key=value"),
        (["--steps", "0"], "steps: found 0"),
        (["--model", "./none"], "there is no model folder"),
        (["--scheduler", "flow-euler"], "does not fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(options, match, tiny_folder, tmp_path, capsys):
    given = ["--model", tiny_folder, "--out", str(tmp_path / "page.html"), *options]
    assert main(["explain", "a red circle", *given]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
