"""The custom pipelines, loaded as users load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import tiny_sd, tiny_sdxl

from guidancekit import APG, GuidanceError

FOLDER = Path(__file__).parents[1] / "pipelines"
FILES = {"stable_diffusion.py": tiny_sd, "stable_diffusion_xl.py": tiny_sdxl}


def call(pipe, **options):
    return pipe(
        "a red star",
        num_inference_steps=4,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


def test_every_file_is_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_guidance_argument(name, tmp_path):
    plain_pipe = FILES[name]()
    plain_pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(FOLDER / name), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    plain = call(plain_pipe)
    assert torch.equal(call(pipe), plain)

    with APG(9.0).attach(plain_pipe):
        expected = call(plain_pipe)
    guidance = APG(9.0)
    assert torch.equal(call(pipe, guidance=guidance), expected)
    assert guidance.report().rows == 8 and guidance.attachment is None
    assert torch.equal(call(pipe, guidance="apg(9.0)"), expected)
    assert torch.equal(call(pipe), plain), "guidance acts in its own call only"

    with pytest.raises(GuidanceError, match="did you mean apg"):
        call(pipe, guidance="appg")
