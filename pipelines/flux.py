"""Flux with ``guidance=`` in the call."""

from diffusers import FluxPipeline

from guidancekit.pipeline import GuidedPipelineMixin


class GuidedFluxPipeline(GuidedPipelineMixin, FluxPipeline):
    """`FluxPipeline`, called as ``pipe(prompt, guidance=APG(scale=8))``."""
