"""Internal guidance, arXiv:2512.24176."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from torch import Tensor, nn

from .. import bundled, schedules
from ..errors import GuidanceError
from ..guidance import Guidance, Preset, State
from ..heads import InternalHead, image_of
from ..parameters import Range
from ..schedules import AnyScale, Interval, Schedule, scale_at
from ..step import BOTH, COND, Branch, Moment, Prediction, Step, branches_at
from ..uncompiled import brought_to, uncompiled

_CODE = "arXiv:2512.24176, CVL-UESTC/Internal-Guidance"


class InternalGuidance(Guidance):
    """Internal guidance: away from an early exit of the same network, arXiv:2512.24176.

    Per branch early + w (final - early), where early is the prediction that a trained `head` reads
    from the hidden state of one block; then CFG at scale `cfg` between the two results, as in the
    authors' code. Free of the space. CFG alone where w = 1. In a sum with another rule write cfg=1.

    The head is an `InternalHead`, the folder of a saved one, or any module with its `block`
    attribute and arguments. It is trained on the frozen network (`InternalHead.early` says how;
    the paper trains both together). Default w = 1.4: SiT-XL with CFG (official code). Nothing is
    published for text-to-image models, and the paper is known second-hand (unverified). The presets
    `scenes` and `scenes-flow` name the heads of the embedded models.
    Cost: 2 network evaluations per step, as CFG; 1 where cfg is 1.
    Oracle: a loop by hand with the same head.
    """

    name = "internal"
    paper = "arXiv:2512.24176"
    presets = {
        "sit-xl": Preset(  # CFG at flow times up to 0.7
            {"scale": 1.4, "cfg": Interval(1.35, 0.0, 7 / 3)}, f"{_CODE} gen.sh, 250 SDE steps"
        ),
        "lightningdit-xl": Preset({"scale": 1.7, "cfg": 1.0}, f"{_CODE} config, FID 1.34"),
        "scenes": Preset(
            {"scale": 1.2, "head": "scenes:head"}, "ours: on the last down block; 1.4 is too far"
        ),
        "scenes-flow": Preset({"head": "scenes-flow:head"}, "ours: on the second of six blocks"),
    }

    def __init__(
        self,
        scale: Annotated[
            float | Schedule, Range(0, slider=(1, 3)), "scale w away from the head: 1 is off"
        ] = 1.4,
        head: Annotated[nn.Module | str | None, "the head, or the folder it was saved to"] = None,
        cfg: AnyScale = None,
    ) -> None:
        if not (head is None or isinstance(head, str) or hasattr(head, "block")):
            raise GuidanceError(
                f"InternalGuidance(head=...): found {object.__repr__(head)}, expected an "
                "InternalHead, a folder, or a module whose attribute `block` names its block."
            )
        self.scale = schedules.from_config(scale)
        self.head = head
        self.cfg = schedules.from_config(cfg)

    def needs(self, moment: Moment, state: State) -> tuple[Branch, ...]:
        return branches_at(scale_at(self.cfg, moment))

    def acts(self, moment: Moment, state: State) -> bool:
        return scale_at(self.scale, moment) != 1 or self.needs(moment, state) != COND

    @contextmanager
    def during(self, step: Step, state: State) -> Iterator[None]:
        if scale_at(self.scale, step) == 1:
            yield
            return
        head, state.hidden = self._head(), {}

        def reading(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            hidden = image_of(result)
            for branch in BOTH:
                rows = step.rows(branch, hidden.shape[0])
                if rows.stop > rows.start:  # only the first evaluation of each branch counts
                    state.hidden.setdefault(branch, hidden[rows])
            return result

        with step.around(lambda name, _: name == head.block, reading, what=f"block {head.block!r}"):
            yield

    def guide(self, step: Step, state: State) -> Prediction:
        w, s = scale_at(self.scale, step), scale_at(self.cfg, step)
        if w == 1:
            return step.cfg(s)
        outs = [self._away(step, branch, w, state) for branch in self.needs(step, state)]
        return step.predict(out=outs[0] if len(outs) == 1 else outs[0] + s * (outs[1] - outs[0]))

    def _away(self, step: Step, branch: Branch, w: float, state: State) -> Tensor:
        out = (step.cond if branch == "cond" else step.uncond).out
        head, hidden = brought_to(out.device, self._head()), state.hidden[branch]
        size = out.shape[-2], out.shape[-1]
        early: Tensor = uncompiled(lambda: head(hidden.float(), step.timestep, size)).float()
        if early.shape != out.shape:
            raise GuidanceError(
                f"InternalGuidance: the head made {list(early.shape)} of the hidden state "
                f"{list(hidden.shape)}, expected {list(out.shape)}: it was made for another "
                "network or another block."
            )
        return early + w * (out - early)

    def _head(self) -> Any:
        if self.head is None:
            raise GuidanceError(
                "InternalGuidance needs a head trained for this network: write "
                "InternalGuidance(head=...) with an InternalHead or the folder of a saved one. "
                'InternalGuidance.preset("scenes") has one for an embedded model.'
            )
        if isinstance(self.head, str) and getattr(self, "_loaded", None) is None:
            folder = bundled.locate(self.head)
            try:
                self._loaded = uncompiled(
                    lambda: InternalHead.from_pretrained(folder, use_safetensors=True).float()
                ).eval()
            except Exception as error:  # of several libraries
                raise GuidanceError(f"InternalGuidance(head={self.head!r}): {error}") from error
        return self._loaded if isinstance(self.head, str) else self.head
