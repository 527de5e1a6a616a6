"""Writes the trained pipeline and the recogniser from their checkpoints, in half precision.

Run it as ``python -m samples.scenes.export``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from .models import Denoiser, scheduler, text_encoder, tokenizer, unet
from .recogniser import WEIGHTS, Recogniser
from .train import RUNS, load_autoencoder
from .training import averaged_weights

PIPELINE = Path(__file__).parents[2] / "guidancekit" / "bundled" / "scenes-unet"
FAST_TOKENIZER = "PreTrainedTokenizerFast"


def export_pipeline(folder: Path, target: Path) -> None:
    """An ordinary Stable Diffusion folder: half precision on disk, any precision when loaded."""
    words = tokenizer()
    denoiser = Denoiser(text_encoder(len(words)), unet())
    denoiser.load_state_dict(averaged_weights(folder / "unet.pt"))
    pipeline = StableDiffusionPipeline(
        vae=load_autoencoder(folder),
        text_encoder=denoiser.text_encoder.eval(),
        tokenizer=words,
        unet=denoiser.unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(target)
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)

    # What the libraries write is not quite what they read without a remark:
    # - a loader that goes by the text encoder's dtype would give it half precision in a full U-Net;
    # - the fast tokenizer's class has this name in every version of transformers;
    # - the autoencoder derives its block_out_channels and does not take them from its config.
    edit_json(target / "text_encoder/config.json", dtype="float32")
    edit_json(target / "tokenizer/tokenizer_config.json", tokenizer_class=FAST_TOKENIZER)
    edit_json(target / "model_index.json", tokenizer=["transformers", FAST_TOKENIZER])
    edit_json(target / "vae/config.json", block_out_channels=None)


def edit_json(path: Path, **entries: object) -> None:
    """Set entries of a JSON object in a file; None removes one."""
    content = {**json.loads(path.read_text()), **entries}
    content = {key: value for key, value in content.items() if entries.get(key, 0) is not None}
    path.write_text(json.dumps(content, indent=2) + "\n")


def export_recogniser(folder: Path, target: Path) -> None:
    model = Recogniser()
    model.load_state_dict(averaged_weights(folder / "recogniser.pt"))
    save_file({name: value.half() for name, value in model.state_dict().items()}, target)
    target.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RUNS, help="checkpoints")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="where to write it")
    parser.add_argument("--recogniser", type=Path, default=WEIGHTS, help="where to write it")
    args = parser.parse_args()
    for model, write, target in (
        ("unet", export_pipeline, args.pipeline),
        ("recogniser", export_recogniser, args.recogniser),
    ):
        if (args.folder / f"{model}.pt").exists():
            write(args.folder, target)
            print(f"wrote {target}")
        else:
            print(f"no {model}.pt in {args.folder}: {target} left as it is")


if __name__ == "__main__":
    main()
