"""The networks that make up the pipelines, at the sizes this world needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .world import ANY_SHAPE, BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES

LATENT_CHANNELS = 8
LATENT_SIZE = 16  # a quarter of the picture's 64
TEXT_WIDTH = 128
TEXT_LENGTH = 20  # the longest caption has 18 tokens

# Tokens of zeros that the Stable Diffusion 3 pipeline puts in place of T5's, see `FlowDenoiser`.
USUAL_ZEROS, MOST_ZEROS = 256, 512

# Where the flow model says what the recogniser sees, and how many features that are.
MIDDLE, SEEN = 3, 96

START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def autoencoder() -> AutoencoderTiny:
    """64x64 pictures to 16x16 latents of 8 channels, about 0.27M parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar; case and punctuation vanish, other words are unknown."""
    phrases = (*SIZES, *TEXTURES, *COLOURS, *SHAPES, *RELATIONS, *BACKGROUNDS)
    words = dict.fromkeys(" ".join(["a an and on background", ANY_SHAPE, *phrases]).split())
    vocabulary = {word: i for i, word in enumerate((START, END, UNKNOWN, *words))}
    fast = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{L}+"), behavior="removed", invert=True)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=START,
        eos_token=END,
        pad_token=END,  # as in the CLIP tokenizers of Stable Diffusion
        unk_token=UNKNOWN,
        model_max_length=TEXT_LENGTH,
    )


def text_encoder(vocabulary: int, kind: type[PreTrainedModel] = CLIPTextModel) -> PreTrainedModel:
    """Three transformer layers of width 128, about 0.6M parameters."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = kind(config)
    # CLIP's initial embeddings are tiny; the cross-attention learns sooner from larger ones.
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model


def unet(widths: tuple[int, int] = (64, 128)) -> UNet2DConditionModel:
    """Two levels, 16x16 and 8x8, cross-attention at the lower one; about 4M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, by its historical name
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Linear betas: the last step is almost pure noise, and trailing spacing starts there.

    Scaled-linear betas keep some of the mean colour in the last step, so the background would
    follow the starting noise instead of the caption.
    """
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="epsilon",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """The U-Net and the text encoder, trained together unless one is given and frozen."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The predicted noise, (n, 8, 16, 16), for token numbers (n, TEXT_LENGTH)."""
        return self.unet(noisy, timesteps, self.text(tokens), return_dict=False)[0]

    def text(self, tokens: Tensor) -> Tensor:
        """What the network reads of a text, (n, TEXT_LENGTH, 128)."""
        return self.text_encoder(tokens).last_hidden_state


def transformer(layers: int = 6, heads: int = 5) -> SD3Transformer2DModel:
    """Joint blocks of width 32 `heads` over 8x8 patches and the text; about 5.4M parameters.

    Queries and keys are normalised, as in Stable Diffusion 3.5, so that attention keeps its
    temperature at a high learning rate. All modulations and the output start at zero, so that every
    block starts as the identity (adaLN-Zero, arXiv:2212.09748).
    """
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,  # patches a side, so pictures of up to 128x128
        qk_norm="rms_norm",
    )
    blocks = model.transformer_blocks
    norms = [model.norm_out, *(b.norm1 for b in blocks), *(b.norm1_context for b in blocks)]
    for layer in (model.proj_out, *(norm.linear for norm in norms)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # What the text asks for in the last block goes nowhere: there is nothing to learn.
    last = blocks[-1].attn
    last.add_q_proj.requires_grad_(False)
    last.norm_added_q.requires_grad_(False)
    return model


def no_t5(vocabulary: int) -> T5EncoderModel:
    """A third text encoder that says nothing: zeros, as the pipeline has them without one.

    `from_pretrained` refuses a Stable Diffusion 3 folder without a third encoder unless it is told
    ``text_encoder_3=None, tokenizer_3=None``. With this one it loads, and it draws the same.
    """
    model = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=2 * TEXT_WIDTH,
            d_kv=8,
            d_ff=8,
            num_heads=1,
            num_layers=1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """No shift: equal steps of sigma, as many at high noise as at low.

    Shifts make up for what neighbouring latents have in common in large pictures (arXiv:2403.03206,
    section 5.3.2); these have 16x16 latents, of unit variance, a quarter of that paper's smallest.
    """
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


class FlowDenoiser(nn.Module):
    """The joint transformer and its two text encoders, trained together unless those are frozen.

    The pipeline appends tokens of zeros to the text where T5's would be: as many as its
    `max_sequence_length`, 256 unless told otherwise. Without positions they are all alike in every
    block, so here one token stands for them all, and its weight in the attention is their number.
    In training that is drawn anew for every sample, evenly on a logarithmic scale, so that a
    picture does not hang on it.
    """

    def __init__(
        self, text_encoder: nn.Module, text_encoder_2: nn.Module, transformer: SD3Transformer2DModel
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.transformer = transformer
        transformer.set_attn_processor(MaskedJointAttention())

    def forward(
        self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, zeros: Tensor | None = None
    ) -> Tensor:
        """The predicted velocity, noise - x0, (n, 8, 16, 16), for token numbers (n, TEXT_LENGTH).

        `zeros` (n,) are numbers of zero tokens; by default 256, in training random ones.
        """
        text, pooled = self.text_and_summary(tokens)
        if zeros is None:
            spread = torch.rand(len(noisy), device=noisy.device)
            zeros = MOST_ZEROS**spread if self.training else torch.full_like(spread, USUAL_ZEROS)
        patches = noisy.shape[-2] * noisy.shape[-1] // self.transformer.config.patch_size**2
        # n exp(score) = exp(score + log n)
        mask = F.pad(zeros.log()[:, None], (patches + text.shape[1] - 1, 0))
        extra = {"attention_mask": mask[:, None, None]}
        return self.transformer(
            noisy, text, pooled, timesteps, joint_attention_kwargs=extra, return_dict=False
        )[0]

    def text(self, tokens: Tensor) -> Tensor:
        """What the network reads of a text token by token, (n, TEXT_LENGTH + 1, 256)."""
        return self.text_and_summary(tokens)[0]

    def text_and_summary(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What `StableDiffusion3Pipeline.encode_prompt` makes of a text, with one zero token.

        Both encoders' last but one hidden states side by side (n, TEXT_LENGTH + 1, 256), and their
        projected end tokens (n, 256).
        """
        encoders = (self.text_encoder, self.text_encoder_2)
        found = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        features = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
        pooled = torch.cat([each.text_embeds for each in found], dim=-1)
        return F.pad(features, (0, 0, 0, 1)), pooled


class AlignedFlowDenoiser(FlowDenoiser):
    """The same with what its training needs besides: a `projector`, which reads from the middle of
    the transformer what a recogniser sees in the clean picture (arXiv:2410.06940).
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        width = self.transformer.inner_dim
        self.projector = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, SEEN))

    @contextmanager
    def middle(self) -> Iterator[list[Tensor]]:
        """Collects what enters block number `MIDDLE`, (n, patches, width), which must be eager."""
        found: list[Tensor] = []
        watch = self.transformer.transformer_blocks[MIDDLE].register_forward_pre_hook(
            lambda _, args, given: found.append(given["hidden_states"]), with_kwargs=True
        )
        try:
            yield found
        finally:
            watch.remove()


def flow_denoiser(vocabulary: int) -> AlignedFlowDenoiser:
    """A new one, about 6.7M parameters in all."""
    encoders = [text_encoder(vocabulary, CLIPTextModelWithProjection) for _ in range(2)]
    return AlignedFlowDenoiser(*encoders, transformer())


class MaskedJointAttention:
    """Joint attention of pictures and text, written out, with a mask.

    Diffusers' own ignores masks; and over this few positions the backward pass of fused attention
    is the slower one by far.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What both attend to; the mask is added to scores (n, heads, queries, keys), text last."""

        def heads(projection: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        x, text = hidden_states, encoder_hidden_states
        query = (heads(attn.to_q, x, attn.norm_q), heads(attn.add_q_proj, text, attn.norm_added_q))
        key = (heads(attn.to_k, x, attn.norm_k), heads(attn.add_k_proj, text, attn.norm_added_k))
        value = (heads(attn.to_v, x), heads(attn.add_v_proj, text))
        q, k, v = (torch.cat(each, dim=2) for each in (query, key, value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + attention_mask
        mixed = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        for_x, for_text = mixed.split([x.shape[1], text.shape[1]], dim=1)
        if not attn.context_pre_only:
            for_text = attn.to_add_out(for_text)
        return attn.to_out[0](for_x), for_text


@torch.no_grad()
def fold_normalisation(vae: AutoencoderTiny, mean: Tensor, std: Tensor) -> None:
    """Make the encoder's output zero mean and unit deviation by changing its last convolution.

    `mean` and `std` are the measured ones, 8 values each. The decoder is left as it is: training
    keeps the latents so close to 0 and 1 that it does not notice.
    """
    last = vae.encoder.layers[-1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)
