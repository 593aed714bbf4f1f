"""The machine, the versions and the dtype that a number was measured with."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any

import torch
import transformers

import vtoken


def machine(model: Any) -> dict[str, Any]:
    """Hardware, versions, and what the model computes with."""
    cuda = model.device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(model.device) if cuda else processor_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "versions": versions(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }


def versions() -> str:
    own = f"vtoken {vtoken.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{own}, Python {platform.python_version()}"


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
