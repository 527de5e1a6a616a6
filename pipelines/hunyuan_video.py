"""HunyuanVideo with ``guidance=`` in the call."""

from diffusers import HunyuanVideoPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedHunyuanVideoPipeline(GuidedPipelineMixin, HunyuanVideoPipeline):
    """`HunyuanVideoPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
