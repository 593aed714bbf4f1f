"""Files of trained weights that options name; their contents are checked before they are used."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shape = tuple[int | str, ...]  # words for sizes that the file itself leaves open


def existing(path: Path, name: str, mend: str) -> Path:
    """The path, if there is a file.

    Raises:
        ValueError: there is no file, or it may not be read; says what to do.
    """
    if not os.path.isfile(path):  # Path.is_file raises if a name is too long.
        raise ValueError(f"no file {name[:200]!r}; {mend}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name!r} may not be read; give yourself the right, or {mend}")
    return path


def from_json(name: str, mend: str, hint: str = "", **options: Any) -> tuple[Path, Any]:
    """A JSON file and what it holds; `options` go to `json.loads`.

    Raises:
        ValueError: there is no such file, or it is no JSON; `mend` and `hint` say what to do about either.
    """
    path = existing(Path(name), name, mend)
    try:
        return path, json.loads(path.read_text(encoding="utf-8"), **options)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}{hint}") from None


def opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors (on the CPU) of a safetensors file.

    Raises:
        ValueError: the file is not safetensors, or cannot be read.
    """
    try:
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}") from None


def count(path: Path, metadata: Mapping[str, str], key: str) -> int:
    """A positive integer from the header of a file.

    Raises:
        ValueError: there is no such key, or its value is something else.
    """
    if not re.fullmatch("[1-9][0-9]{0,8}", metadata.get(key, "")):
        found = reprlib.repr(metadata[key]) if key in metadata else "nothing"
        raise ValueError(f"{path} says {found} for {key!r}, expected a whole number from 1 on; make it again")
    return int(metadata[key])


def expect(path: Path, found: Mapping[str, Tensor], wanted: Iterable[tuple[str, Shape]]) -> None:
    """Refuses tensors with other names, shapes or values than expected: all of one float dtype, all finite.

    Raises:
        ValueError: names the file, the tensor and what was expected.
    """
    seen: set[str] = set()
    for name, shape in wanted:
        if name not in found:
            raise ValueError(f"{path} has no tensor {name!r}, expected one of shape {written(shape)}; make it again")
        first, tensor = found[next(iter(seen), name)], found[name]
        seen.add(name)
        this = f"{path}: tensor {name!r}"
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{this} is of shape {written(tensor.shape)}, expected {written(shape)}; make the file again"
            )
        if tensor.dtype not in FLOATS or tensor.dtype != first.dtype:
            kind = "floats" if tensor.dtype not in FLOATS else f"{first.dtype} like the others"
            raise ValueError(f"{this} is {tensor.dtype}, expected {kind}; make the file again")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{this} holds NaN or infinity, expected finite numbers; make the file again")
    if more := sorted(map(str, set(found) - seen)):
        raise ValueError(
            f"{path} holds a tensor {reprlib.repr(more[0])}, expected {len(seen)} others; make the file again"
        )


def written(shape: Iterable[int | str]) -> str:
    """A shape as text: [4, D]."""
    return f"[{', '.join(map(str, shape))}]"


class Weights:
    """Tensors of a file, by decoder layer. The file is read once, so that later changes to it do not reach a wrapped
    model.

    Attributes:
        layers: on the CPU.
    """

    def __init__(self, layers: Mapping[int, tuple[Tensor, ...]]) -> None:
        self.layers = layers
        self._there: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    def on(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors of one layer on a device, copied there once."""
        if (layer, device) not in self._there:
            with torch.inference_mode(False):
                self._there[layer, device] = tuple(t.to(device) for t in self.layers[layer])
        return self._there[layer, device]

    def unload(self) -> None:
        """Frees the copies on devices."""
        self._there.clear()
