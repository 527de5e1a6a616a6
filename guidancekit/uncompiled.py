"""Out of torch.compile's sight: a network compiled in place would trace all that its call leads to.

Loading a file, or a pass that only looks into the network, is not worth a graph, or cannot be one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .step import Step

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)


def uncompiled(call: Callable[[], T]) -> T:
    """What `call` returns."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        return call()
    result: T = torch.compiler.disable(call)()
    return result


def brought_to(device: torch.device, network: Network) -> Network:
    """The network on a device; where it is there already its weights are not gone through."""
    weight = next(network.parameters(), None)
    if weight is not None and weight.device != device:
        uncompiled(lambda: network.to(device))
    return network


def first_at(
    step: Step,
    matches: Callable[[str, nn.Module], bool],
    evaluation: Callable[[], object],
    read: Callable[..., Any],
    what: str,
) -> Any:
    """What `read(layer, *args, **kwargs)` says of the first matching layer, where the pass ends.

    Where it says None the pass goes on; None if it does so to the end. `what` is what is missing
    where no layer matches (`GuidanceError`).
    """

    def stop(layer: Any, *args: Any, **kwargs: Any) -> Any:
        found = read(layer, *args, **kwargs)
        if found is None:
            return layer(*args, **kwargs)
        raise _Reached(found)

    def evaluate() -> None:
        if "torch._dynamo" not in sys.modules:
            evaluation()
            return
        with torch.compiler.set_stance("force_eager"):  # a network in torch.compile's own module
            evaluation()

    try:
        with step.around(matches, stop, what=what):
            uncompiled(evaluate)
    except _Reached as reached:
        return reached.found
    return None


class _Reached(Exception):  # noqa: N818 - no error: how `first_at` gets out of the network
    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found
