"""Qwen-Image with ``guidance=`` in the call."""

from diffusers import QwenImagePipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedQwenImagePipeline(GuidedPipelineMixin, QwenImagePipeline):
    """`QwenImagePipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
