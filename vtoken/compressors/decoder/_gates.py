"""DyVTE's gates: two matrices per decoder layer, in a safetensors file that says which model they are for."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, linear

from vtoken.compressors._files import count, existing, expect, opened

FORMAT = "vtoken dyvte 1"
SHIPPED = Path(__file__).parents[2] / "evals" / "reference"
Gate = tuple[Tensor, Tensor]


class Header(NamedTuple):
    """The header of a file of gates.

    Attributes:
        depth, width: layers and hidden size of the decoder the gates were trained on.
        hidden: rows of a gate's first matrix.
        stay: [depth] share of samples whose images are still present at each decoder layer, measured in training.
    """

    depth: int
    width: int
    hidden: int
    stay: tuple[float, ...]


def find(name: str) -> Path:
    """The file at this path, or the one shipped with the reference model of this name."""
    shipped = SHIPPED / name / "vtoken" / "dyvte.safetensors"
    return shipped if "." not in name and os.path.isfile(shipped) else Path(name)


def header(name: str) -> Header:
    """The header of a file of gates.

    Raises:
        ValueError: as in `read`.
    """
    return read(name)[0]


def matrices(name: str) -> dict[int, Gate]:
    """Matrices [hidden, 2 D] and [2, hidden] of the gates on the CPU, by the decoder layer before which a gate is
    asked.

    Raises:
        ValueError: as in `read`.
    """
    return read(name)[1]


def read(name: str) -> tuple[Header, dict[int, Gate]]:
    """Header and matrices of a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    mend = "the authors publish no gates, `vtoken train-exit MODEL --data DATA -o FILE` trains them"
    path = existing(find(name), name, mend)
    metadata, found = opened(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no gates of `vtoken train-exit` (format {reprlib.repr(metadata.get('format'))}, not "
            f"{FORMAT!r})"
        )
    depth, width, hidden = (count(path, metadata, key) for key in ("depth", "width", "hidden"))
    stay = _shares(path, metadata, depth)
    shapes = ((".in", (hidden, 2 * width)), (".out", (2, hidden)))
    expect(path, found, ((f"{k}{end}", shape) for k in range(1, depth) for end, shape in shapes))
    gates = {k: (found[f"{k}.in"], found[f"{k}.out"]) for k in range(1, depth)}
    return Header(depth, width, hidden, stay), gates


def _shares(path: Path, metadata: Mapping[str, str], depth: int) -> tuple[float, ...]:
    try:
        stay = json.loads(metadata.get("stay", ""), parse_int=float)
        fits = len(stay) == depth and all(0 <= share <= 1 for share in stay)
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        found = reprlib.repr(metadata["stay"]) if "stay" in metadata else "nothing"
        raise ValueError(f"{path} says {found} for 'stay', expected {depth} shares from 0 to 1; train the gates again")
    return tuple(stay)


def save(path: Path, gates: Mapping[int, Gate], stay: Sequence[float], about: Mapping[str, str]) -> None:
    """Writes gates, keyed by the decoder layer before which they are asked (1 to depth - 1).

    Args:
        stay: [depth] as in Header.
        about: further header entries: model, data, settings.
    """
    hidden, shown = next(iter(gates.values()))[0].shape
    metadata = {
        "format": FORMAT,
        "depth": len(stay),
        "width": shown // 2,
        "hidden": hidden,
        "stay": json.dumps(list(stay)),
    }
    tensors = {
        f"{k}.{end}": t.contiguous() for k, pair in gates.items() for end, t in zip(("in", "out"), pair, strict=True)
    }
    save_file(tensors, path, {**about, **{key: str(value) for key, value in metadata.items()}})


def question(text: Tensor) -> Tensor:
    """[2 D] input of a gate, from the text [T, D] after the images: the mean of all tokens but the last, and the
    last."""
    text = text.float()
    return torch.cat([text[:-1].mean(0), text[-1]])


def logits(pair: Gate, shown: Tensor) -> Tensor:
    """[R, 2] (stay, leave) for gate inputs [R, 2 D]: two matrices without bias, with GELU between them."""
    first, second = pair
    return linear(gelu(linear(shown.to(first.dtype), first)), second).float()
