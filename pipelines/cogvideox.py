"""CogVideoX, text to video with ``guidance=`` in the call."""

from diffusers import CogVideoXPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedCogVideoXPipeline(GuidedPipelineMixin, CogVideoXPipeline):
    """`CogVideoXPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
