"""Annealing guidance, arXiv:2506.24108: a learned scale on top of CFG++'s step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from .. import bundled
from ..errors import GuidanceError
from ..guidance import Preset, State
from ..parameters import Range
from ..step import BOTH, FLOWS, Branch, Moment, Step
from ..tensors import norm
from ..uncompiled import brought_to
from .cfgpp import Renoising

_SDXL = 4 * 128 * 128


class AnnealingGuidance(Renoising):
    """Annealing guidance: a small network chooses the scale of each step, arXiv:2506.24108.

    eps_u + w' (eps_c - eps_u) denoises and eps_u re-noises, as in CFG++, with
    w' = MLP(t/1000, ||delta|| / `divisor`, lambda) per sample: delta = eps_c - eps_u of the raw
    latents (v for flow models, as in a third party's port), t the timestep, and lambda
    `alignment`. w' is CFG++'s lambda, about 1; `report` shows the CFG scales it stands for.

    `weights` is a file with the network: the authors' checkpoint for SDXL (.pt; it has no licence,
    so it is not shipped), or .safetensors, such as `guidancekit fit annealing` makes.
    Defaults: lambda 0.4 is that of the official sample script. `divisor` None is the file's own,
    else 5, the official code's for SDXL, times sqrt(elements / 65536) (our rule). Made for 50 DDIM
    steps; other numbers are tolerated. The layout follows the official code, but we had no
    checkpoint to compare values with (unverified). The presets `scenes` and `scenes-flow` name
    the networks of the embedded models.
    Cost: 2 network evaluations per step.
    Oracle: the network in NumPy, in a DDIM loop by hand.
    """

    name = "annealing"
    paper = "arXiv:2506.24108"
    presets = {
        "sdxl": Preset(
            {"alignment": 0.4, "divisor": 5.0},
            "official sample script, 50 DDIM steps; give the authors' checkpoint as weights",
        ),
        **{
            family: Preset({"weights": f"{family}:annealing"}, "ours: trained for 30 steps")
            for family in bundled.FAMILIES.values()
        },
    }

    def __init__(
        self,
        weights: Annotated[str | None, "file of the trained network"] = None,
        alignment: Annotated[
            float, Range(0, 1), "lambda: 0 is for quality, 1 for the prompt"
        ] = 0.4,
        divisor: Annotated[
            float | None,
            Range(1e-6, slider=(0.1, 10)),
            "of ||delta||; None: the file's, or by size",
        ] = None,
    ) -> None:
        self.weights = weights
        self.alignment = alignment
        self.divisor = divisor

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        self.network()  # before the first step
        return BOTH

    def network(self) -> ScaleNetwork:
        """The network of the file, read once."""
        loaded: ScaleNetwork | None = getattr(self, "_loaded", None)
        if loaded is None:
            if self.weights is None:
                raise GuidanceError(
                    "AnnealingGuidance needs a network: AnnealingGuidance(weights=...) with the "
                    "published checkpoint for SDXL, or a file that `guidancekit fit annealing` "
                    'made. AnnealingGuidance.preset("scenes") has one for an embedded model.'
                )
            loaded = self._loaded = ScaleNetwork.load(self.weights)
        return loaded

    @torch.no_grad()
    def strength_at(self, step: Step) -> Tensor:
        network = brought_to(step.x.device, self.network())
        delta = difference(step.cond, step.uncond)
        divisor = self.divisor or network.divisor or divisor_for(delta)
        return network(step.time, norm(delta) / divisor, self.alignment)


def difference(cond: Any, uncond: Any) -> Tensor:
    """delta of two predictions: of the noise, or of the velocity of a flow model."""
    space = "v" if cond.kind in FLOWS else "eps"
    delta: Tensor = getattr(cond, space) - getattr(uncond, space)
    return delta


def divisor_for(latents: Tensor) -> float:
    """The published divisor, for latents [B, ...] of another size than SDXL's."""
    return 5 * math.sqrt(latents[0].numel() / _SDXL)


class ScaleNetwork(nn.Module):
    """w'(t, ||delta||, lambda): 51,329 parameters, in the layout of the published checkpoint."""

    def __init__(self, divisor: float | None = None) -> None:
        super().__init__()
        self.divisor = divisor
        widths = [12, 128, 128, 128, 128]
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
        self.combined_head = nn.Sequential(*layers, nn.Linear(128, 1))

    def forward(self, time: float, size: Tensor, alignment: float) -> Tensor:
        """w' [B, 1, ...] at timestep `time` (1000: noise) for ||delta|| / divisor [B, 1, ...]."""
        given = [torch.full_like(size, time / 1000), size, torch.full_like(size, alignment)]
        waves = [f(v) for v in given for f in _EMBEDDING]
        features = torch.stack([wave.flatten() for wave in waves], dim=1)
        return 1 + self.combined_head(features.float()).view(size.shape)

    @classmethod
    def load(cls, file: str) -> ScaleNetwork:
        """Read the published layout; raises `GuidanceError` for anything else."""
        path = bundled.locate(file)
        try:
            weights, divisor = _read(path)
            network = cls(divisor)
            network.load_state_dict(weights)
        except Exception as error:  # of several libraries
            raise GuidanceError(
                f"AnnealingGuidance(weights={file!r}): expected a .safetensors or .pt file with "
                f"combined_head.0 to combined_head.8 of the annealing network: {error}"
            ) from error
        return network.float().eval().requires_grad_(False)


_EMBEDDING = (
    lambda v: v,
    lambda v: v.cos(),
    lambda v: (2 * v).cos(),
    lambda v: (3 * v).cos(),
)


def _read(file: str) -> tuple[dict[str, Tensor], float | None]:
    """The state dict in a file, and the divisor that it was trained with, if it says so."""
    metadata: dict[str, str] = {}
    if Path(file).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("guidance_scale_model", weights)
    divisor = json.loads(metadata.get("divisor", "null"))
    return weights, None if divisor is None else float(divisor)
