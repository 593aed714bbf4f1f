"""DPN's routers: a norm and two matrices per decoder layer, in a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from vtoken.compressors._files import existing

PARTS = ("norm.weight", "norm.bias", "in.weight", "out.weight")
TEMPERATURE = 10.0


class Router(NamedTuple):
    """Norm [D] and [D], matrices [D / 4, D] and [sizes, D / 4]."""

    scale: Tensor
    shift: Tensor
    first: Tensor
    second: Tensor


def routers(name: str) -> dict[int, Router]:
    """The routers of a file, by the decoder layer behind which they are asked, on the CPU.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    mend = f"write a safetensors file with LAYER.{', LAYER.'.join(PARTS)} of every router"
    path = existing(Path(name), name, mend)
    try:
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    layers = sorted({key.split(".")[0] for key in found})
    wanted = {f"{layer}.{part}" for layer in layers for part in PARTS}
    if not layers or wanted != set(found) or not all(layer.isdecimal() for layer in layers):
        odd = sorted(wanted ^ set(found))[:3]
        raise ValueError(
            f"{path} holds no routers: every layer (a number) needs {', '.join(PARTS)}; missing or too many: {', '.join(odd)}"
        )
    out = {int(layer): Router(*(found[f"{layer}.{part}"] for part in PARTS)) for layer in layers}
    for layer, router in out.items():
        width, hidden = router.first.shape[1], router.first.shape[0]
        if router.scale.shape != (width,) or router.shift.shape != (width,) or router.second.shape[1] != hidden:
            raise ValueError(f"{path}: the shapes of layer {layer}'s router do not fit each other")
    return dict(sorted(out.items()))


def chances(router: Router, shown: Tensor) -> Tensor:
    """[R, sizes] float32 probabilities for what routers are shown [R, D]."""
    x = layer_norm(shown.to(router.first.dtype), router.scale.shape, router.scale, router.shift)
    return (linear(gelu(linear(x, router.first)), router.second).float() / TEMPERATURE).softmax(-1)
