"""SeerAttention's gates: one matrix per decoder layer and query head, their file, and their scores of pooled blocks."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors._files import count, existing, expect, opened, written
from vtoken.compressors.attention._blocks import best, block_mean, per_head
from vtoken.stages.attention import PrefillQK, Rope, causal

FORMAT = "vtoken seerattention 1"
SIZES = (16, 32, 64, 128, 256)
THEIRS = re.compile(r"layers\.(\d+)\.self_attn\.attn_gate\.(\w+)\.weight$")
THEIR_SIZE = 64
AHEAD = -1e30  # finite, so that 0 times it is 0


class Header(NamedTuple):
    """Which model a file of gates is for.

    Attributes:
        depth: number of decoder layers; heads: query heads; key_heads: 0 if the file does not say.
        width: channels of a head; size: tokens of a block.
    """

    depth: int
    heads: int
    key_heads: int
    width: int
    size: int


def header(name: str) -> Header:
    """The header of a file of gates.

    Raises:
        ValueError: as in `read`.
    """
    return read(name)[0]


def matrices(name: str) -> list[Tensor]:
    """[H, 3 d, d] gates of every layer, on the CPU.

    Raises:
        ValueError: as in `read`.
    """
    return read(name)[1]


def read(name: str) -> tuple[Header, list[Tensor]]:
    """Header and gates of a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    mend = "`vtoken calibrate seerattention MODEL --data DATA -o FILE` trains gates for a model"
    path = existing(Path(name), name, mend)
    if path.suffix == ".pth":
        gates = _theirs(path)
        heads, _, width = gates[0].shape
        return Header(len(gates), heads, 0, width, THEIR_SIZE), gates
    metadata, found = opened(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no gates of `vtoken calibrate seerattention` (format "
            f"{reprlib.repr(metadata.get('format'))}, "
            f"not {FORMAT!r})"
        )
    about = Header(*(count(path, metadata, key) for key in Header._fields))
    if about.size not in SIZES:
        raise ValueError(
            f"{path} holds gates for blocks of {about.size} tokens; {', '.join(map(str, SIZES))} can be had"
        )
    shape = (about.heads, 3 * about.width, about.width)
    expect(path, found, ((str(k), shape) for k in range(about.depth)))
    return about, [found[str(k)] for k in range(about.depth)]


def _theirs(path: Path) -> list[Tensor]:
    """The gates in the authors' attn_gate_weights.pth, layer by layer."""
    try:
        with torch.inference_mode(False):
            found = torch.load(path, weights_only=True, map_location="cpu")
        names = {int(at[1]): name for name in found if (at := THEIRS.search(name)) and at[2] == "mask_linear_k"}
        shapes = {tuple(found[name].shape) for name in names.values()}
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no file of tensors that torch saved: {reprlib.repr(what)}") from None
    if len(found) != len(names) or sorted(names) != list(range(len(names))) or not shapes:
        raise ValueError(
            f"{path} does not hold one matrix mask_linear_k for every layer and nothing else: of the authors' gates "
            "the default kind is read"
        )
    first = found[names[0]].shape
    if len(first) != 3 or not first[0] or first[1] != 3 * first[2]:
        raise ValueError(
            f"{path}: tensor {names[0]!r} is of shape {written(first)}, expected [heads, 3 D, D]: keys pooled by max, "
            "min, avg"
        )
    expect(path, found, ((names[k], tuple(first)) for k in sorted(names)))
    return [found[names[k]] for k in sorted(names)]


def save(path: Path, gates: Sequence[Tensor], key_heads: int, size: int, about: Mapping[str, str]) -> None:
    """Writes gates [H, 3 d, d], one per layer.

    Args:
        about: further header entries: model, data, settings.
    """
    heads, _, width = gates[0].shape
    metadata = Header(len(gates), heads, key_heads, width, size)._asdict()
    numbers = {key: str(value) for key, value in metadata.items()}
    save_file({str(k): t.contiguous() for k, t in enumerate(gates)}, path, {**about, "format": FORMAT, **numbers})


def pooled(prompt: PrefillQK, size: int) -> tuple[Tensor, Tensor]:
    """Queries and keys before RoPE, pooled over blocks of `size` tokens (an incomplete last block uses the tokens it
    has), fp32: means of queries [H, T, d]; maxima, minima and means of keys side by side [Hk, T, 3 d]."""
    rope = prompt.rope
    assert rope is not None
    # Key head by key head: all unrotated queries at once would double the memory of the layer.
    queries = torch.cat([block_mean(rope.undo(q), size) for q in prompt.q.split(prompt.heads // len(prompt.k))])
    keys = []
    for k in prompt.k.split(1):
        k = rope.undo(k)
        keys.append(torch.cat([block_max(k, size), -block_max(-k, size), block_mean(k, size)], -1))
    return queries, torch.cat(keys)


def block_max(x: Tensor, size: int) -> Tensor:
    """[H, N, d] -> [H, ceil(N / size), d], maxima over blocks."""
    return pad(x, (0, 0, 0, -x.shape[1] % size), value=-torch.inf).unflatten(1, (-1, size)).amax(2)


def logits(queries: Tensor, keys: Tensor, gate: Tensor, starts: Rope) -> Tensor:
    """[H, T, T] fp32 logits of the gates, before the softmax over key blocks, from what `pooled` returns.

    Args:
        gate: [H, 3 d, d].
        starts: RoPE of the first token of every block.
    """
    keys = per_head(keys, len(queries)) @ gate.float()
    products = starts.turn(queries) @ starts.turn(keys).transpose(1, 2) * queries.shape[-1] ** -0.5
    return products.masked_fill(~causal(products), AHEAD)


def chosen(shares: Tensor, threshold: float, share: float | None, last: int) -> Tensor:
    """[H, T, T] bool: the key blocks to read, from the shares [H, T, T] that a gate predicts; always the first one and
    the query block's own.

    Args:
        threshold: without `share`, blocks with a larger share are read.
        share: of the causal map to read. Every query block reads the same number of its largest blocks, at least one.
        last: number of query blocks at the end that read everything.
    """
    t = torch.arange(shares.shape[-1], device=shares.device)
    if share is None:
        read = shares > threshold
    else:
        count = max(1, int((1 - (1 - share) ** 0.5) * len(t)))
        read = best(shares, torch.full_like(shares[..., 0], count))
    read = read | (t == 0) | (t[:, None] == t) | (t[:, None] >= len(t) - last)
    return read & causal(shares)
