"""DyVTE's gates: two matrices per decoder layer, in a safetensors file that says which model they are for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, linear

from vtoken.compressors._files import existing

FORMAT = "vtoken dyvte 1"
SHIPPED = Path(__file__).parents[1] / "evals" / "reference"
Gate = tuple[Tensor, Tensor]


class Header(NamedTuple):
    """What a file of gates says of itself.

    Attributes:
        depth, width: layers and hidden size of the decoder they were trained on.
        hidden: rows of a gate's first matrix.
        stay: share of samples, measured when they were trained, whose images every decoder layer still sees.
    """

    depth: int
    width: int
    hidden: int
    stay: tuple[float, ...]


def find(name: str) -> Path:
    """The file of this path, or the shipped one of a reference model's name."""
    shipped = SHIPPED / name / "dyvte.safetensors"
    return shipped if "." not in name and os.path.isfile(shipped) else Path(name)


def header(name: str) -> Header:
    """Reads what a file says of itself.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    mend = "the authors publish no gates, `vtoken train-exit MODEL --data DATA -o FILE` trains them"
    path = existing(find(name), name, mend)
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if told.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no gates of `vtoken train-exit` (format {told.get('format')!r}, not {FORMAT!r})"
        )
    return Header(int(told["depth"]), int(told["width"]), int(told["hidden"]), tuple(json.loads(told["stay"])))


def matrices(name: str) -> dict[int, Gate]:
    """By the decoder layer before which a gate is asked its matrices [hidden, 2 D] and [2, hidden], on the CPU.

    Raises:
        ValueError: as `header`, or they are not there.
    """
    path, depth = find(name), header(name).depth
    try:
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            return {k: (file.get_tensor(f"{k}.in"), file.get_tensor(f"{k}.out")) for k in range(1, depth)}
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold the gates that it speaks of: {error}; train them again") from None


def save(path: Path, gates: Mapping[int, Gate], stay: Sequence[float], about: Mapping[str, str]) -> None:
    """Writes gates by the decoder layer before which they are asked (1 to depth - 1).

    Args:
        stay: [depth] as in Header.
        about: more to say of them: model, data, settings.
    """
    hidden, shown = next(iter(gates.values()))[0].shape
    told = {"format": FORMAT, "depth": len(stay), "width": shown // 2, "hidden": hidden, "stay": json.dumps(list(stay))}
    tensors = {
        f"{k}.{end}": t.contiguous() for k, pair in gates.items() for end, t in zip(("in", "out"), pair, strict=True)
    }
    save_file(tensors, path, {**about, **{key: str(value) for key, value in told.items()}})


def question(text: Tensor) -> Tensor:
    """[2 D] what a gate is shown of the text [T, D] behind the images: the mean of all but the last token, and the last."""
    text = text.float()
    return torch.cat([text[:-1].mean(0), text[-1]])


def logits(pair: Gate, shown: Tensor) -> Tensor:
    """[R, 2] (stay, leave) of questions [R, 2 D]: two matrices without bias, GELU between them."""
    first, second = pair
    return linear(gelu(linear(shown.to(first.dtype), first)), second).float()
