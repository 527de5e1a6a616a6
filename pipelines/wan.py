"""Wan text-to-video with ``guidance=`` in the call."""

from diffusers import WanPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedWanPipeline(GuidedPipelineMixin, WanPipeline):
    """`WanPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
