"""Files of DyVTE gates for the tiny models: random ones, and ones that never let anything leave."""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny
import torch

from vtoken.compressors._gates import save

_FOLDER = TemporaryDirectory()
atexit.register(_FOLDER.cleanup)


@cache
def file(seed: int | None = None, depth: int = 4, width: int = tiny.TEXT["hidden_size"], stay: tuple = ()) -> str:
    """The path of a file of gates; without a seed they are all zero, a draw, which leaves images where they are."""
    generator, hidden = torch.Generator().manual_seed(seed or 0), 5
    gates = {}
    for k in range(1, depth):
        pair = torch.randn(hidden, 2 * width, generator=generator) / width, torch.randn(2, hidden, generator=generator)
        gates[k] = pair if seed is not None else tuple(0 * matrix for matrix in pair)
    path = Path(_FOLDER.name) / f"{seed}-{depth}-{width}-{len(stay)}.safetensors"
    save(path, gates, stay or (1.0,) * depth, {})
    return str(path)
