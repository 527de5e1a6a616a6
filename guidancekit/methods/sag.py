"""Self-attention guidance, arXiv:2210.00939, and blur guidance, in x0 space."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.layers import Attend, Place, unseen
from ..errors import GuidanceError
from ..guidance import Guidance, Preset, State
from ..parameters import Range
from ..step import COND, Branch, Moment, Prediction, Step

AdditiveScale = Annotated[
    float, Range(0, slider=(0, 2)), "weight of the added difference: 0 is off"
]
BlurSigma = Annotated[float, Range(0.01, slider=(0.1, 5)), "width of the blur, in latent cells"]


class BlurGuidance(Guidance):
    """Blur guidance: away from the prediction for an input without fine detail, arXiv:2210.00939.

    x0 = x0_guided + scale (blur(x0) - x0(x^)), x^ being x_t with its clean estimate blurred and its
    noise kept: exact for epsilon, v and flow models. With CFG in the sum the unconditional
    prediction is blurred and repeated, else the conditional one. That blur guidance is SAG with a
    mask of ones follows from the paper's abstract (unverified); blur: 9 x 9 and sigma 1, Diffusers'
    values for SD latents.
    Cost: 1 further network evaluation per step, which cannot be batched.
    Oracle: Diffusers' StableDiffusionSAGPipeline with a mask of ones.
    """

    name = "blur"
    paper = "arXiv:2210.00939"

    def __init__(self, scale: AdditiveScale = 0.75, blur_sigma: BlurSigma = 1.0) -> None:
        self.scale = scale
        self.blur_sigma = blur_sigma

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return COND

    def guide(self, step: Step, state: State) -> Prediction:
        if self.scale == 0:
            return step.cond
        branch = base_branch(step)
        x0 = step.evaluated[branch].x0 if branch in step.evaluated else step.cond.x0
        degraded = self.degrade(x0, state)
        again = step.evaluate(branch, x=step.x + step.alpha * (degraded - x0)).x0
        return step.predict(x0=step.cond.x0 + self.scale * (degraded - again))

    def degrade(self, x0: Tensor, state: State) -> Tensor:
        """The clean estimate without its detail, [B, C, H, W] or [B, C, frames, H, W]."""
        if x0.ndim not in (4, 5):
            raise GuidanceError(
                f"{type(self).__name__} blurs pictures: found latents {list(x0.shape)}, expected "
                "[B, C, H, W] or [B, C, frames, H, W]. This pipeline does not say on which grid "
                "its tokens lie."
            )
        frames = x0.unsqueeze(2) if x0.ndim == 4 else x0
        pictures = frames.transpose(1, 2)  # [B, frames, C, H, W]
        blurred = gaussian_blur(pictures.flatten(0, 1), self.blur_sigma, kernel=9)
        return blurred.view(pictures.shape).transpose(1, 2).reshape(x0.shape)


class SAG(BlurGuidance):
    """Self-attention guidance: blur only where attention is above its mean, arXiv:2210.00939.

    As blur guidance, masked where the self-attention that a cell receives, summed over queries and
    averaged over heads, exceeds 1, its mean. The map comes from the first of the layers in the
    pass that runs anyway. Where text and image attend together, the image's attention to itself
    alone counts; videos are blurred frame by frame, their map is of all frames (ours, both).
    Scale 0.75, layer "mid", blur: Diffusers' pipeline for SD; above 1 pictures saturate.
    For transformers there is no published layer (unverified).
    Cost: 1 further network evaluation per step, which cannot be batched.
    Oracle: Diffusers' StableDiffusionSAGPipeline; the attention it reads by hand in every family.
    """

    name = "sag"
    paper = "arXiv:2210.00939"
    presets = {
        "sd15": Preset({"scale": 0.75}, "diffusers StableDiffusionSAGPipeline"),
        "sd21": Preset({"scale": 0.75}, "diffusers StableDiffusionSAGPipeline"),
    }

    def __init__(
        self,
        scale: AdditiveScale = 0.75,
        blur_sigma: BlurSigma = 1.0,
        layers: Annotated[str, "the layer whose attention is read"] = "mid",
    ) -> None:
        super().__init__(scale, blur_sigma)
        self.layers = layers

    def during(self, step: Step, state: State) -> AbstractContextManager[None]:
        if self.scale == 0:
            return nullcontext()
        branch = base_branch(step)
        state.masses = masses = list[Tensor]()  # of the first layer and evaluation

        def read(q: Tensor, k: Tensor, v: Tensor, attend: Attend, place: Place) -> Tensor:
            rows = place.rows(branch, q.shape[0])
            if not masses and rows.stop > rows.start:
                q_image, k_image = q[rows, :, place.image], k[rows, :, place.image]
                mass = received(q_image, k_image, attend.scale)
                masses.append(mass.unflatten(-1, (-1, *place.grid[-2:])))
            return attend(q, k, v)

        return step.attention(self.layers, read)

    def degrade(self, x0: Tensor, state: State) -> Tensor:
        if not state.masses:
            raise GuidanceError(unseen("the network"))
        height, width = state.masses[0].shape[-2:]
        mask = (state.masses[0] > 1.0).float().reshape(x0.shape[0], 1, -1, height, width)
        mask = F.interpolate(mask, (1, *x0.shape[2:])[-3:], mode="nearest")
        mask = mask.reshape(x0.shape[0], 1, *x0.shape[2:])
        return x0 + mask * (super().degrade(x0, state) - x0)


def base_branch(step: Step) -> Branch:
    """With CFG under way SAG works on the unconditional branch, else on the conditional one."""
    return "uncond" if "uncond" in step.needed else "cond"


def received(q: Tensor, k: Tensor, scale: float, chunk: int = 1024) -> Tensor:
    """Attention received by each token, summed over queries, mean over heads: [B, tokens], mean 1.

    q and k are [B, heads, tokens, width], logits q k^T times `scale`; the map itself is never held
    whole.
    """
    q, k = q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    total = torch.zeros(k.shape[0], k.shape[2], device=k.device)
    for part in q.split(chunk, dim=2):
        weights = torch.softmax(part @ k.transpose(-1, -2) * scale, dim=-1)
        total += weights.sum(2).mean(1)
    return total


def gaussian_blur(x: Tensor, sigma: float, kernel: int) -> Tensor:
    """Depthwise Gaussian blur of [B, C, H, W] with reflected borders; the kernel fits each axis."""
    for axis, side in ((-2, x.shape[-2]), (-1, x.shape[-1])):
        size = min(kernel, side + 1 - side % 2)  # odd, and half of it below the side
        offsets = torch.arange(size, device=x.device) - size // 2
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2).to(x.dtype)
        shape = [1, 1, size, 1] if axis == -2 else [1, 1, 1, size]
        filters = (weights / weights.sum()).reshape(shape).repeat(x.shape[1], 1, 1, 1)
        half = size // 2
        padding = (0, 0, half, half) if axis == -2 else (half, half, 0, 0)
        x = F.conv2d(F.pad(x, padding, mode="reflect"), filters, groups=x.shape[1])
    return x
