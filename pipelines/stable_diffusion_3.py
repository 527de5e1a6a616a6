"""Stable Diffusion 3 and 3.5 with ``guidance=`` in the call."""

from diffusers import StableDiffusion3Pipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedStableDiffusion3Pipeline(GuidedPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
