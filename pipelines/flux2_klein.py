"""Flux 2 Klein with ``guidance=`` in the call."""

from diffusers import Flux2KleinPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedFlux2KleinPipeline(GuidedPipelineMixin, Flux2KleinPipeline):
    """`Flux2KleinPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
