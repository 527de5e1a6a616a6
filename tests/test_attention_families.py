"""The methods that reach into the network, on the pipelines of every family."""

from __future__ import annotations

import pytest
import torch
from compatibility import REFUSED, record
from tiny_families import FAMILIES, final_latents, pipeline

from guidancekit import NAG, NASA, PAG, SAG, SEG, SLG, BlurGuidance, GuidanceError
from guidancekit.engine.run import Run

W = 4.0
METHODS = [
    PAG(2.0),
    SEG(2.0, blur_sigma=1.0),
    SLG(2.0, start=0.0, end=1.0),
    SAG(0.5),
    BlurGuidance(0.5),
    NAG(3.0),
    NASA(0.3),
]
NO_TEXT_APART = ("dit", "lumina2", "z-image")
JOINT = ("sd3", "auraflow", "cog", "flux", "qwen", "chroma", "hunyuan-video")
UNKNOWN = {"mochi": "no layer of that kind"}  # its attention and blocks are classes of their own
LINEAR = {"sana": "linear attention"} | UNKNOWN
REFUSALS = {
    "pag": UNKNOWN,
    "seg": LINEAR,
    "slg": UNKNOWN,
    "sag": LINEAR,
    "nag": dict.fromkeys(NO_TEXT_APART, "given a text") | UNKNOWN,
    "nasa": dict.fromkeys(NO_TEXT_APART, "given a text")
    | dict.fromkeys(JOINT, "Use NAG")
    | UNKNOWN,
}


@pytest.fixture
def _texts(monkeypatch):
    """The tiny pipelines have no text encoders: another text is the opposite of the prompt."""

    def encode(run, prompt):
        given = run.passes.conditions("cond")["encoder_hidden_states"]
        return {"encoder_hidden_states": -given[:1]}

    monkeypatch.setattr(Run, "_encode", encode)


@pytest.mark.usefixtures("_texts")
@pytest.mark.parametrize("guidance", METHODS, ids=lambda guidance: guidance.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_they_run_or_are_refused(name, guidance):
    refusals = REFUSALS.get(guidance.name, {})
    refusal = next((why for start, why in refusals.items() if name.startswith(start)), None)
    pipe = pipeline(name)
    plain = final_latents(name, pipe, W)
    if refusal:
        with guidance.attach(pipe), pytest.raises(GuidanceError, match=refusal):
            final_latents(name, pipe, W)
    else:
        with guidance.attach(pipe):
            found = final_latents(name, pipe, W)
        assert torch.isfinite(found).all() and not torch.allclose(found, plain, atol=1e-5)
    assert torch.equal(final_latents(name, pipe, W), plain)
    record("family", name, guidance.name, REFUSED if refusal else "yes")
