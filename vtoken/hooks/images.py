"""Which image each visual token belongs to, and whether it is the image that was scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vtoken.run import Encode
from vtoken.stages import Grid

Layout = tuple[tuple[int, ...], tuple[Grid, ...], tuple[int, ...], Tensor | None]


def assign(counts: Sequence[int], encode: Encode | None, adapter: Any) -> Layout:
    """Shares the encoded images out among the batch rows.

    `generate` may expand the batch after encoding (beams, several return sequences): then E consecutive rows hold the same images.

    Args:
        counts: visual tokens of each batch row.
        encode: what the tower of this call saw, or None when features came precomputed.

    Returns:
        lengths, grid and row per image, and the [ΣN] index into the encoder's packed tokens (None when they line up).

    Raises:
        ValueError: the rows cannot be filled with whole images.
    """
    if encode is None:
        per_row = [adapter.split(n) for n in counts]
        lengths = tuple(n for ls, _ in per_row for n in ls)
        grid = tuple(g for _, gs in per_row for g in gs)
        return lengths, grid, tuple(r for r, (ls, _) in enumerate(per_row) for _ in ls), None
    captured = sum(encode.lengths)
    copies, rest = divmod(sum(counts), captured)
    if rest or not copies:
        raise ValueError(
            f"this call holds {sum(counts)} visual tokens but {captured} were encoded; a prompt prefilled in chunks cannot be "
            "pruned (set prefill_chunk_size=None), and images must be encoded in the call that uses them"
        )
    images: list[int] = []
    row: list[int] = []
    following = first = 0
    for r, need in enumerate(counts):
        if r % copies == 0:
            first = following
        following, held = first, 0
        while held < need and following < len(encode.lengths):
            images.append(following)
            row.append(r)
            held += encode.lengths[following]
            following += 1
        if held != need:
            raise ValueError(f"row {r} holds {need} visual tokens, which is not a whole number of the encoded images")
    lengths = tuple(encode.lengths[i] for i in images)
    grid = tuple(encode.grid[i] for i in images)
    if images == list(range(len(encode.lengths))):
        return lengths, grid, tuple(row), None
    start = [0, *accumulate(encode.lengths)]
    source = torch.cat([torch.arange(start[i], start[i + 1]) for i in images]).to(encode.probe.device)
    return lengths, grid, tuple(row), source


def check_probe(values: Tensor, encode: Encode, source: Tensor | None) -> None:
    """Refuses features that are not the ones that were scored.

    Raises:
        ValueError: e.g. features were encoded earlier, and another picture has been encoded since.
    """
    probe = encode.probe if source is None else encode.probe[source]
    seen = values[:, 0].detach().to(probe.device)
    if not torch.equal(torch.nan_to_num(probe.to(seen.dtype)), torch.nan_to_num(seen)):
        raise ValueError(
            "the visual features of this call are not those the vision tower encoded last in this thread; "
            "pass pixel_values, or encode right before the call that uses the features"
        )
