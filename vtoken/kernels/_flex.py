"""block_sparse_attention on torch's flex_attention, from the same lists; the choice of torch, triton or flex."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.kernels._dispatch import flex_is_forced, heads_fit
from vtoken.kernels._tiles import LOG2_E

BLOCK = 128  # flex skips tiles of this size, whatever the block size


def backend_of(q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None = None, rows: Tensor | None = None) -> str:
    """``"torch"``, ``"triton"`` or ``"flex"``: the implementation of `block_sparse_attention` for these tensors. torch
    serves gradients, and dtypes and widths that the kernel does not take; flex runs only if forced.

    Raises:
        RuntimeError: flex is forced and does not support single keys or chosen queries, or triton is forced and cannot
            run.
    """
    if flex_is_forced():
        if columns is not None or rows is not None:
            raise RuntimeError(
                "flex_attention is forced (VTOKEN_KERNELS=flex or use('flex')) but reads whole blocks only, and here "
                f"single {'keys' if columns is not None else 'queries'} are listed besides: use torch or triton, or a "
                "method that lists blocks alone (flexprefill, xattention, static_sparse without `last`)"
            )
        return "torch" if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)) else "flex"
    return "triton" if heads_fit(q, k, v) else "torch"


def attend(q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """(out, lse) as defined by block_sparse_attention, for lists of blocks only.

    Compiled on an accelerator, once per shape. On a CPU it runs torch's eager version, which reads every key, because
    the compiled one gives no lse. Both look up what is read; the block mask only lets the compiled version skip tiles.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    queries, keys = q.shape[1], k.shape[1]
    if not (q.numel() and keys):
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    mask = block_mask(read, queries, keys, size)
    run = flex_attention if q.device.type == "cpu" else _compiled(flex_attention)
    wanted = AuxRequest(lse=True)
    out, aux = run(q[None], k[None], v[None], block_mask=mask, scale=scale, enable_gqa=True, return_aux=wanted)
    return out[0], aux.lse[0].float() * LOG2_E


def block_mask(read: Tensor, queries: int, keys: int, size: int) -> Any:
    """torch's BlockMask for a map [H, T, M] of blocks of `size`. Only tiles that are read in part look up the map."""
    from torch.nn.attention.flex_attention import BlockMask

    offset = keys - queries

    def visible(_: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return read[head, row // size, key // size] & (key <= row + offset)

    tiles, blocks = -(-queries // BLOCK), -(-keys // BLOCK)
    some, all_ = tiled(read, size, tiles, blocks)
    device = read.device
    first, last = torch.arange(tiles, device=device) * BLOCK + offset, torch.arange(blocks, device=device) * BLOCK
    some = some & (last <= (first + BLOCK - 1)[:, None])
    whole = all_ & (last + BLOCK - 1 <= first[:, None])
    lists = (*_lists(some & ~whole), *_lists(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(queries, keys))


def tiled(read: Tensor, size: int, tiles: int, blocks: int) -> tuple[Tensor, Tensor]:
    """For tiles [H, tiles, blocks] of 128: which contain a block that is read, and which contain only such blocks."""
    if size > BLOCK:
        wide = read.repeat_interleave(size // BLOCK, 1).repeat_interleave(size // BLOCK, 2)[:, :tiles, :blocks]
        return wide, wide
    per = BLOCK // size
    width, height = blocks * per - read.shape[2], tiles * per - read.shape[1]
    some, all_ = (
        pad(read, (0, width, 0, height), value=fill).unflatten(2, (blocks, per)).unflatten(1, (tiles, per))
        for fill in (False, True)
    )
    return some.any(4).any(2), all_.all(4).all(2)


def _lists(read: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [1, H, T] and indices [1, H, T, M]: the chosen tiles first, then the others, each in ascending order."""
    order = read.int().argsort(dim=-1, descending=True, stable=True)
    return read.sum(-1, dtype=torch.int32)[None], order.int()[None]


@cache
def _compiled(function: Any) -> Any:
    """`function`, compiled once. Past torch's limit of shapes it raises an error instead of running uncompiled."""
    return torch.compile(function, dynamic=False, fullgraph=True)
