"""Shared by sparse ops: checks of arguments, and lists of the key blocks that each query block reads."""

import torch
from torch import Tensor

from vtoken.kernels._dispatch import tl, triton


@triton.jit(do_not_specialize=["blocks", "groups", "length", "offset"])
def _list(  # type: ignore[no-untyped-def]
    read, columns, of, lists, counts, blocks, groups, length, offset,
    SIZE: tl.constexpr, LISTED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (query block, head): the blocks it reads, ascending; their number; how many of them are
    visible to all its queries in full; how many entries of its list of single keys its last query may see."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    at = head * tl.num_programs(0) + tile
    first = offset + tile * SIZE
    whole = 0 if LISTED else (first + 1) // SIZE
    count = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        taken = (tl.load(read + at * blocks + block, mask=block < blocks, other=0) != 0).to(tl.int32)
        tl.store(lists + at * blocks + count + tl.cumsum(taken, 0) - 1, block, mask=taken > 0)
        count += tl.sum(taken, 0)
        seen += tl.sum(tl.where(block < whole, taken, 0), 0)
    tl.store(counts + at * 3, count)
    tl.store(counts + at * 3 + 1, seen)
    if COLUMNS:
        mine = columns + (head * groups + tl.load(of + tile)) * length
        end = tl.full((), 0, tl.int32)
        for start in range(0, length, 8 * BLOCK):
            entry = start + tl.arange(0, 8 * BLOCK)
            key = tl.load(mine + entry, mask=entry < length, other=-1)
            met = (key >= 0) if LISTED else (key >= 0) & (key < first + SIZE)
            end = tl.maximum(end, tl.max(tl.where(met, entry + 1, 0), 0))
        tl.store(counts + at * 3 + 2, end)


def lists_of(
    read: Tensor, size: int, offset: int, listed: bool = False, columns: Tensor | None = None, of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From flags [H, T, M] uint8: the lists [H, T, M] and counts [H, T, 3] int32 that `_list` makes, on the current
    device."""
    heads, tiles, blocks = read.shape
    lists = torch.empty((heads, tiles, blocks), dtype=torch.int32, device=read.device)
    counts = torch.empty((heads, tiles, 3), dtype=torch.int32, device=read.device)
    groups, length = (0, 0) if columns is None else columns.shape[1:]
    _list[(tiles, heads)](
        read, lists if columns is None else columns, lists if of is None else of, lists, counts, blocks, groups, length,
        offset, SIZE=size, LISTED=listed, COLUMNS=columns is not None, BLOCK=128,
    )  # fmt: skip
    return lists, counts


def assigned(read: Tensor, share: int, of: Tensor | None) -> Tensor:
    """[T] int32: the list of single keys that each query block reads."""
    return torch.arange(read.shape[1], dtype=torch.int32, device=read.device) // share if of is None else of.int()


def check(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, size: int, columns: Tensor | None = None, share: int = 1,
    rows: Tensor | None = None, of: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError if the arguments of block_sparse_attention do not fit together."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: need [H, Q, d] and twice [Hk, N, d], H a "
            "multiple of Hk"
        )
    if size < 16 or size & (size - 1) or share < 1:
        raise ValueError(f"size {size} must be a power of two from 16 on, share {share} at least 1")
    tiles = -(-(q.shape[1] if rows is None else rows.shape[1]) // size)
    if read.dtype != torch.bool or tuple(read.shape) != (q.shape[0], tiles, -(-k.shape[1] // size)):
        raise ValueError(
            f"read is {read.dtype} {tuple(read.shape)}; need bool {(q.shape[0], tiles, -(-k.shape[1] // size))}"
        )
    check_singles(len(q), tiles, columns, share, of)


def check_singles(heads: int, tiles: int, columns: Tensor | None, share: int, of: Tensor | None) -> None:
    """Raises ValueError if lists of single keys do not fit the number of heads and query blocks; their contents are not
    checked."""
    if columns is not None and (columns.ndim != 3 or len(columns) != heads):
        raise ValueError(f"columns {tuple(columns.shape)}: need [H, lists, keys] of {heads} heads")
    if columns is not None and of is None and columns.shape[1] * share < tiles:
        raise ValueError(
            f"columns {tuple(columns.shape)} with share {share}: need lists for {tiles} query blocks, {share} on each"
        )
    if of is not None and tuple(of.shape) != (tiles,):
        raise ValueError(f"of is {tuple(of.shape)}; need the list of each of {tiles} query blocks")
