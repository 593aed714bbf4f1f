"""The ops, the device that their kernels run on, and their examples brought there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vtoken import kernels
from vtoken.kernels import _dispatch

OPS = kernels.ops()
DEVICE = "cpu" if _dispatch.INTERPRETED else "cuda" if _dispatch.INSTALLED and torch.cuda.is_available() else None


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def needs_triton(test: Any) -> Any:
    """On a GPU, or in the interpreter, where it is not a GPU test."""
    skip = pytest.mark.skipif(DEVICE is None, reason="no GPU here; test_kernels_in_the_interpreter runs this")
    return test if _dispatch.INTERPRETED else pytest.mark.gpu(skip(test))


def prepared(value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(prepared(item, dtype, device) for item in value)
    return value
