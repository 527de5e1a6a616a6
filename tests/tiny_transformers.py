"""Tiny, random, real transformers of every family, with inputs of two rows that they accept.

Latents are 8 x 12 cells in patches of 2, so that pictures have 4 x 6 tokens: not square, and not as
many as the text has. Videos have 3 frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

ROWS = 2
HEIGHT, WIDTH = 4, 6  # tokens
FRAMES = 3
TEXTS = 5
TEXT_WIDTH = 12


@dataclass
class Tiny:
    """A network, the grid of its latents (in tokens where they are packed), and its arguments.

    `image` and `text` name the arguments that hold them; `tokens` is the grid of its tokens, and
    `first` the module in which the image first attends, to text too where it ever does so.
    """

    network: torch.nn.Module
    grid: tuple[int, ...]
    tokens: tuple[int, ...]
    inputs: dict[str, Any]
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"
    first: str = "transformer_blocks.0.attn"

    def __call__(self, **changes: Any) -> torch.Tensor:
        """The network's output for its inputs, or for changed ones."""
        with torch.no_grad():
            out = self.network(**{**self.inputs, **changes}, return_dict=False)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def other_text(self, seed: int = 7) -> dict[str, Any]:
        """Another text of the same length, as a change of the inputs."""
        text = self.inputs[self.text]
        if isinstance(text, list):
            return {self.text: [noise(*each.shape, seed=seed + i) for i, each in enumerate(text)]}
        return {self.text: noise(*text.shape, seed=seed)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[..., Tiny]) -> Callable[..., Tiny]:
    """Build with weights of a fixed seed, all of them random: zeros would hide what layers do."""

    def build(**options: Any) -> Tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny = make(**options)
            for parameter in tiny.network.parameters():
                if parameter.ndim < 2 or not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.3)
        tiny.network.eval().requires_grad_(False)
        return tiny

    build.__name__ = make.__name__
    return build


def picture(channels: int = 4) -> torch.Tensor:
    return noise(ROWS, channels, 2 * HEIGHT, 2 * WIDTH)


def video(channels: int = 4) -> torch.Tensor:
    return noise(ROWS, channels, FRAMES, 2 * HEIGHT, 2 * WIDTH)


def packed(channels: int = 4) -> torch.Tensor:
    return noise(ROWS, HEIGHT * WIDTH, channels)


def text(tokens: int = TEXTS, width: int = TEXT_WIDTH) -> torch.Tensor:
    return noise(ROWS, tokens, width, seed=1)


def time(scale: float = 1000.0) -> torch.Tensor:
    return torch.tensor([0.7 * scale, 0.3 * scale])


def positions(axes: int) -> torch.Tensor:
    """(..., row, column, ...) of each token, as Flux (3 axes) and Flux 2 (4 axes) count them."""
    rows = torch.arange(HEIGHT).repeat_interleave(WIDTH)
    columns = torch.arange(WIDTH).repeat(HEIGHT)
    zeros = torch.zeros_like(rows)
    return torch.stack([zeros, rows, columns, zeros][:axes], dim=1).float()


GRID, TOKENS = (2 * HEIGHT, 2 * WIDTH), (HEIGHT, WIDTH)
VIDEO_GRID, VIDEO_TOKENS = (FRAMES, *GRID), (FRAMES, *TOKENS)
SMALL = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2)


@seeded
def dit() -> Tiny:
    network = diffusers.DiTTransformer2DModel(
        **SMALL, in_channels=4, out_channels=8, sample_size=8, patch_size=2
    )
    inputs = dict(
        hidden_states=noise(ROWS, 4, 8, 8),  # the only family whose pictures must be square
        timestep=time(),
        class_labels=torch.tensor([1, 2]),
    )
    return Tiny(
        network, (8, 8), (4, 4), inputs, text="class_labels", first="transformer_blocks.0.attn1"
    )


@seeded
def pixart() -> Tiny:
    network = diffusers.PixArtTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )
    inputs = dict(
        hidden_states=picture(),
        encoder_hidden_states=text(),
        timestep=time(),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )
    return Tiny(network, GRID, TOKENS, inputs, first="transformer_blocks.0.attn1")


@seeded
def sana() -> Tiny:
    network = diffusers.SanaTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        patch_size=2,
    )
    inputs = dict(
        hidden_states=picture(),
        encoder_hidden_states=text(),
        timestep=time(),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )
    return Tiny(network, GRID, TOKENS, inputs, first="transformer_blocks.0.attn1")


@seeded
def hunyuan_dit() -> Tiny:
    network = diffusers.HunyuanDiT2DModel(
        **{**SMALL, "num_layers": 4},
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=16,
        pooled_projection_dim=TEXT_WIDTH,
        text_len=TEXTS,
        text_len_t5=TEXTS,
        use_style_cond_and_image_meta_size=False,
    )
    inputs = dict(
        hidden_states=picture(),
        timestep=time(),
        encoder_hidden_states=text(),
        text_embedding_mask=torch.ones(ROWS, TEXTS),
        encoder_hidden_states_t5=text(width=16),
        text_embedding_mask_t5=torch.ones(ROWS, TEXTS),
        image_rotary_emb=(noise(HEIGHT * WIDTH, 8), noise(HEIGHT * WIDTH, 8, seed=1)),
    )
    return Tiny(network, GRID, TOKENS, inputs, first="blocks.0.attn1")


@seeded
def sd3(dual: bool = True, qk_norm: str | None = "rms_norm", layers: int = 2) -> Tiny:
    network = diffusers.SD3Transformer2DModel(
        **{**SMALL, "num_layers": layers},
        sample_size=12,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
        qk_norm=qk_norm,
    )
    inputs = dict(
        hidden_states=picture(),
        encoder_hidden_states=text(),
        pooled_projections=noise(ROWS, TEXT_WIDTH, seed=2),
        timestep=time(),
    )
    return Tiny(network, GRID, TOKENS, inputs)


@seeded
def flux(references: bool = False) -> Tiny:
    """With reference images behind the picture, as Flux Kontext has them, if asked for."""
    network = diffusers.FluxTransformer2DModel(
        **SMALL,
        num_single_layers=2,
        in_channels=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    latents, ids = packed(), positions(3)
    if references:
        latents = torch.cat([latents, noise(ROWS, 7, 4, seed=9)], dim=1)
        ids = torch.cat([ids, torch.ones(7, 3)])
    inputs = dict(
        hidden_states=latents,
        encoder_hidden_states=text(),
        pooled_projections=noise(ROWS, TEXT_WIDTH, seed=2),
        timestep=time(1.0),
        img_ids=ids,
        txt_ids=torch.zeros(TEXTS, 3),
    )
    return Tiny(network, TOKENS, TOKENS, inputs)


@seeded
def flux2(references: bool = False) -> Tiny:
    network = diffusers.Flux2Transformer2DModel(
        **SMALL,
        num_single_layers=2,
        in_channels=4,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    latents, ids = packed(), positions(4)
    if references:
        latents = torch.cat([latents, noise(ROWS, 7, 4, seed=9)], dim=1)
        ids = torch.cat([ids, torch.ones(7, 4)])
    inputs = dict(
        hidden_states=latents,
        encoder_hidden_states=text(),
        timestep=time(1.0),
        img_ids=ids,
        txt_ids=torch.zeros(TEXTS, 4),
    )
    return Tiny(network, TOKENS, TOKENS, inputs)


@seeded
def chroma() -> Tiny:
    network = diffusers.ChromaTransformer2DModel(
        **SMALL,
        num_single_layers=2,
        in_channels=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    inputs = dict(
        hidden_states=packed(),
        encoder_hidden_states=text(),
        timestep=time(1.0),
        img_ids=positions(3),
        txt_ids=torch.zeros(TEXTS, 3),
    )
    return Tiny(network, TOKENS, TOKENS, inputs)


@seeded
def qwen(references: bool = False, mask: bool = False) -> Tiny:
    """With a second picture of 2 x 3 tokens, as Qwen-Image-Edit has it, if asked for."""
    network = diffusers.QwenImageTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=1,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    latents, shapes = packed(), [(1, HEIGHT, WIDTH)]
    if references:
        latents = torch.cat([latents, noise(ROWS, 6, 4, seed=9)], dim=1)
        shapes = [*shapes, (1, 2, 3)]
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    inputs = dict(
        hidden_states=latents,
        encoder_hidden_states=text(),
        encoder_hidden_states_mask=seen if mask else None,
        timestep=time(1.0),
        img_shapes=[shapes] * ROWS,
    )
    return Tiny(network, TOKENS, TOKENS, inputs)


@seeded
def wan(from_image: bool = False) -> Tiny:
    """With an image beside the text, as Wan's image-to-video networks have it, if asked for."""
    image = dict(image_dim=10, added_kv_proj_dim=16) if from_image else {}
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=16,
        rope_max_seq_len=16,
        **image,
    )
    inputs = dict(hidden_states=video(), timestep=time(), encoder_hidden_states=text())
    if from_image:
        inputs |= dict(
            encoder_hidden_states=text(512),  # the only length that these networks take
            encoder_hidden_states_image=noise(ROWS, 9, 10, seed=3),
        )
    return Tiny(network, VIDEO_GRID, VIDEO_TOKENS, inputs, first="blocks.0.attn1")


@seeded
def ltx() -> Tiny:
    network = diffusers.LTXVideoTransformer3DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
    )
    inputs = dict(
        hidden_states=noise(ROWS, FRAMES * HEIGHT * WIDTH, 4),
        encoder_hidden_states=text(),
        timestep=time(),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
    )
    return Tiny(network, VIDEO_TOKENS, VIDEO_TOKENS, inputs, first="transformer_blocks.0.attn1")


@seeded
def hunyuan_video() -> Tiny:
    network = diffusers.HunyuanVideoTransformer3DModel(
        **SMALL,
        num_single_layers=2,
        num_refiner_layers=1,
        in_channels=4,
        out_channels=4,
        guidance_embeds=False,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    inputs = dict(
        hidden_states=video(),
        timestep=time(),
        encoder_hidden_states=text(),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        pooled_projections=noise(ROWS, TEXT_WIDTH, seed=2),
    )
    return Tiny(network, VIDEO_GRID, VIDEO_TOKENS, inputs)


@seeded
def cogvideox() -> Tiny:
    network = diffusers.CogVideoXTransformer3DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        sample_width=2 * WIDTH,
        sample_height=2 * HEIGHT,
        sample_frames=9,  # 3 latent frames
        max_text_seq_length=TEXTS,
        use_rotary_positional_embeddings=True,
    )
    inputs = dict(
        hidden_states=video().transpose(1, 2),
        encoder_hidden_states=text(),
        timestep=time(),
        image_rotary_emb=tuple(noise(FRAMES * HEIGHT * WIDTH, 8, seed=i) for i in (4, 5)),
    )
    return Tiny(network, VIDEO_GRID, VIDEO_TOKENS, inputs, first="transformer_blocks.0.attn1")


def _sizes() -> dict[str, torch.Tensor]:
    size = torch.tensor([[64.0, 96.0]] * ROWS)
    return dict(original_size=size, target_size=size, crop_coords=torch.zeros(ROWS, 2))


@seeded
def cogview3() -> Tiny:
    network = diffusers.CogView3PlusTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=8,
    )
    inputs = dict(
        hidden_states=picture(), encoder_hidden_states=text(), timestep=time(), **_sizes()
    )
    return Tiny(network, GRID, TOKENS, inputs, first="transformer_blocks.0.attn1")


@seeded
def cogview4() -> Tiny:
    network = diffusers.CogView4Transformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    inputs = dict(
        hidden_states=picture(), encoder_hidden_states=text(), timestep=time(), **_sizes()
    )
    return Tiny(network, GRID, TOKENS, inputs, first="transformer_blocks.0.attn1")


@seeded
def auraflow() -> Tiny:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=12,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    inputs = dict(hidden_states=picture(), encoder_hidden_states=text(), timestep=time(1.0))
    return Tiny(network, GRID, TOKENS, inputs, first="joint_transformer_blocks.0.attn")


@seeded
def lumina2(lengths: tuple[int, ...] = (TEXTS, TEXTS)) -> Tiny:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    )
    inputs = dict(
        hidden_states=picture(),
        timestep=time(1.0),
        encoder_hidden_states=text(),
        encoder_attention_mask=torch.arange(TEXTS) < torch.tensor(lengths)[:, None],
    )
    return Tiny(network, GRID, TOKENS, inputs, first="layers.0.attn")


@seeded
def z_image() -> Tiny:
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 16, 16],
    )
    inputs = dict(x=list(picture().unsqueeze(2)), t=time(1.0), cap_feats=list(text()))
    return Tiny(
        network, GRID, TOKENS, inputs, image="x", text="cap_feats", first="layers.0.attention"
    )


IMAGE_ALONE = [dit, pixart, hunyuan_dit, wan, ltx]
"""Families in which the image attends to itself and, apart from that, to the text."""

JOINT = [
    sd3,
    flux,
    flux2,
    chroma,
    qwen,
    hunyuan_video,
    cogvideox,
    cogview3,
    cogview4,
    auraflow,
    lumina2,
    z_image,
]
"""Families in which image and text attend together."""


def moved(tiny: Tiny, row: int, column: int, frame: int = 0) -> dict[str, Any]:
    """A change of the inputs in one image token only, of all rows and channels."""
    image = tiny.inputs[tiny.image]
    if isinstance(image, list):
        return {tiny.image: [_nudge(each, tiny, row, column, frame) for each in image]}
    return {tiny.image: _nudge(image, tiny, row, column, frame)}


def _nudge(image: torch.Tensor, tiny: Tiny, row: int, column: int, frame: int) -> torch.Tensor:
    image = image.clone()
    if tiny.grid == tiny.tokens:  # packed
        height, width = tiny.tokens[-2:]
        image[:, (frame * height + row) * width + column] += 1.0
        return image
    cells = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
    if len(tiny.grid) == 2:
        image[(..., *cells)] += 1.0
    elif tiny.first.startswith("blocks") or "Hunyuan" in type(tiny.network).__name__:
        image[(slice(None), slice(None), frame, *cells)] += 1.0
    else:  # CogVideoX has frames before channels
        image[(slice(None), frame, slice(None), *cells)] += 1.0
    return image
