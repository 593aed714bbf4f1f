"""Files of DyVTE gates for the tiny models (random ones, and ones that never let anything leave), of random DPN
routers, and of random SeerAttention gates."""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny
import torch
from safetensors.torch import save_file

from vtoken.compressors.attention import _seer
from vtoken.compressors.decoder._gates import save

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


@cache
def routers(
    seed: int = 0, layers: tuple = (0, 2), width: int = tiny.TEXT["hidden_size"], sizes: int = 2, loud: float = 1.0
) -> str:
    """The path of a file of routers behind these layers, loud enough to pick different sizes for different prompts."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.norm.weight"] = 1 + 0.1 * torch.randn(width, generator=g)
        tensors[f"{layer}.norm.bias"] = 0.1 * torch.randn(width, generator=g)
        tensors[f"{layer}.in.weight"] = torch.randn(width // 4, width, generator=g)
        tensors[f"{layer}.out.weight"] = loud * torch.randn(sizes, width // 4, generator=g)
    path = Path(_FOLDER.name) / f"routers-{seed}-{len(layers)}-{width}-{sizes}-{loud}.safetensors"
    save_file(tensors, path)
    return str(path)


@cache
def seer(seed: int = 0, depth: int = 4, heads: tuple[int, int] = (4, 2), width: int = 8, size: int = 16) -> str:
    """The path of a file of SeerAttention gates for so many query and key heads."""
    g = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(heads[0], 3 * width, width, generator=g) / width**0.5 for _ in range(depth)]
    path = Path(_FOLDER.name) / f"seer-{seed}-{depth}-{heads[0]}-{heads[1]}-{width}-{size}.safetensors"
    _seer.save(path, matrices, heads[1], size, {})
    return str(path)
