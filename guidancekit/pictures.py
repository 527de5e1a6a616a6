"""Pictures with prompts, to train on: those of a folder, or a model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .engine.run import denoiser
from .errors import GuidanceError
from .generate import arguments
from .recipe import Recipe, read_recipe

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Pictures(Protocol):
    """A sequence of clean latents [1, C, h, w] with their prompts; `asked` says which they are."""

    asked: Mapping[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, str]: ...


class FolderPictures:
    """The pictures of a folder, each with its prompt in a .txt file of the same name.

    Pictures that guidancekit made carry their prompt. All are cut to `size`, (width, height) in
    pixels, or to the model's own. Raises `GuidanceError` for a picture without a prompt.
    """

    def __init__(self, pipe: Any, folder: Path, size: tuple[int, int] | None = None) -> None:
        if not folder.is_dir():
            raise GuidanceError(f"there is no folder {folder} of pictures.")
        self.pipe, self.size = pipe, size or _own_size(pipe)
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise GuidanceError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
        self.items = [(file, _prompt_of(file)) for file in files]
        self.asked = {"pictures": [file.name for file in files], "size": list(self.size)}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        file, prompt = self.items[index]
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(image.convert("RGB"), self.size, Image.Resampling.LANCZOS)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise GuidanceError(f"{file} cannot be read as a picture ({error}).") from error
        return encode(self.pipe, fitted), prompt


class OwnPictures:
    """Pictures that the model makes itself, by plain CFG, each when it is first asked for.

    `base` says what `pipe` was loaded for, with the steps and the scale; there is one picture for
    each of `seeds` and `prompts`, prompt i of seed s from the noise of s + i.
    """

    def __init__(
        self, pipe: Any, base: Recipe, prompts: Sequence[str], seeds: Sequence[int]
    ) -> None:
        self.pipe = pipe
        self.recipes = [
            replace(base, prompt=prompt, seed=seed + i)
            for seed in seeds
            for i, prompt in enumerate(prompts)
        ]
        self.asked = {
            "scale": base.guidance_scale,
            "size": list(base.size) if base.size else None,
            "prompts": list(prompts),
            "seeds": list(seeds),
        }
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.recipes)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        recipe = self.recipes[index]
        if index not in self._made:
            latents = self.pipe(**arguments(self.pipe, recipe), output_type="latent").images
            self._made[index] = latents.float().cpu()
        return self._made[index], recipe.prompt


@torch.no_grad()
def encode(pipe: Any, image: Any) -> Tensor:
    """The clean latent [1, C, h, w] of a picture: an image, or a tensor [3, H, W] in [0, 1]."""
    vae = pipe.vae
    if isinstance(image, Tensor):
        pixels = image[None] * 2 - 1
    else:
        pixels = pipe.image_processor.preprocess(image)
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def _own_size(pipe: Any) -> tuple[int, int]:
    """The (width, height) in pixels that a model was made for."""
    size = denoiser(pipe).config.get("sample_size")
    if size is None:
        raise GuidanceError(f"{type(pipe).__name__} does not say its size: give one, WxH.")
    height, width = (size, size) if isinstance(size, int) else size
    factor = pipe.vae_scale_factor
    return factor * width, factor * height


def _prompt_of(file: Path) -> str:
    """The text beside a picture, or the prompt of the recipe inside."""
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return read_recipe(file).prompt
    except GuidanceError as error:
        raise GuidanceError(
            f"{file} has no prompt: write it to {beside.name} in the same folder."
        ) from error
