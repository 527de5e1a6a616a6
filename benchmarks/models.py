"""What is measured on: the embedded model, and full-size architectures with random weights.

A subject draws pictures in latent space from embeddings that are already there, so that what is
timed is the loop over steps. Weights of the full-size ones mean nothing; shapes are real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)

from guidancekit import bundled
from guidancekit.engine.run import denoiser

Conditions = dict[str, torch.Tensor]


@dataclass
class Subject:
    """A pipeline and how it is called for `batch` pictures.

    `heavy`: a step takes so long that few methods and `steps` must do.
    """

    name: str
    pipe: Any
    batch: int
    given: Callable[[int], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    heavy: bool = False

    @property
    def network(self) -> Any:
        return denoiser(self.pipe)

    @property
    def device(self) -> torch.device:
        return torch.device(self.network.device)

    def draw(self, steps: int, batch: int | None = None, **options: Any) -> None:
        """One call of the pipeline, always from the same noise."""
        self.pipe(
            **self.given(batch or self.batch),
            **{**self.options, **options},
            num_inference_steps=steps,
            generator=torch.Generator(self.device).manual_seed(0),
            output_type="latent",
        )


def embedded(batch: int, device: torch.device) -> Subject:
    """The model that ships with the package: 64 x 64 pixels, float32."""
    pipe = bundled.load("scenes-unet").to(device)
    pipe.set_progress_bar_config(disable=True)
    texts = [pipe.encode_prompt(text, device, 1, False)[0] for text in ("a red star", "")]

    def given(batch: int) -> dict[str, Any]:
        prompt, negative = (text.repeat(batch, 1, 1) for text in texts)
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}

    return Subject(f"embedded model, batch {batch}", pipe, batch, given, {"guidance_scale": 4.0})


# --- full size --------------------------------------------------------------------------------


def _sd15(tiny: bool) -> tuple[Any, Any]:
    small = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8} if tiny else {}
    config = {"cross_attention_dim": 768, "sample_size": 64, **small}
    unet = UNet2DConditionModel(**config)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        **parts,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        requires_safety_checker=False,
    )
    return pipe, {"prompt_embeds": (77, 768)}


def _sdxl(tiny: bool) -> tuple[Any, Any]:
    config: dict[str, Any] = {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    if tiny:
        config |= {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1}
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = StableDiffusionXLPipeline(
        **dict.fromkeys(parts),
        unet=UNet2DConditionModel(**config),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )
    return pipe, {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}


def _sd35(tiny: bool) -> tuple[Any, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=2 if tiny else 24,
        num_attention_heads=2 if tiny else 24,
        caption_projection_dim=128 if tiny else 1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=() if tiny else tuple(range(13)),
    )
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(
        **dict.fromkeys(names), vae=None, transformer=transformer, scheduler=scheduler
    )
    return pipe, {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}


def _flux(tiny: bool) -> tuple[Any, Any]:
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1} if tiny else {}
    transformer = FluxTransformer2DModel(guidance_embeds=True, **small)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(**dict.fromkeys(names), transformer=transformer, scheduler=scheduler)
    return pipe, {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}


def _wan(tiny: bool) -> tuple[Any, Any]:
    transformer = WanTransformer3DModel(
        num_attention_heads=1 if tiny else 12,
        ffn_dim=256 if tiny else 8960,
        num_layers=1 if tiny else 30,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = WanPipeline(**parts, transformer=transformer, scheduler=scheduler)
    return pipe, {"prompt_embeds": (512, 4096)}


ARCHITECTURES: dict[str, tuple[Callable[[bool], tuple[Any, Any]], dict[str, Any]]] = {
    "SD 1.5, 512 px": (_sd15, {"height": 512, "width": 512, "guidance_scale": 7.5}),
    "SDXL, 1024 px": (_sdxl, {"height": 1024, "width": 1024, "guidance_scale": 5.0}),
    "SD 3.5 medium, 1024 px": (_sd35, {"height": 1024, "width": 1024, "guidance_scale": 5.0}),
    "Flux dev, 1024 px, true CFG": (_flux, {"height": 1024, "width": 1024, "true_cfg_scale": 4.0}),
    "Wan 1.3B, 832 x 480, 81 frames": (
        _wan,
        {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0},
    ),
}
HEAVY = {"Flux dev, 1024 px, true CFG", "Wan 1.3B, 832 x 480, 81 frames"}
_TINY = {"height": 64, "width": 64, "num_frames": 5}


def full_size(name: str, batch: int, device: torch.device, tiny: bool = False) -> Subject:
    """An architecture in bfloat16 with random weights; `tiny` shrinks it to try the code."""
    build, options = ARCHITECTURES[name]
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                pipe, shapes = build(tiny)
        finally:
            torch.set_default_dtype(before)
    pipe.set_progress_bar_config(disable=True)
    denoiser(pipe).to(device, dtype).eval()
    if tiny:
        options = {key: _TINY.get(key, value) for key, value in options.items()}

    def given(batch: int) -> dict[str, Any]:
        made = {}
        for i, (key, shape) in enumerate(shapes.items()):
            for j, prefix in enumerate(("", "negative_")):
                generator = torch.Generator().manual_seed(2 * i + j)
                text = torch.randn(batch, *shape, generator=generator)
                made[prefix + key] = text.to(device, dtype)
        return made

    return Subject(
        f"{name}, shrunk" if tiny else name, pipe, batch, given, dict(options), name in HEAVY
    )
