"""Autoguidance, arXiv:2406.02507: away from a weaker version of the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from .. import bundled, schedules
from ..errors import GuidanceError
from ..guidance import Preset, State
from ..schedules import AnyScale
from ..step import Prediction, Step
from ..uncompiled import brought_to, uncompiled
from .weak import WeakBranch


class AutoGuidance(WeakBranch):
    """Autoguidance: away from a smaller or less trained network, arXiv:2406.02507 Eq. 3.

    weak + w (cond - weak): two networks, the same x_t and the same condition. CFG(w_u) +
    AutoGuidance(w) is the paper's Eq. 6. The two share the latent space and the noise levels; a
    weaker network of another `prediction` type is converted through x0.

    `network` is a module (on the device and in the dtype of the pipeline's), or the folder of a
    denoiser or of a whole pipeline, read from safetensors at the first step; only a folder can be
    saved. Good ones are an earlier checkpoint or a smaller sibling, degraded in the way the main
    network is: dropout or noise on a good one did not help (paper). Keep it on at all noise levels.
    Default: w = 2.1, the paper's for ImageNet-512; for text-to-image nothing is published. The
    presets `scenes` and `scenes-flow` name the embedded models' weaker siblings.
    Cost: 2 network evaluations per step, 1 of each network; 1 where w = 1.
    Oracle: a loop by hand with two networks, Eq. 3 and Eq. 6.
    """

    name = "autoguidance"
    paper = "arXiv:2406.02507"
    presets = {
        family: Preset({"scale": scale}, f"arXiv:2406.02507, {model}, 32 Heun steps, best FID")
        for family, scale, model in (
            ("edm2-s", 2.1, "ImageNet-512 S by XS at 1/16 of the training"),
            ("edm2-xxl", 2.05, "ImageNet-512 XXL by M at 1/3.5 of the training"),
            ("edm2-s-64", 1.7, "ImageNet-64 S"),
        )
    }
    presets |= {
        family: Preset(
            {"network": f"{family}:weak"}, "ours: a quarter of the size, trained less; w not tuned"
        )
        for family in bundled.FAMILIES.values()
    }

    def __init__(
        self,
        scale: AnyScale = 2.1,
        network: Annotated[
            nn.Module | str | None, "the weaker network, or the folder that it was saved to"
        ] = None,
        prediction: Annotated[
            Literal["same", "epsilon", "v_prediction", "sample"], "what the weaker one predicts"
        ] = "same",
    ) -> None:
        if not (network is None or isinstance(network, (str, nn.Module))):
            raise GuidanceError(
                f"AutoGuidance(network=...): found {network!r:.80}, expected a module or a folder."
            )
        self.scale = schedules.from_config(scale)
        self.network = network
        self.prediction = prediction

    def weak(self, step: Step, state: State) -> Prediction:
        if self.network is None:
            raise GuidanceError(
                "AutoGuidance needs a weaker network to guide away from: write "
                "AutoGuidance(network=...) with a module, or the folder of a smaller or less "
                'trained model. AutoGuidance.preset("scenes") has one for an embedded model.'
            )
        weak = step.evaluate("cond", network=self._evaluate)
        if weak.out.shape != step.x.shape:
            raise GuidanceError(
                f"AutoGuidance: the weaker network put out {list(weak.out.shape)}, expected "
                f"{list(step.x.shape)}: it must predict latents of the same kind."
            )
        if self.prediction in ("same", step.kind):
            return weak
        x0 = Prediction(weak.out, weak.x, weak.level, self.prediction).x0  # type: ignore[arg-type]
        return step.predict(x0=x0)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The weaker network on the arguments of the main one."""
        network: Any = self.network
        if isinstance(network, str):
            values = (*args, *kwargs.values())
            like = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
            if getattr(getattr(self, "_loaded", None), "dtype", None) != like.dtype:
                self._loaded = load_denoiser(network, like.dtype)
            network = brought_to(like.device, self._loaded)
        if "guidancekit" in getattr(vars(network).get("_diffusers_hook"), "hooks", ()):
            raise GuidanceError(
                "AutoGuidance: the weaker network is itself guided; give another, or a copy."
            )
        try:
            return network(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            raise GuidanceError(
                f"AutoGuidance: the weaker network ({type(network).__name__}) cannot be called "
                f"like the pipeline's: {error}"
            ) from error


def load_denoiser(folder: str, dtype: torch.dtype) -> Any:
    """The denoiser saved in a folder, or in that of a pipeline; safetensors only."""
    parts = [Path(bundled.locate(folder), name) for name in ("", "unet", "transformer")]
    found = next((part for part in parts if (part / "config.json").is_file()), None)
    if found is None:
        raise GuidanceError(
            f"AutoGuidance(network={folder!r}): there is no denoiser in that folder; expected one "
            "of a Diffusers model or pipeline, with its config.json."
        )
    try:
        return uncompiled(
            lambda: AutoModel.from_pretrained(str(found), torch_dtype=dtype, use_safetensors=True)
        )
    except Exception as error:  # of several libraries
        raise GuidanceError(f"AutoGuidance(network={folder!r}): {error}") from error
