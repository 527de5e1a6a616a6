"""Chroma with ``guidance=`` in the call."""

from diffusers import ChromaPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedChromaPipeline(GuidedPipelineMixin, ChromaPipeline):
    """`ChromaPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
