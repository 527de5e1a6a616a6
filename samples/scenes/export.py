"""Writes the trained pipelines and the recogniser from their checkpoints, in half precision.

Run it as ``python -m samples.scenes.export``, or name what to write: ``... export flow``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from .models import (
    Denoiser,
    flow_denoiser,
    flow_scheduler,
    no_t5,
    scheduler,
    text_encoder,
    tokenizer,
    unet,
)
from .recogniser import WEIGHTS, Recogniser
from .train import RUNS, load_autoencoder
from .training import averaged_weights

BUNDLED = Path(__file__).parents[2] / "guidancekit" / "bundled"
FAST_TOKENIZER = "PreTrainedTokenizerFast"


def unet_pipeline(folder: Path) -> StableDiffusionPipeline:
    """An ordinary Stable Diffusion pipeline, from checkpoints."""
    words = tokenizer()
    denoiser = Denoiser(text_encoder(len(words)), unet())
    denoiser.load_state_dict(averaged_weights(folder / "unet.pt"))
    return StableDiffusionPipeline(
        vae=load_autoencoder(folder),
        text_encoder=denoiser.text_encoder,
        tokenizer=words,
        unet=denoiser.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flow_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """An ordinary Stable Diffusion 3 pipeline, from checkpoints."""
    words = tokenizer()
    denoiser = flow_denoiser(len(words))
    denoiser.load_state_dict(averaged_weights(folder / "flow.pt"))
    return StableDiffusion3Pipeline(
        vae=load_autoencoder(folder),
        text_encoder=denoiser.text_encoder,
        tokenizer=words,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=words,
        text_encoder_3=no_t5(len(words)),
        tokenizer_3=words,
        transformer=denoiser.transformer,
        scheduler=flow_scheduler(),
    )


def export_pipeline(pipeline: DiffusionPipeline, target: Path) -> None:
    """A Diffusers folder: half precision on disk, any precision when loaded."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().half()
    pipeline.save_pretrained(target)
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)

    # What the libraries write is not quite what they read without a remark:
    # - a loader that goes by the text encoder's dtype would give it half precision in a full U-Net;
    # - the fast tokenizer's class has this name in every version of transformers;
    # - the autoencoder derives its block_out_channels and does not take them from its config.
    for part in target.glob("text_encoder*"):
        edit_json(part / "config.json", dtype="float32")
    for part in target.glob("tokenizer*"):
        edit_json(part / "tokenizer_config.json", tokenizer_class=FAST_TOKENIZER)
        edit_json(target / "model_index.json", **{part.name: ["transformers", FAST_TOKENIZER]})
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


PIPELINES = {"unet": unet_pipeline, "flow": flow_pipeline}


def main() -> None:
    names = (*PIPELINES, "recogniser")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=names, help="default: all there are")
    parser.add_argument("--folder", type=Path, default=RUNS, help="checkpoints")
    parser.add_argument("--bundled", type=Path, default=BUNDLED, help="where pipelines go")
    parser.add_argument("--recogniser", type=Path, default=WEIGHTS, help="where to write it")
    args = parser.parse_args()
    for name in args.what or names:
        target = args.bundled / f"scenes-{name}" if name in PIPELINES else args.recogniser
        if not (args.folder / f"{name}.pt").exists():
            print(f"no {name}.pt in {args.folder}: {target} left as it is")
            continue
        if name in PIPELINES:
            export_pipeline(PIPELINES[name](args.folder), target)
        else:
            export_recogniser(args.folder, target)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
