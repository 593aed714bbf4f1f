"""Modules with trained weights that options name: a class of an installed package, and a safetensors file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vtoken.compressors._files import existing, expect, opened
from vtoken.stages import TokenModule


def found(name: str) -> type[TokenModule]:
    """The class that package.module:Class names.

    Raises:
        ValueError: the name has another form, cannot be imported, or is no TokenModule.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name):
        raise ValueError(f"{name[:200]!r} names no class; write package.module:Class")
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}; install the package that holds it") from None
    if not (isinstance(cls, type) and issubclass(cls, TokenModule)):
        raise ValueError(f"{name!r} is no TokenModule; derive it from vtoken.stages.TokenModule")
    return cls


def load(name: str, weights: str) -> TokenModule:
    """The module with its weights, on the CPU, frozen.

    Raises:
        ValueError: there is no such file, or module, header and tensors do not fit together.
    """
    cls = found(name)
    path = existing(Path(weights), weights, "write the module's state_dict() with safetensors")
    told, tensors = opened(path)
    with torch.inference_mode(False):
        module = _built(cls, path, told)
        expect(path, tensors, ((key, tuple(value.shape)) for key, value in module.state_dict().items()))
        module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _built(cls: type[TokenModule], path: Path, told: Mapping[str, str]) -> TokenModule:
    try:
        given: Any = json.loads(told.get("config", "{}"))
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{cls.__name__} cannot be built from `config` in the header of {path}: {error}; write its arguments there, "
            "as a JSON object"
        ) from None
