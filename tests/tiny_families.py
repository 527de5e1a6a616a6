"""A table of tiny, random pipelines: one for each family of models and each way they are called.

The weights mean nothing. Prompt embeddings are passed in, so that no text encoder is needed; every
sample has a number, and neither its embeddings nor its noise depend on its batch mates. Nothing is
downloaded, and a family builds in well under a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import LATENT_SIZE, TEXT_WIDTH, _autoencoder, _betas, _unet
from torch import Tensor, nn

Calls = Literal["joint", "sequential", "one"]
Samples = Sequence[int]
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (0, 0, 16, 32))
TOKENS = 4  # of a prompt
WIDTH = 8  # of its embeddings, for the transformers


@dataclass(frozen=True)
class Family:
    """How to build a pipeline, how to call it, and what is to be expected of it.

    `calls` is how it asks for its branches when it is guided: in one joint batch, in two calls, or
    not at all. `scale_name` is the argument for the CFG scale, if any; `offset` what it lacks to w.
    `renormalises`: its own combination ends with a re-normalisation. `unpack` makes of its packed
    latents [B, ...] what a strategy should see. `needs` is a class that old versions lack.
    """

    build: Callable[[], Any]
    call: Callable[[Samples], dict[str, Any]]
    calls: Calls = "joint"
    scale_name: str | None = "guidance_scale"
    offset: float = 0.0
    renormalises: bool = False
    unpack: Callable[[Any, Tensor], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    needs: str = "DiffusionPipeline"


FAMILIES: dict[str, Family] = {}


@functools.cache
def pipeline(name: str) -> Any:
    """The pipeline of a family, built once; whoever uses it leaves it as it was."""
    return fresh(name)


def fresh(name: str) -> Any:
    """A new pipeline of a family, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = FAMILIES[name].build()
        for network in _networks(pipe):
            _shake(network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def final_latents(
    name: str, pipe: Any, w: float = 1.0, samples: Samples = (0,), **options: Any
) -> Tensor:
    """What the scheduler's last step returns in one call at CFG scale w."""
    family = FAMILIES[name]
    given: dict[str, Any] = {
        "num_inference_steps": family.steps,
        "generator": [torch.Generator().manual_seed(100 + i) for i in samples],
        "output_type": "latent",
        **family.options,
        **family.call(samples),
        **options,
    }
    if family.scale_name:
        given[family.scale_name] = w - family.offset
    last: list[Tensor] = []
    scheduler, before = pipe.scheduler, vars(pipe.scheduler).get("step")
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0]]
        return result

    scheduler.step = watched
    try:
        pipe(**given)
    finally:
        if before is None:
            vars(scheduler).pop("step", None)
        else:
            scheduler.step = before
    return last[0][: len(samples)]  # DiT steps both branches


# --- parts ---------------------------------------------------------------------------------------


def _networks(pipe: Any) -> list[nn.Module]:
    names = ("unet", "transformer", "transformer_2", "controlnet", "adapter")
    found = [getattr(pipe, name, None) for name in names]
    return [network.eval() for network in found if isinstance(network, nn.Module)]


def _shake(network: nn.Module) -> None:
    """Random weights of unit gain: a new network's zeros would make its branches equal."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def embed(samples: Samples, *shape: int, seed: int = 0) -> Tensor:
    """Random embeddings [len(samples), *shape], the same for a sample in every batch."""
    draw = [torch.Generator().manual_seed(1000 * seed + i) for i in samples]
    return torch.stack([torch.randn(shape, generator=generator) for generator in draw])


def ones(samples: Samples, *shape: int) -> Tensor:
    return torch.ones(len(samples), *shape, dtype=torch.long)


def _flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


def _ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**_betas(), clip_sample=False, **options)


def _nothing(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def _plain_autoencoder(**options: Any) -> AutoencoderKL:
    """A variational autoencoder that makes latents of half the side."""
    blocks = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **{**blocks, **options},
    ).eval()


# --- Stable Diffusion and its kin: UNets ---------------------------------------------------------


def _sd(cls: Any = diffusers.StableDiffusionPipeline, unet: Any = None, **parts: Any) -> Any:
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    given = {"scheduler": _ddim(), "vae": _autoencoder().eval(), **_nothing(*names), **parts}
    return cls(unet=unet or _unet(TEXT_WIDTH), requires_safety_checker=False, **given)


def _altered(unet: UNet2DConditionModel, **changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config({**unet.config, **changes})


def _sdxl_unet(ids: int = 6, **options: Any) -> Any:
    return _unet(
        TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=TEXT_WIDTH + ids * 4,
        use_linear_projection=True,
        **options,
    )


def _sdxl(cls: Any = diffusers.StableDiffusionXLPipeline, unet: Any = None, **parts: Any) -> Any:
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2")]
    given = {"scheduler": EulerDiscreteScheduler(**_betas()), "vae": _autoencoder().eval()}
    return cls(unet=unet or _sdxl_unet(), **{**given, **_nothing(*names), **parts})


def _text(samples: Samples, tokens: int = TOKENS, width: int = TEXT_WIDTH) -> dict[str, Tensor]:
    return {
        "prompt_embeds": embed(samples, tokens, width),
        "negative_prompt_embeds": embed(samples, tokens, width, seed=1),
    }


def _pooled(samples: Samples, width: int = TEXT_WIDTH) -> dict[str, Tensor]:
    return {
        "pooled_prompt_embeds": embed(samples, width, seed=2),
        "negative_pooled_prompt_embeds": embed(samples, width, seed=3),
    }


def _text_and_pooled(samples: Samples) -> dict[str, Tensor]:
    return _text(samples) | _pooled(samples)


def _refiner() -> Any:
    return _sdxl(
        diffusers.StableDiffusionXLImg2ImgPipeline,
        unet=_sdxl_unet(ids=5),
        requires_aesthetics_score=True,
    )


def _controlnet(unet: Any) -> ControlNetModel:
    return ControlNetModel.from_unet(
        unet,
        conditioning_embedding_out_channels=(4, 8, 8),
        controlnet_conditioning_channel_order="rgb",
    )


def _sd_controlnet() -> Any:
    unet = _unet(TEXT_WIDTH)
    return _sd(diffusers.StableDiffusionControlNetPipeline, unet, controlnet=_controlnet(unet))


def _sdxl_controlnet() -> Any:
    unet = _sdxl_unet()
    return _sdxl(diffusers.StableDiffusionXLControlNetPipeline, unet, controlnet=_controlnet(unet))


def _t2i(make: Any, cls: Any, unet: Any) -> Any:
    """The adapter's features join inside the first block and after the last, as in SD."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=4)
    return make(cls, _altered(unet, **blocks), adapter=adapter)


def _with_ip_adapter(pipe: Any) -> Any:
    """One picture embedding of width 8, made into four tokens by a random IP-Adapter."""
    unet, weights, key = pipe.unet, {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        hidden = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{key}.{part}.weight"] = 0.3 * torch.randn(hidden, TEXT_WIDTH)
        key += 2
    projection = {
        "proj.weight": 0.3 * torch.randn(4 * TEXT_WIDTH, WIDTH),
        "proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return pipe


def _animatediff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    return diffusers.AnimateDiffPipeline(
        unet=_unet(TEXT_WIDTH),
        motion_adapter=adapter,
        scheduler=_ddim(),
        vae=_autoencoder().eval(),
        **_nothing("text_encoder", "tokenizer"),
    )


def _picture_embeds(samples: Samples) -> dict[str, Any]:
    """Of one picture for all samples: the negative, then the positive embedding."""
    return {"ip_adapter_image_embeds": [torch.cat([embed((0,), 1, WIDTH, seed=i) for i in (4, 5)])]}


def _pictures(samples: Samples, **more: Any) -> dict[str, Any]:
    return {"image": [PICTURE] * len(samples), **more}


FAMILIES |= {
    "sd15": Family(_sd, _text),
    "sd21-v": Family(
        lambda: _sd(
            unet=_unet(TEXT_WIDTH, use_linear_projection=True),
            scheduler=_ddim(prediction_type="v_prediction"),
        ),
        _text,
    ),
    "sdxl": Family(_sdxl, _text_and_pooled),
    "sdxl-refiner": Family(
        _refiner,
        lambda samples: _text_and_pooled(samples) | _pictures(samples),
        options={"strength": 1.0},
    ),
    "sd-img2img": Family(
        lambda: _sd(diffusers.StableDiffusionImg2ImgPipeline),
        lambda samples: _text(samples) | _pictures(samples),
        options={"strength": 0.7},
        steps=4,
    ),
    "sdxl-img2img": Family(
        lambda: _sdxl(diffusers.StableDiffusionXLImg2ImgPipeline),
        lambda samples: _text_and_pooled(samples) | _pictures(samples),
        options={"strength": 0.7},
        steps=4,
    ),
    "sd-inpaint": Family(
        lambda: _sd(
            diffusers.StableDiffusionInpaintPipeline, _altered(_unet(TEXT_WIDTH), in_channels=9)
        ),
        lambda samples: _text(samples) | _pictures(samples, mask_image=[MASK] * len(samples)),
        options={"height": 32, "width": 32},
    ),
    "sdxl-inpaint": Family(
        lambda: _sdxl(
            diffusers.StableDiffusionXLInpaintPipeline, _altered(_sdxl_unet(), in_channels=9)
        ),
        lambda samples: (
            _text_and_pooled(samples) | _pictures(samples, mask_image=[MASK] * len(samples))
        ),
        options={"height": 32, "width": 32, "strength": 1.0},
    ),
    "sd-controlnet": Family(_sd_controlnet, lambda samples: _text(samples) | _pictures(samples)),
    "sdxl-controlnet": Family(
        _sdxl_controlnet, lambda samples: _text_and_pooled(samples) | _pictures(samples)
    ),
    "sd-t2i-adapter": Family(
        lambda: _t2i(_sd, diffusers.StableDiffusionAdapterPipeline, _unet(TEXT_WIDTH)),
        lambda samples: _text(samples) | _pictures(samples),
    ),
    "sdxl-t2i-adapter": Family(
        lambda: _t2i(_sdxl, diffusers.StableDiffusionXLAdapterPipeline, _sdxl_unet()),
        lambda samples: _text_and_pooled(samples) | _pictures(samples),
    ),
    "sd-ip-adapter": Family(
        lambda: _with_ip_adapter(_sd()), lambda samples: _text(samples) | _picture_embeds(samples)
    ),
    "sdxl-ip-adapter": Family(
        lambda: _with_ip_adapter(_sdxl()),
        lambda samples: _text_and_pooled(samples) | _picture_embeds(samples),
    ),
    "sd-lcm": Family(
        lambda: _sd(scheduler=LCMScheduler(**_betas(), clip_sample=False)),
        _text,
        steps=2,
    ),
    "lcm": Family(
        lambda: _sd(
            diffusers.LatentConsistencyModelPipeline,
            unet=_unet(TEXT_WIDTH, time_cond_proj_dim=8),
            scheduler=LCMScheduler(**_betas(), clip_sample=False),
        ),
        lambda samples: {"prompt_embeds": embed(samples, TOKENS, TEXT_WIDTH)},
        calls="one",
        scale_name=None,
        options={"guidance_scale": 8.0},
        steps=2,
    ),
    "sdxl-turbo": Family(
        lambda: _sdxl(
            scheduler=EulerAncestralDiscreteScheduler(**_betas(), timestep_spacing="trailing")
        ),
        _text_and_pooled,
        calls="one",
        scale_name=None,
        options={"guidance_scale": 0.0},
        steps=2,
    ),
    "animatediff": Family(
        _animatediff,
        _text,
        options={"num_frames": 3, "height": 32, "width": 32},
    ),
    "kolors": Family(
        lambda: diffusers.KolorsPipeline(
            unet=_unet(
                TEXT_WIDTH,
                encoder_hid_dim=12,
                encoder_hid_dim_type="text_proj",
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 4,
                use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(**_betas()),
            **_nothing("vae", "text_encoder", "tokenizer"),
        ),
        lambda samples: _text(samples, width=12) | _pooled(samples),
    ),
}


# --- transformers on latents [B, C, h, w] --------------------------------------------------------

_TEXT_PARTS = ("text_encoder", "tokenizer")


def _masked(samples: Samples, tokens: int = TOKENS, width: int = WIDTH) -> dict[str, Tensor]:
    """Prompts of full length and shorter negative ones."""
    short = ones(samples, tokens)
    short[:, tokens // 2 :] = 0
    return _text(samples, tokens, width) | {
        "prompt_attention_mask": ones(samples, tokens),
        "negative_prompt_attention_mask": short,
    }


def _sd3(**options: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT_WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        **options,
    )
    parts = [f"{part}{i}" for part in _TEXT_PARTS for i in ("", "_2", "_3")]
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_flow(), vae=None, **_nothing(*parts)
    )


def _pixart(cls: Any, size: int) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=size,
        caption_channels=WIDTH,
        interpolation_scale=1,
    )
    return cls(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**_betas()),
        **_nothing("vae", *_TEXT_PARTS),
    )


def _sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=LATENT_SIZE,
    )
    return diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **_nothing("vae", *_TEXT_PARTS),
    )


def _dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=LATENT_SIZE,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(
        transformer=transformer, vae=_autoencoder().eval(), scheduler=_ddim()
    )


def _hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=LATENT_SIZE,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=TOKENS,
        text_len_t5=TOKENS,
    )
    parts = ("vae", "safety_checker", "feature_extractor", *_TEXT_PARTS)
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=_ddim(),
        requires_safety_checker=False,
        **_nothing(*parts),
    )


def _two_texts(samples: Samples) -> dict[str, Tensor]:
    second = _masked(samples, width=16).items()
    return _masked(samples) | {f"{name}_2": value for name, value in second}


def _auraflow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=LATENT_SIZE,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=transformer, scheduler=_flow(), **_nothing("vae", *_TEXT_PARTS)
    )


def _lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=_flow(), **_nothing("vae", *_TEXT_PARTS)
    )


def _cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=LATENT_SIZE,
        rope_axes_dim=(8, 8),
    )
    return diffusers.CogView4Pipeline(
        transformer=transformer, scheduler=_flow(), **_nothing("vae", *_TEXT_PARTS)
    )


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[64, 32, 32],
    )
    for name in ("x_pad_token", "cap_pad_token"):
        nn.init.normal_(getattr(transformer, name))
    return diffusers.ZImagePipeline(
        transformer=transformer, scheduler=_flow(), **_nothing("vae", *_TEXT_PARTS)
    )


def _lists(samples: Samples) -> dict[str, Any]:
    """Prompts of different lengths, one tensor each."""
    return {
        name: [tensor[: TOKENS - i % 2] for i, tensor in zip(samples, batch, strict=True)]
        for name, batch in _text(samples, TOKENS, WIDTH).items()
    }


_SQUARE = {"height": 64, "width": 64}

FAMILIES |= {
    "sd3": Family(_sd3, _text_and_pooled, options=_SQUARE),
    "sd35": Family(
        lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        _text_and_pooled,
        options=_SQUARE,
    ),
    "pixart-alpha": Family(
        lambda: _pixart(diffusers.PixArtAlphaPipeline, size=128),
        lambda samples: _masked(samples) | {"negative_prompt": None},
        options=_SQUARE | {"use_resolution_binning": False},
    ),
    "pixart-sigma": Family(
        lambda: _pixart(diffusers.PixArtSigmaPipeline, size=LATENT_SIZE),
        lambda samples: _masked(samples) | {"negative_prompt": None},
        options=_SQUARE | {"use_resolution_binning": False},
    ),
    "sana": Family(
        _sana,
        lambda samples: _masked(samples) | {"negative_prompt": None},
        options={"height": 256, "width": 256, "use_resolution_binning": False},
    ),
    "dit": Family(
        _dit,
        lambda samples: {"class_labels": [7 * i + 3 for i in samples]},
        options={"output_type": "pt"},
    ),
    "hunyuan-dit": Family(
        _hunyuan_dit, _two_texts, options=_SQUARE | {"use_resolution_binning": False}
    ),
    "auraflow": Family(_auraflow, _masked, options=_SQUARE),
    "lumina2": Family(
        _lumina2, _masked, calls="sequential", options=_SQUARE | {"cfg_normalization": False}
    ),
    "lumina2-renormalised": Family(
        _lumina2, _masked, calls="sequential", options=_SQUARE, renormalises=True
    ),
    "cogview4": Family(
        _cogview4,
        lambda samples: _text(samples, 16, WIDTH),
        calls="sequential",
        options=_SQUARE,
    ),
    "z-image": Family(_z_image, _lists, offset=1.0, options=_SQUARE, needs="ZImagePipeline"),
    "z-image-renormalised": Family(
        _z_image,
        _lists,
        offset=1.0,
        options=_SQUARE | {"cfg_normalization": 0.8},
        renormalises=True,
        needs="ZImagePipeline",
    ),
}


# --- transformers on packed tokens ---------------------------------------------------------------


def _flux_network(cls: Any = diffusers.FluxTransformer2DModel, **options: Any) -> Any:
    return cls(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        **options,
    )


def _flux(cls: Any = diffusers.FluxPipeline, embedded: bool = True, vae: Any = None) -> Any:
    parts = [f"{part}{i}" for part in _TEXT_PARTS for i in ("", "_2")]
    return cls(
        transformer=_flux_network(pooled_projection_dim=WIDTH, guidance_embeds=embedded),
        scheduler=_flow(use_dynamic_shifting=True),
        vae=vae,
        **_nothing(*parts),
    )


def _flux_text(samples: Samples) -> dict[str, Tensor]:
    return _text(samples, TOKENS, WIDTH) | _pooled(samples, WIDTH)


def _positive(samples: Samples) -> dict[str, Tensor]:
    return {k: v for k, v in _flux_text(samples).items() if not k.startswith("negative")}


def _unpack_flux(pipe: Any, latents: Tensor) -> Tensor:
    return pipe._unpack_latents(latents, 96, 64, 8)


_OBLONG = {"height": 96, "width": 64}  # a grid of 6 x 4 tokens, 12 x 8 latent cells


def _klein() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2
    )
    return diffusers.Flux2KleinPipeline(
        transformer=transformer, scheduler=_flow(), vae=vae.eval(), **_nothing(*_TEXT_PARTS)
    )


def _unpack_klein(pipe: Any, latents: Tensor) -> Tensor:
    spatial = latents.transpose(1, 2).unflatten(2, (6, 4))
    return pipe._unpatchify_latents(spatial)


def _qwen(cls: Any = diffusers.QwenImagePipeline, **parts: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    given = {"vae": None, **_nothing(*_TEXT_PARTS), **parts}
    return cls(transformer=transformer, scheduler=_flow(use_dynamic_shifting=True), **given)


class _SmallReferences(diffusers.QwenImageEditPipeline):
    """Encodes its reference picture at 32 x 32 instead of a million pixels."""

    @functools.wraps(diffusers.QwenImageEditPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
        with mock.patch(f"{module}.calculate_dimensions", return_value=(32, 32, None)):
            return super().__call__(*args, **kwargs)


def _qwen_edit() -> Any:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return _qwen(_SmallReferences, vae=vae.eval(), processor=None)


def _qwen_text(samples: Samples) -> dict[str, Tensor]:
    """Negative prompts are shorter, and some prompts are padded."""
    mask = ones(samples, TOKENS)
    for row, i in enumerate(samples):
        mask[row, TOKENS - i % 2 :] = 0
    return {
        "prompt_embeds": embed(samples, TOKENS, WIDTH),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embed(samples, TOKENS - 1, WIDTH, seed=1),
        "negative_prompt_embeds_mask": ones(samples, TOKENS - 1),
    }


def _unpack_qwen(pipe: Any, latents: Tensor) -> Tensor:
    return pipe._unpack_latents(latents, 96, 64, 8)[:, :, 0]


def _chroma() -> Any:
    transformer = _flux_network(
        diffusers.ChromaTransformer2DModel,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        transformer=transformer,
        scheduler=_flow(use_dynamic_shifting=True),
        **_nothing("vae", *_TEXT_PARTS),
    )


_TRUE_CFG: dict[str, Any] = dict(calls="sequential", scale_name="true_cfg_scale")

FAMILIES |= {
    "flux": Family(
        lambda: _flux(embedded=False),
        _flux_text,
        unpack=_unpack_flux,
        options=_OBLONG,
        **_TRUE_CFG,
    ),
    "flux-img2img": Family(
        lambda: _flux(
            diffusers.FluxImg2ImgPipeline,
            embedded=False,
            vae=_plain_autoencoder(shift_factor=0.0),
        ),
        lambda samples: _flux_text(samples) | _pictures(samples),
        unpack=lambda pipe, latents: pipe._unpack_latents(latents, 24, 16, 2),
        options={"height": 24, "width": 16, "strength": 0.7},
        steps=4,
        **_TRUE_CFG,
    ),
    "flux-distilled": Family(
        _flux,
        _positive,
        calls="one",
        unpack=_unpack_flux,
        options=_OBLONG | {"guidance_scale": 3.5},
        scale_name=None,
    ),
    "flux-kontext": Family(
        lambda: _flux(diffusers.FluxKontextPipeline, vae=_plain_autoencoder(shift_factor=0.0)),
        lambda samples: _flux_text(samples) | {"image": PICTURE},
        unpack=lambda pipe, latents: pipe._unpack_latents(latents, 24, 16, 2),
        options={"height": 24, "width": 16, "max_area": 24 * 16, "_auto_resize": False},
        **_TRUE_CFG,
    ),
    "flux2-klein": Family(
        _klein,
        lambda samples: _text(samples, TOKENS, WIDTH),
        calls="sequential",
        unpack=_unpack_klein,
        options=_OBLONG,
        needs="Flux2KleinPipeline",
    ),
    "flux2-klein-reference": Family(
        _klein,
        lambda samples: _text(samples, TOKENS, WIDTH) | {"image": PICTURE.resize((64, 64))},
        calls="sequential",
        unpack=_unpack_klein,
        options=_OBLONG,
        needs="Flux2KleinPipeline",
    ),
    "qwen-image": Family(
        _qwen,
        _qwen_text,
        unpack=_unpack_qwen,
        renormalises=True,
        options=_OBLONG,
        **_TRUE_CFG,
    ),
    "qwen-image-edit": Family(
        _qwen_edit,
        lambda samples: _qwen_text(samples) | {"image": PICTURE},
        unpack=_unpack_qwen,
        renormalises=True,
        options=_OBLONG,
        **_TRUE_CFG,
    ),
    "chroma": Family(
        _chroma,
        lambda samples: {
            name: value.float() for name, value in _masked(samples, width=WIDTH).items()
        },
        calls="sequential",
        unpack=_unpack_flux,
        options=_OBLONG,
    ),
}


# --- video ---------------------------------------------------------------------------------------


def _wan_network() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )


def _wan(second: bool = False, **options: Any) -> Any:
    return diffusers.WanPipeline(
        transformer=_wan_network(),
        transformer_2=_wan_network() if second else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **options,
        **_nothing("vae", *_TEXT_PARTS),
    )


def _ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=WIDTH,
    )
    return diffusers.LTXPipeline(
        transformer=transformer, scheduler=_flow(), **_nothing("vae", *_TEXT_PARTS)
    )


def _unpack_ltx(pipe: Any, latents: Tensor) -> Tensor:
    return pipe._unpack_latents(latents, 2, 3, 4)


def _hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    parts = [f"{part}{i}" for part in _TEXT_PARTS for i in ("", "_2")]
    return diffusers.HunyuanVideoPipeline(
        transformer=transformer, scheduler=_flow(), **_nothing("vae", *parts)
    )


def _hunyuan_text(samples: Samples) -> dict[str, Tensor]:
    return _masked(samples) | _pooled(samples, WIDTH)


def _mochi() -> Any:
    """Its schedule runs backwards, and its network predicts x0 - eps."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=TOKENS,
    )
    return diffusers.MochiPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        **_nothing("vae", *_TEXT_PARTS),
    )


def _cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=5,
        max_text_seq_length=TOKENS,
    )
    return diffusers.CogVideoXPipeline(
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=3.0,
            clip_sample=False,
        ),
        **_nothing("vae", *_TEXT_PARTS),
    )


_CLIP = {"height": 64, "width": 64, "num_frames": 5}  # two latent frames

FAMILIES |= {
    "wan": Family(
        _wan, lambda samples: _text(samples, TOKENS, WIDTH), calls="sequential", options=_CLIP
    ),
    "wan-two-transformers": Family(
        lambda: _wan(second=True, boundary_ratio=0.9),
        lambda samples: _text(samples, TOKENS, WIDTH),
        calls="sequential",
        options=_CLIP,
        steps=4,
    ),
    "wan-per-token-time": Family(
        lambda: _wan(expand_timesteps=True),
        lambda samples: _text(samples, TOKENS, WIDTH),
        calls="sequential",
        options=_CLIP,
    ),
    "ltx": Family(
        _ltx,
        _masked,
        unpack=_unpack_ltx,
        options={"height": 96, "width": 128, "num_frames": 9},
    ),
    "hunyuan-video": Family(_hunyuan_video, _hunyuan_text, options=_CLIP, **_TRUE_CFG),
    "hunyuan-video-distilled": Family(
        _hunyuan_video,
        lambda samples: {
            k: v for k, v in _hunyuan_text(samples).items() if not k.startswith("negative")
        },
        calls="one",
        options=_CLIP | {"guidance_scale": 6.0},
        scale_name=None,
    ),
    "mochi": Family(
        _mochi,
        _masked,
        options={"height": 64, "width": 64, "num_frames": 7},
    ),
    "cogvideox": Family(
        _cogvideox,
        lambda samples: _text(samples, TOKENS, WIDTH),
        options=_CLIP,
    ),
}

for _name in [name for name, family in FAMILIES.items() if not hasattr(diffusers, family.needs)]:
    del FAMILIES[_name]
