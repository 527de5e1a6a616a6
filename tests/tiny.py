"""Tiny, random, real Diffusers pipelines: the networks of SD, SDXL and SD3, the size of a test.

The weights mean nothing; what a test needs of them is that the conditional and the unconditional
prediction differ, that a run takes milliseconds, and that the same seed builds the same network.
Nothing is downloaded.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
)

WORDS = (
    "a an and above background big blue circle cross dotted green heart left moon of on plain "
    "purple red ring right small square star striped the triangle white yellow"
).split()
TEXT_WIDTH = 16
LATENT_SIZE = 8  # latent cells per side; the autoencoder below enlarges by 4, so pictures are 32x32
PROMPT_LENGTH = 16  # tokens


def tiny_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word of `words`, `<unk>` for every other word."""
    vocabulary = ["<pad>", "<start>", "<end>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[
            ("<start>", vocabulary.index("<start>")),
            ("<end>", vocabulary.index("<end>")),
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=PROMPT_LENGTH,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
    )


def _text_config(tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


def _unet(prediction_width: int, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=prediction_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def _betas() -> dict:
    """Stable Diffusion's noise schedule; one entry fewer to write in every scheduler below."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
    }


def tiny_sd(seed: int = 0) -> StableDiffusionPipeline:
    """A random Stable Diffusion 1.x pipeline (epsilon prediction, DDIM), in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        pipe = StableDiffusionPipeline(
            vae=_autoencoder().eval(),
            text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            unet=_unet(TEXT_WIDTH).eval(),
            scheduler=DDIMScheduler(**_betas(), clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A random SDXL pipeline: two text encoders, pooled text and size conditioning, Euler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        time_ids, id_width = 6, 4
        pipe = StableDiffusionXLPipeline(
            vae=_autoencoder().eval(),
            text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(),
            unet=_unet(
                2 * TEXT_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=id_width,
                projection_class_embeddings_input_dim=TEXT_WIDTH + time_ids * id_width,
                use_linear_projection=True,
            ).eval(),
            scheduler=EulerDiscreteScheduler(**_betas()),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """A random Stable Diffusion 3 pipeline (joint attention, flow matching), without text encoders.

    Call it with the embeddings of `sd3_prompt`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=32,
        ).eval()
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder().eval(),
            **{f"text_encoder{i}": None for i in ("", "_2", "_3")},
            **{f"tokenizer{i}": None for i in ("", "_2", "_3")},
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_prompt(count: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompt embeddings for `tiny_sd3`, another prompt per sample; the negative is zero."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(count, 5, TEXT_WIDTH, generator=generator)
    pooled = torch.randn(count, TEXT_WIDTH, generator=generator)
    return {
        "prompt_embeds": prompt,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": torch.zeros_like(prompt),
        "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
    }


def latents_of(pipe, guidance_scale=5.0, seed=0, steps=4, **options) -> torch.Tensor:
    """The latents that one call of a tiny pipeline ends with, [n, 4, 8, 8]."""
    return pipe(
        **{"prompt": "a red star", "num_inference_steps": steps, **options},
        guidance_scale=guidance_scale,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images


def tiny_clip(folder):
    """A random CLIP, saved in a folder with its tokenizer."""
    tokenizer = tiny_tokenizer()
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    special = dict(bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    config = CLIPConfig(
        text_config=dict(size, vocab_size=len(tokenizer), max_position_embeddings=16, **special),
        vision_config=dict(size, image_size=16, patch_size=8),
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
