"""The networks that make up the pipeline, at the sizes this world needs."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .world import ANY_SHAPE, BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES

LATENT_CHANNELS = 8
LATENT_SIZE = 16  # a quarter of the picture's 64
TEXT_WIDTH = 128
TEXT_LENGTH = 20  # the longest caption has 18 tokens

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


def text_encoder(vocabulary: int) -> CLIPTextModel:
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
    model = CLIPTextModel(config)
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

    There, an error in a predicted noise weighs 150 times as much in the picture, and group norms
    make the mean of the noise hard to predict; the velocity asks for the picture itself.

    Scaled-linear betas keep some of the mean colour in the last step, so the background would
    follow the starting noise instead of the caption.
    """
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
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
        """The predicted velocity, (n, 8, 16, 16), for token numbers (n, TEXT_LENGTH)."""
        text = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


@torch.no_grad()
def fold_normalisation(vae: AutoencoderTiny, mean: Tensor, std: Tensor) -> None:
    """Make the encoder's output zero mean and unit deviation by changing its last convolution.

    `mean` and `std` are the measured ones, 8 values each. The decoder is left as it is: training
    keeps the latents so close to 0 and 1 that it does not notice.
    """
    last = vae.encoder.layers[-1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)
