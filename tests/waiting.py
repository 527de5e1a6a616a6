"""What guidancekit does in a step, watched for anything that waits for the device.

On a GPU PyTorch itself can raise there; on a CPU a device is made believe: `OnPaper` takes every
tensor for one on a device but those that are made without one, and notes what would wait for it.
"""

from __future__ import annotations

import functools
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from guidancekit.engine.run import Run


def watch_steps(monkeypatch, strict, lax) -> None:
    """`Run` works inside `strict()` after the first step of a run, where there is more to find out;
    a scheduler's own step inside `lax()`, which some spend with the device's values."""

    def from_the_second_on(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            with nullcontext() if self.position <= self.first else strict():
                return method(self, *args, **kwargs)

        return run

    finish = Run.finish_step

    def finish_step(self, step, *args, **kwargs):
        def laxly(*args, **kwargs):
            with lax():
                return step(*args, **kwargs)

        return finish(self, laxly, *args, **kwargs)

    monkeypatch.setattr(Run, "denoise", from_the_second_on(Run.denoise))
    monkeypatch.setattr(Run, "finish_step", from_the_second_on(finish_step))


READS = (
    "item tolist numpy cpu equal allclose is_nonzero nonzero argwhere masked_select unique "
    "bincount __bool__ __int__ __float__ __complex__ __index__ __contains__ __array__ __format__ "
    "__repr__"
).split()
"""Their results are Python's, or of a size that the values decide."""
MADE_OF_PYTHON = ("tensor", "as_tensor", "asarray", "new_tensor")


class OnPaper(TorchFunctionMode):
    """Notes in `waits` what would wait for the device, had the tensors been on one.

    Reading values; choosing by masks, by lists or by a host's tensor; a copy from the host that is
    not `non_blocking`, and what would be an error: tensors of host and device in one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.lax = False
        self._host = WeakTensorKeyDictionary()

    @contextmanager
    def strict(self):
        with self:
            yield

    @contextmanager
    def off(self):
        before, self.lax = self.lax, True
        yield
        self.lax = before

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.lax:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        host = [each for each in given if each in self._host]
        if why := self._waits(name, args, kwargs, given, host):
            self._note(f"{name} {why}")
        with self.off():  # what it is made of
            result = func(*args, **kwargs)
        if name == "to" and host and result is args[0]:  # another one, had there been a device
            result = result.view_as(result)
        if self._stays(name, args, kwargs, given, host):
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    self._host[each] = True
        return result

    def _note(self, what: str) -> None:
        """Note it with its line, unless that is a network's own."""
        for frame in reversed(traceback.extract_stack()):
            file = Path(frame.filename)
            if "guidancekit" in file.parts or file.name.startswith("test_"):
                self.waits.append(f"{file.name}:{frame.lineno} {what}")
                return
            if "diffusers" in file.parts:
                return

    def _waits(self, name, args, kwargs, given, host) -> str | None:
        """Why an operation waits, if it does."""
        own_is_host = bool(args) and isinstance(args[0], Tensor) and args[0] in self._host
        if name in READS and len(host) < len(given):
            return "reads values"
        if name in MADE_OF_PYTHON and not isinstance(args[-1], Tensor):
            moves = kwargs.get("device") is not None or (name == "new_tensor" and not own_is_host)
            return "copies from Python to the device" if moves else None
        if name in ("__getitem__", "__setitem__") and not own_is_host:
            for part in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
                    return "counts what a mask holds"
                if isinstance(part, (list, range)) or (
                    isinstance(part, Tensor) and part.ndim and part in self._host
                ):
                    return "copies an index to the device"
        if name in ("to", "copy_", "type_as"):
            across = own_is_host if name != "copy_" else args[1] in self._host and not own_is_host
            moves = name == "copy_" or _names_a_device(args, kwargs)
            waits = across and moves and not kwargs.get("non_blocking")
            return "copies from the host and waits" if waits else None
        if any(each.ndim for each in host) and len(host) < len(given):
            return "mixes tensors of host and device"
        return None

    def _stays(self, name, args, kwargs, given, host) -> bool:
        """Whether what comes out is on the host."""
        if name == "to":
            return bool(host) and not _names_a_device(args, kwargs)
        if name == "copy_":
            return args[0] in self._host
        return len(host) == len(given) and kwargs.get("device") is None


def _names_a_device(args, kwargs) -> bool:
    values = (*args[1:], kwargs.get("device"), kwargs.get("other"))
    return any(isinstance(each, (torch.device, str, Tensor)) for each in values)
