"""The custom pipelines, loaded as users load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_families import FAMILIES, final_latents, fresh

from guidancekit import APG, GuidanceError

FOLDER = Path(__file__).parents[1] / "pipelines"
FILES = {
    "stable_diffusion.py": "sd15",
    "stable_diffusion_xl.py": "sdxl",
    "stable_diffusion_3.py": "sd3",
    "pixart_sigma.py": "pixart-sigma",
    "sana.py": "sana",
    "flux.py": "flux",
    "qwen_image.py": "qwen-image",
    "flux2_klein.py": "flux2-klein",
    "z_image.py": "z-image",
    "chroma.py": "chroma",
    "wan.py": "wan",
    "ltx.py": "ltx",
    "hunyuan_video.py": "hunyuan-video",
    "cogvideox.py": "cogvideox",
}


def test_every_file_is_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name] in FAMILIES])
def test_guidance_argument(name, tmp_path):
    family = FILES[name]
    plain_pipe = fresh(family)
    plain_pipe.save_pretrained(tmp_path)
    missing = {part: None for part, value in plain_pipe.components.items() if value is None}
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(FOLDER / name), trust_remote_code=True, **missing
    )
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, type(plain_pipe)) and type(pipe) is not type(plain_pipe)
    plain = final_latents(family, plain_pipe, 5.0)
    assert torch.equal(final_latents(family, pipe, 5.0), plain)

    reference = APG(9.0)
    with reference.attach(plain_pipe):
        expected = final_latents(family, plain_pipe, 5.0)
    guidance = APG(9.0)
    assert torch.equal(final_latents(family, pipe, 5.0, guidance=guidance), expected)
    assert not torch.equal(expected, plain)
    assert guidance.report().rows == reference.report().rows and guidance.attachment is None
    assert torch.equal(final_latents(family, pipe, 5.0, guidance="apg(9.0)"), expected)
    assert torch.equal(final_latents(family, pipe, 5.0), plain), "guidance acts in its own call"

    with pytest.raises(GuidanceError, match="did you mean apg"):
        final_latents(family, pipe, 5.0, guidance="appg")
