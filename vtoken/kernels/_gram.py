"""Cosine similarities between all tokens of a segment, for kernels that go through them token by token."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vtoken.kernels._dispatch import tl, triton
from vtoken.kernels._tiles import dot_tiles, dots, segment_of
from vtoken.kernels.nearest_tokens import inverse_norms, side_by_side

CELLS = 1 << 27  # most cosines in memory at once: 512 MiB
LONGEST = 16384  # most tokens of a segment, whose state one program keeps in registers


@triton.jit
def _cosines(  # type: ignore[no-untyped-def]
    x, inverse, offsets, segments, stride, width, result, longest,
    TILE: tl.constexpr, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of columns of their segment). Programs above the diagonal also write what is
    below it."""
    mine, first = segment_of(offsets, segments, tl.program_id(0), TILE, SEGMENTS)
    begin = tl.load(offsets + mine).to(tl.int64)
    end = tl.load(offsets + mine + 1).to(tl.int64)
    other = begin + tl.program_id(1) * TILE
    if (first < end) & (other < end) & (first <= other):
        row = first + tl.arange(0, TILE)
        column = other + tl.arange(0, TILE)
        cosine = dots(x, row, row < end, stride, x, column, column < end, stride, width, TILE, TILE, WIDTH)
        cosine *= tl.load(inverse + row, mask=row < end, other=0.0)[:, None]
        cosine *= tl.load(inverse + column, mask=column < end, other=0.0)[None, :]
        inside = (row < end)[:, None] & (column < end)[None, :]
        # CELLS keeps offsets within a segment in 32 bits; 64 bits cost registers that the tile needs.
        result += begin * longest
        i = (row - begin).to(tl.int32)
        j = (column - begin).to(tl.int32)
        tl.store(result + (i[:, None] * longest + j[None, :]), cosine, mask=inside)
        if first < other:
            tl.store(result + (j[None, :] * longest + i[:, None]), cosine, mask=inside)


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[len + 1] int64 packed offsets; the copy does not make the host wait for the device."""
    return torch.tensor([0, *accumulate(lengths)]).to(device, non_blocking=True)


def fits(lengths: Sequence[int]) -> bool:
    """Whether each of these segments is within CELLS and LONGEST."""
    longest = max(lengths, default=0)
    return longest <= LONGEST and longest * longest <= CELLS


def groups(lengths: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Slices of segments, and of their tokens, in groups that stay within CELLS; every segment must fit by itself."""
    first = begin = end = longest = 0
    for segment, n in enumerate(lengths):
        longest = max(longest, n)
        if (end + n - begin) * longest > CELLS:
            yield slice(first, segment), slice(begin, end)
            first, begin, longest = segment, end, n
        end += n
    yield slice(first, len(lengths)), slice(begin, end)


def cosines(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[ΣN, longest] fp32: row i holds the cosines of token i with its segment; the rest of the row is not written."""
    x, longest = side_by_side(x), max(lengths)
    blocks = dot_tiles(len(x), x.element_size())
    tile = blocks["TILE"]
    result = torch.empty((len(x), longest), dtype=torch.float32, device=x.device)
    segments = len(lengths)
    with torch.cuda.device_of(x):  # triton launches on the current device
        _cosines[(len(x) // tile + segments, -(-longest // tile))](
            x, inverse_norms(x), bounds(lengths, x.device), segments, x.stride(0), x.shape[1], result, longest,
            **blocks, SEGMENTS=triton.next_power_of_2(segments),
        )  # fmt: skip
    return result


def warps(block: int) -> int:
    """Warps of a program that keeps vectors of `block` numbers in registers: up to 32 numbers of each per thread."""
    return max(4, min(16, block // 1024))
