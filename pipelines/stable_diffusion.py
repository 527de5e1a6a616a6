"""Stable Diffusion 1.x and 2.x with ``guidance=`` in the call."""

from diffusers import StableDiffusionPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedStableDiffusionPipeline(GuidedPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline`, called as ``pipe(prompt, guidance=APG(scale=10))``."""
