"""What every test shares: no network, one thread, tiny pipelines."""

from __future__ import annotations

import os

# Before diffusers is imported: a test that reaches for the hub must fail.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import hypothesis
import pytest
import torch
from tiny import tiny_sd, tiny_sdxl

# Networks this small are ten times slower when two threads wait for each other than on one thread.
torch.set_num_threads(1)

# No test is timed: a busy machine is not a failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def sd():
    """A fresh tiny Stable Diffusion pipeline."""
    return tiny_sd()


@pytest.fixture
def sdxl():
    """A fresh tiny SDXL pipeline."""
    return tiny_sdxl()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A tiny Stable Diffusion pipeline as a Diffusers folder, for code that loads by name."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def url():
    """Where the app is served, on the embedded model."""
    import guidancekit.app
    from guidancekit.studio import Studio

    app = guidancekit.app.build(Studio())
    app.queue(max_size=64)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **guidancekit.app.OPTIONS)
    yield url
    app.close()
