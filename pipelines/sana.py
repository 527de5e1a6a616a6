"""Sana with ``guidance=`` in the call."""

from diffusers import SanaPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedSanaPipeline(GuidedPipelineMixin, SanaPipeline):
    """`SanaPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
