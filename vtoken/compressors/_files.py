"""Files of trained weights that an option names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def existing(path: Path, name: str, mend: str) -> Path:
    """The path, if there is a file.

    Raises:
        ValueError: there is none, or one that may not be read; says what to do.
    """
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long.
        raise ValueError(f"no file {name[:200]!r}; {mend}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name!r} may not be read; give yourself the right, or {mend}")
    return path


class Weights:
    """Tensors of a file, by decoder layer: read once, so that what is done to the file later does not reach a wrapped model.

    Attributes:
        layers: on the CPU.
    """

    def __init__(self, layers: Mapping[int, tuple[Tensor, ...]]) -> None:
        self.layers = layers
        self._there: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    def on(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """Those of one layer on the device that asks, brought there once."""
        if (layer, device) not in self._there:
            with torch.inference_mode(False):
                self._there[layer, device] = tuple(t.to(device) for t in self.layers[layer])
        return self._there[layer, device]

    def unload(self) -> None:
        """Frees the copies on devices."""
        self._there.clear()
