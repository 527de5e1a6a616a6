"""The doctor: what it finds out is what the tests of the families show."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_sd
from tiny_families import FAMILIES, final_latents, fresh, pipeline

from guidancekit import GuidanceError, bundled
from guidancekit.cli import main
from guidancekit.doctor import Diagnosis, diagnose
from guidancekit.registry import methods


def examine(name, **call):
    family = FAMILIES[name]
    given = {**family.options, **family.call((0,)), **call}
    if family.scale_name:
        given[family.scale_name] = 4.0
    return diagnose(pipeline(name), **given)


@pytest.mark.parametrize(
    ("name", "shape", "latents", "prediction"),
    [
        ("sd21-v", "one batch: [uncond, cond]", "4 x 8 x 8", "v_prediction"),
        ("dit", "one batch: [cond, uncond]", "4 x 8 x 8", "epsilon"),
        ("z-image", "one batch: [cond, uncond]", "4 x 8 x 8", "flow"),
        ("lumina2", "two calls: cond, uncond", "4 x 8 x 8", "flow"),
        ("flux", "two calls: cond, uncond", "4 x 12 x 8, packed into 24 tokens of 16", "flow"),
        ("flux-distilled", "one call on cond: no uncond", "4 x 12 x 8, packed", "flow"),
        ("ltx", "one batch: [uncond, cond]", "4 x 2 x 3 x 4, packed into 24 tokens of 4", "flow"),
        ("cogvideox", "one batch: [uncond, cond]", "4 x 2 x 8 x 8, kept", "v_prediction"),
    ],
)
def test_it_tells_the_shape_and_what_works(name, shape, latents, prediction):
    found = examine(name)
    assert found.shape.startswith(shape) and found.latents.startswith(latents)
    assert found.prediction == prediction and not found.problem
    assert set(found.methods) == set(methods())
    alone = FAMILIES[name].calls == "one"
    assert found.methods["apg"].works != alone and found.methods["embedded"].works == alone
    if alone:
        assert found.methods["apg"].reason.startswith("needs the unconditional prediction")
    else:
        assert found.methods["apg"].rows == 2
    assert found.methods["cads"].works == (name not in ("dit", "flux-distilled"))
    assert "needs a weaker network" in found.methods["autoguidance"].reason


def test_it_leaves_the_pipeline_as_it_was():
    pipe = fresh("flux")
    expected, before = final_latents("flux", pipe, 4.0), dict(vars(pipe))
    diagnose(pipe)
    assert vars(pipe).keys() == before.keys()
    assert torch.equal(final_latents("flux", pipe, 4.0), expected)


MADE_UP = ["sd15", "sdxl-img2img", "sd-inpaint", "sd-controlnet", "kolors", "sd3", "pixart-alpha"]
MADE_UP += ["sana", "dit", "auraflow", "lumina2", "cogview4", "z-image", "flux", "flux-kontext"]
MADE_UP += ["flux2-klein", "qwen-image", "chroma", "wan", "ltx", "hunyuan-video", "cogvideox"]


@pytest.mark.parametrize("name", [name for name in MADE_UP if name in FAMILIES])
def test_made_up_arguments_fit(name, monkeypatch):
    """Random embeddings where there is no text encoder, pictures, and the smallest size."""
    monkeypatch.setattr("guidancekit.doctor.methods", lambda: {"apg": methods()["apg"]})
    found = diagnose(pipeline(name))
    assert found.methods["apg"].works and found.methods["apg"].rows == 2


def test_what_it_cannot_call_or_does_not_know():
    with pytest.raises(GuidanceError, match="expected a Diffusers pipeline"):
        diagnose(torch.nn.Linear(2, 2))
    with pytest.raises(GuidanceError, match=r"cannot be called .*prompt_embeds_2"):
        diagnose(pipeline("hunyuan-dit"))
    found = examine("sd3", num_inference_steps=3, skip_guidance_layers=[0])
    found = examine("sd3", skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)
    assert "more than once per step" in found.problem and not found.methods
    assert "problem:" in str(found)


def test_the_embedded_model_with_its_companions():
    found = diagnose(bundled.load(), "scenes")
    refused = {name: each.reason for name, each in found.methods.items() if not each.works}
    assert set(refused) <= {"embedded", "rectified-cfg++", "linear-ag"}, refused
    assert found.call["guidance_scale"] == 5.0


def test_the_command(tiny_folder, capsys):
    assert main(["doctor", tiny_folder, "--scheduler", "unipc"]) == 0
    text = capsys.readouterr().out
    assert "branches:    one batch: [uncond, cond]" in text
    assert "scheduler:   UniPCMultistepScheduler" in text
    assert "apg 2, " in text and "keeps latents of its own" in text
    assert main(["doctor", tiny_folder, "--json"]) == 0
    found = Diagnosis(**json.loads(capsys.readouterr().out))
    assert found.methods["cfg"] == {"works": True, "reason": "", "rows": 2.0}
    assert found.pipeline == type(tiny_sd()).__name__


def test_the_command_needs_a_model(capsys):
    assert main(["doctor", "./nowhere"]) == 2
    assert "there is no model folder" in capsys.readouterr().err
