"""Grids over two settings: every cell has the recipe that its labels say."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guidancekit import APG, CFG, SAG, GuidanceError, Interval, PerStep
from guidancekit.axes import NOTHING, Axis, Sheet, at, names_of
from guidancekit.editing import changed, joined, settings, terms_of, with_schedule
from guidancekit.generate import Picture
from guidancekit.recipe import Recipe
from guidancekit.registry import parse

BASE = Recipe(prompt="a red star", model="scenes-unet", guidance="APG() + SAG(scale=0.5)")


def test_cells_carry_what_their_axes_say():
    sheet = Sheet(BASE, Axis.read("scale", "2, 8.5"), Axis.read("apg.eta", "0, 1"), [3, 4])
    assert len(sheet.cells) == 8
    assert [side.title for side in sheet.sides] == [
        "apg.eta 0",
        "apg.eta 0",
        "apg.eta 1",
        "apg.eta 1",
    ]
    for r, c in sheet.cells:
        recipe = sheet.recipes[r][c]
        assert recipe.guidance_scale == (2, 8.5)[c]
        assert recipe.seed == (3, 4)[r % 2]
        assert parse(recipe.guidance).terms == (APG(eta=(0, 1)[r // 2]), SAG(scale=0.5))


def test_a_method_comes_before_its_parameters():
    for x, y in (("method", "scale"), ("scale", "method")):
        texts = {"method": "cfg, apg(scale=3.0)", "scale": "2, 8"}
        sheet = Sheet(BASE, Axis.read(x, texts[x]), Axis.read(y, texts[y]))
        recipes = [each for row in sheet.recipes for each in row]
        found = {(parse(each.guidance).name, each.guidance_scale) for each in recipes}
        assert {("cfg", 2.0), ("cfg", 8.0)} <= found
        assert {parse(each.guidance).scale for each in recipes} == {None, 2, 8}


def test_fields_of_the_recipe_are_axes():
    assert at(BASE, Axis("steps", ()), 7).steps == 7
    assert at(BASE, Axis("scheduler", ()), "euler").scheduler == "euler"
    assert Axis.read("prompt", "a cat, asleep | a dog").values == ("a cat, asleep", "a dog")
    assert at(BASE, NOTHING, None) is BASE
    assert Sheet(BASE, Axis.read("seed", "1, 2")).recipes[0][1].seed == 2


@pytest.mark.parametrize(
    ("x", "y", "seeds", "message"),
    [
        (Axis("steps", (0,)), NOTHING, (), "steps: found 0"),
        (Axis("steps", ("many",)), NOTHING, (), "steps: found 'many'"),
        (Axis("scheduler", ("no-such",)), NOTHING, (), "no scheduler"),
        (Axis("scale", ("big",)), NOTHING, (), "expected"),
        (Axis("method", ("no-such",)), NOTHING, (), "no method"),
        (Axis("apg.nothing", (1,)), NOTHING, (), "There are: method"),
        (Axis("apg.eta", (7,)), NOTHING, (), "from 0 to 1"),
        (Axis("steps", (1,)), Axis("steps", (2,)), (), "both axes"),
        (Axis("seed", (1,)), NOTHING, (2,), "no further seeds"),
    ],
)
def test_bad_axes_are_refused(x, y, seeds, message):
    with pytest.raises(GuidanceError, match=message):
        Sheet(BASE, x, y, seeds)
    with pytest.raises(GuidanceError, match="no values"):
        Axis.read("scale", " , ")


def test_the_table_says_what_was_drawn():
    sheet = Sheet(BASE, Axis.read("steps", "1, 2"))
    sheet.pictures[0, 1] = Picture(Image.new("RGB", (8, 8)), BASE, 2, 0.5, [1.0], [False], [])
    table = json.loads(sheet.to_json())
    assert table["x"] == {"name": "steps", "values": [1, 2]}
    assert [(each["row"], each["column"]) for each in table["pictures"]] == [(0, 1)]
    assert sheet.layout().draw().size == sheet.layout().size


def test_names_reach_into_schedules():
    names = names_of(CFG(scale=Interval(8.0)) + SAG())
    assert {"method", "scale", "steps", "cfg.scale.low", "sag.scale"} <= set(names)
    recipe = at(
        Recipe("x", "y", guidance="CFG(scale=Interval(8.0))"), Axis("cfg.scale.low", ()), 0.5
    )
    assert parse(recipe.guidance) == CFG(scale=Interval(8.0, low=0.5))


@given(st.floats(0, 1), st.sampled_from([None, 3.0, Interval(4.0)]))
def test_settings_put_back_change_nothing(eta, scale):
    guidance = APG(scale=scale, eta=eta) + SAG(scale=0.5)
    for number, term in enumerate(terms_of(guidance)):
        for name, value in settings(term).items():
            assert changed(guidance, (number, name), value) == guidance
    assert joined(terms_of(guidance)) == guidance


def test_a_schedule_keeps_the_scale_it_is_put_over():
    assert with_schedule(7.0, "interval") == Interval(7.0)
    assert with_schedule(Interval(7.0), None) == 7.0
    assert with_schedule(Interval(7.0), "interval", "scenes").scale == 7.0
    assert with_schedule(7.0, "per-step") == PerStep()
