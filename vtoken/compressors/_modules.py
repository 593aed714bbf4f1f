"""Modules with trained weights that options name: a class of an installed package, and a safetensors file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.compressors._files import existing, expect, opened
from vtoken.stages import Layout, TokenModule


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
    metadata, tensors = opened(path)
    with torch.inference_mode(False):
        module = _built(cls, path, metadata)
        expect(path, tensors, ((key, tuple(value.shape)) for key, value in module.state_dict().items()))
        module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _built(cls: type[TokenModule], path: Path, metadata: Mapping[str, str]) -> TokenModule:
    try:
        given: Any = json.loads(metadata.get("config", "{}"))
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{cls.__name__} cannot be built from `config` in the header of {path}: {error}; write its arguments "
            "there, as a JSON object"
        ) from None


class Loaded:
    """A module with its weights, read once, so that later changes to the file do not reach a wrapped model.

    Attributes:
        name: as the option names it.
        first: on the CPU.
    """

    def __init__(self, name: str, weights: str) -> None:
        self.name, self.first = name, load(name, weights)
        self._there: dict[torch.device, TokenModule] = {}

    def unload(self) -> None:
        """Frees the copies on devices."""
        self._there.clear()

    def count(self, tokens: int) -> int:
        """How many tokens the module makes of this many."""
        return min(tokens, self.first.count(tokens)) if tokens else 0

    def make(self, read: Tensor, layout: Layout, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the module makes of one picture.

        Returns:
            [K, width] embeddings; [K] indices of the tokens whose places they take; [] bool, on the device, whether
            these places are ascending and among those of `layout`.

        Raises:
            ValueError: the module takes inputs of another width, or returned shapes that break its contract.
        """
        if read.shape[1] != self.first.takes:
            raise ValueError(
                f"{self.name} takes {self.first.takes} channels and is given {self.first.reads} of {read.shape[1]}; "
                "take weights that were trained for this model"
            )
        if read.device not in self._there:
            with torch.inference_mode(False):
                self._there[read.device] = deepcopy(self.first).to(read.device)
        module = self._there[read.device]
        made, where = module(read.to(next(module.parameters(), read).dtype), layout)
        want = (self.count(len(read)), width)
        if tuple(made.shape) != want or len(where.places) != want[0]:
            raise ValueError(
                f"{self.name} made {list(made.shape)} with {len(where.places)} places of {len(read)} tokens, expected "
                f"{list(want)}"
            )
        kept = torch.searchsorted(layout.places, where.places)
        known = layout.places[kept.clamp(max=len(read) - 1)] == where.places
        return made, kept, (kept.diff() > 0).all() & known.all()
