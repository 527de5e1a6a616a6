"""PixArt-Sigma with ``guidance=`` in the call."""

from diffusers import PixArtSigmaPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedPixArtSigmaPipeline(GuidedPipelineMixin, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
