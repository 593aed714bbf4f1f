"""Where vtoken would make the host wait for a GPU, found on a CPU.

Every tensor that would lie on the GPU is an `OnDevice`: what it is computed into is one, too, as is what is made with a
device named. What is plain lies on the host. Under `Recorder`, calls from vtoken's files that need a value, or a size
that depends on values, are noted. What runs inside one call of torch is not seen, so calls known to ask the device are
listed here.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PACKAGE = str(Path(__file__).parents[2] / "vtoken")
# A value on the host, or an output whose size depends on values.
ASK = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose", "is_nonzero",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
}  # fmt: skip
MAKE = {"tensor", "arange", "zeros", "ones", "full", "empty", "rand", "randn", "as_tensor"}


class OnDevice(Tensor):
    """Would lie on the GPU."""


class Recorder(TorchFunctionMode):
    """Counts, per (kind, file:function), what would wait: "asked", "masked" (an index of bools), "uploaded" (a blocking
    copy)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        kind, where = self._kind(function, args, kwargs), _caller()
        if kind and where:
            self.found[kind, where] += 1
        out = function(*args, **kwargs)
        if function.__name__ == "cpu":
            return out.as_subclass(Tensor)
        made = kwargs.get("device") is not None and function.__name__ in MAKE
        moved = function.__name__ == "to" and any(isinstance(a, (torch.device, Tensor)) for a in args[1:])
        return out.as_subclass(OnDevice) if type(out) is Tensor and (made or moved) else out

    def _kind(self, function: Any, args: tuple, kwargs: dict) -> str | None:
        name = function.__name__
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            return "uploaded"
        if name == "to" and type(args[0]) is Tensor and not kwargs.get("non_blocking"):
            return "uploaded" if any(isinstance(a, (torch.device, Tensor)) for a in args[1:]) else None
        if not args or not any(isinstance(a, OnDevice) for a in args[:2]):
            return None
        if name == "repeat_interleave":
            sized = kwargs.get("output_size") is not None or (len(args) > 1 and isinstance(args[1], int))
            return None if sized else "asked"
        if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                return "uploaded"
            bounds = [b for i in index if isinstance(i, slice) for b in (i.start, i.stop, i.step)]
            if any(isinstance(i, OnDevice) and i.dtype != torch.bool and not i.ndim for i in (*index, *bounds)):
                return "asked"  # torch reads the number and takes a slice
            return "masked" if any(isinstance(i, Tensor) and i.dtype == torch.bool and i.ndim for i in index) else None
        return "asked" if name in ASK or (name == "where" and len(args) == 1) else None


def _caller() -> str | None:
    """file:function of the frame that called torch, if it is vtoken's."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in (__file__, "<string>"):
        frame = frame.f_back  # type: ignore[assignment]
    path = frame.f_code.co_filename
    return f"{Path(path).name}:{frame.f_code.co_name}" if path.startswith(PACKAGE) else None


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as it would be on a GPU."""
    return {name: value.as_subclass(OnDevice) for name, value in batch.items()}
