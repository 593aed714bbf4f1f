"""DPN's routers: a norm and two matrices per decoder layer, in a safetensors file."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from vtoken.compressors._files import Shape, existing, expect, opened

PARTS = ("norm.weight", "norm.bias", "in.weight", "out.weight")
TEMPERATURE = 10.0


class Router(NamedTuple):
    """Scale and shift [D] of a layer norm, and matrices [D / 4, D] and [sizes, D / 4]."""

    scale: Tensor
    shift: Tensor
    first: Tensor
    second: Tensor


def routers(name: str) -> dict[int, Router]:
    """The routers of a file on the CPU, by the decoder layer after which they are asked.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    mend = f"write a safetensors file with LAYER.{', LAYER.'.join(PARTS)} of every router"
    path = existing(Path(name), name, mend)
    _, found = opened(path)
    layers = sorted({key.split(".")[0] for key in found})
    if not layers or not all(re.fullmatch("[0-9]{1,9}", layer) for layer in layers):
        odd = next((key for key in found if not re.match(r"[0-9]{1,9}\.", key)), "nothing")
        raise ValueError(
            f"{path} holds no routers but {reprlib.repr(odd)}, expected {', '.join(PARTS)} after the number of every "
            "layer that has one"
        )
    expect(path, found, ((f"{k}.{part}", shape) for k in layers for part, shape in _shapes(found, k)))
    return {int(k): Router(*(found[f"{k}.{part}"] for part in PARTS)) for k in sorted(layers, key=int)}


def _shapes(found: Mapping[str, Tensor], layer: str) -> Iterator[tuple[str, Shape]]:
    """Shapes that fit the layer's first matrix; no shape fits if that one is missing."""
    first, second = (found.get(f"{layer}.{part}") for part in PARTS[2:])
    hidden, width = first.shape if first is not None and first.ndim == 2 else ("D / 4", "D")
    sizes = max(1, len(second)) if second is not None and second.ndim else "sizes"
    yield from zip(PARTS, ((width,), (width,), (hidden, width), (sizes, hidden)), strict=True)


def chances(router: Router, shown: Tensor) -> Tensor:
    """[R, sizes] float32 probabilities for router inputs [R, D]."""
    x = layer_norm(shown.to(router.first.dtype), router.scale.shape, router.scale, router.shift)
    return (linear(gelu(linear(x, router.first)), router.second).float() / TEMPERATURE).softmax(-1)
