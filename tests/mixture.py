"""A network that is exact: the score of a Gaussian mixture, as a Stable Diffusion UNet.

The unconditional distribution is a mixture of Gaussians of equal width; the condition picks one of
them. Text embeddings carry the choice: row k of the first token's first entry is the mode (or -1
for the whole mixture). Everything about what guidance should do is then known in closed form.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from tiny import tiny_sd


class MixtureUNet(ModelMixin, ConfigMixin):
    """eps*(x, t) of a mixture with `means` [K, 4] (constant over the grid) and width `spread`."""

    @register_to_config
    def __init__(self, means=((1.0, 0.0, 0.0, 0.0),), spread=0.5):
        super().__init__()
        self.register_buffer("modes", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("alphas_cumprod", scheduler().alphas_cumprod.double())
        # what StableDiffusionPipeline reads from a UNet's configuration
        self.register_to_config(in_channels=4, sample_size=4, time_cond_proj_dim=None)
        self.width = spread

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        x = sample.double()
        bar = self.alphas_cumprod[timestep.long()].reshape(-1, *[1] * (x.ndim - 1))
        variance = bar * self.width**2 + 1 - bar
        centres = bar.sqrt() * self.modes[:, None, :, None, None]  # [K, 1, 4, 1, 1]
        squares = ((x - centres) ** 2).flatten(2).sum(-1)  # [K, B]
        posterior = torch.softmax(-squares / (2 * variance.flatten()), dim=0)
        picked = encoder_hidden_states[:, 0, 0].round().long()
        chosen = torch.nn.functional.one_hot(picked.clamp_min(0), len(self.modes)).T
        weights = torch.where(picked >= 0, chosen.double(), posterior)[..., None, None, None]
        score = -((x - centres) * weights).sum(0) / variance
        eps = (-(1 - bar).sqrt() * score).to(sample.dtype)
        return (eps,) if not return_dict else {"sample": eps}


def scheduler() -> DDIMScheduler:
    """A schedule that ends in nearly pure noise."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def mixture_pipe(means, spread=0.5) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline whose network is the exact mixture; latents are [B, 4, 4, 4]."""
    parts = {**tiny_sd().components, "unet": MixtureUNet(means, spread), "scheduler": scheduler()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, mode: int, count: int, negative: int = -1, steps=100, seed=0, **options):
    """Latents [count, 4, 4, 4] conditioned on `mode`, away from `negative` (the whole mixture)."""
    embeds = torch.zeros(count, 16, 16)
    return pipe(
        prompt_embeds=embeds + mode,
        negative_prompt_embeds=embeds + negative,
        num_inference_steps=steps,
        guidance_scale=2.0,
        height=16,
        width=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images
