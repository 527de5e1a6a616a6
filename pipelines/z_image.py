"""Z-Image with ``guidance=`` in the call."""

from diffusers import ZImagePipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedZImagePipeline(GuidedPipelineMixin, ZImagePipeline):
    """`ZImagePipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
