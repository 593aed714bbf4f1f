"""Inputs that the examples of several ops share, and tolerances between a kernel and its definition."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

Example = dict[str, Any]  # arguments of an op
Examples = Iterator[Example]
Bound = tuple[float, float]  # relative, absolute
Pair = tuple[int, int]  # of the queries, of the keys


def within(fp32: Bound, half: Bound | None = None, bf16: Bound | None = None) -> Callable[[torch.dtype], Bound]:
    """The tolerance of an op by the dtype of its inputs: `half` for fp16 and, unless given, bf16; one for all dtypes if
    only the first is given."""
    half = half or fp32
    return lambda dtype: {torch.float16: half, torch.bfloat16: bf16 or half}.get(dtype, fp32)


exact = within((0.0, 0.0))


def apart(x: Tensor, first: int, second: int) -> Tensor:
    """The same values, with these two axes in the other order in memory."""
    return x.transpose(first, second).contiguous().transpose(first, second)


def packed_heads(draw: Generator, q_lengths: list[int], k_lengths: list[int], heads: Pair, d: int) -> Example:
    """q, k, their offsets and a scale, for packed segments."""
    q = torch.randn(sum(q_lengths), heads[0], d, generator=draw)
    k = torch.randn(sum(k_lengths), heads[1], d, generator=draw)
    q_offsets, k_offsets = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
    return {"q": q, "k": k, "q_offsets": q_offsets, "k_offsets": k_offsets.int(), "scale": d**-0.5}


def padded_heads(draw: Generator, batch: int, heads: Pair, tokens: Pair, d: int, *padding: int) -> Example:
    """q and k of `batch` rows, NaN where a row is padding at the front; q are the last of the keys' tokens."""
    q = torch.randn(batch, heads[0], tokens[0], d, generator=draw)
    k = torch.randn(batch, heads[1], tokens[1], d, generator=draw)
    for row, first in enumerate(padding):
        q[row, :, : max(0, first - tokens[1] + tokens[0])] = torch.nan
        k[row, :, :first] = torch.nan
    return {"q": q, "k": k, "padding": torch.tensor(padding) if padding else None}
