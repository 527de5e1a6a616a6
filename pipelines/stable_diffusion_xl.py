"""Stable Diffusion XL with ``guidance=`` in the call."""

from diffusers import StableDiffusionXLPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedStableDiffusionXLPipeline(GuidedPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline`, called as ``pipe(prompt, guidance=APG(scale=12))``."""
