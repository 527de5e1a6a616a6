"""Code that makes a picture again makes the same pixels."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from PIL import Image

from guidancekit.cli import main
from guidancekit.generate import run
from guidancekit.loading import load_pipeline
from guidancekit.recipe import Recipe
from guidancekit.registry import parse
from guidancekit.snippets import as_command, as_python

EMBEDDED = Recipe(prompt="a red star's shadow", model="scenes-unet", steps=3, guidance_scale=4.0)
CHANGES = [
    {},
    {"guidance": "APG(scale=12.0, eta=0.5)", "guidance_scale": 4.0},
    {"guidance": "CFG(scale=Interval(scale=8.0, low=0.5, high=5.0)) + SAG(scale=0.5)"},
    {"guidance": "CFG()", "guidance_scale": 7.5, "negative": 'blue "ring"', "seed": 11},
    {"guidance": "AutoGuidance(scale=1.5, network='scenes:weak')"},  # unlike the preset
    {"guidance": "CFGPlusPlus(scale=0.6)", "scheduler": "dpm++2m-karras", "size": (96, 64)},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: changes.get("guidance", "plain"))
def test_both_make_the_same_pixels(changes, tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    asked = replace(EMBEDDED, **changes)
    made = run(load_pipeline(asked, "cpu"), asked)
    monkeypatch.chdir(tmp_path)
    exec(as_python(made.recipe), {})
    assert np.array_equal(np.asarray(Image.open("picture.png")), np.asarray(made.image))
    program, *arguments = shlex.split(as_command(made.recipe))
    assert program == "guidancekit"
    assert main(arguments) == 0
    path = capsys.readouterr().out.strip().splitlines()[-1]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(made.image))


def test_a_model_of_others_is_loaded_from_safetensors():
    code = as_python(Recipe(prompt="a cat", model="some/model", dtype="float16", device="cuda"))
    assert "from_pretrained('some/model', torch_dtype=torch.float16, use_safetensors=True)" in code
    assert parse("CFG()") == parse("cfg")
    compile(code, "snippet", "exec")
