"""LTX-Video, text to video with ``guidance=`` in the call."""

from diffusers import LTXPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedLTXPipeline(GuidedPipelineMixin, LTXPipeline):
    """`LTXPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
