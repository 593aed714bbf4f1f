"""Gathers the kept positions of a key-value cache, per head.

    caches  a tensor, or a tuple or list of them (K and V of one or more layers that keep the same positions), each
            [B, Hk, S, d], any strides, d may differ
    index   [B, Hk, K] int32 or int64, 0 <= index < S, any order; [B, 1, K] if all heads keep the same
    result  the same structure, each [B, Hk, K, d], contiguous, same dtype

Bytes moved, with R the bytes of one position of one head: B * Hk * K * R read and written per tensor, and 8 * B * Hk *
K of index read once per tensor; dropped positions are not read. The definition moves the same bytes, but its gather
reads an index for every number. One launch for all tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.kernels._dispatch import runs_triton, tl, triton
from vtoken.kernels._examples import Examples, exact
from vtoken.kernels.gather_tokens import BITS, Tensors, alike

TILE = 16  # positions that one program copies
tolerance = exact


def definition(caches: Tensors, index: Tensor) -> Tensors:
    """torch.gather on every tensor."""

    def gather(cache: Tensor) -> Tensor:
        batch, heads, _, d = cache.shape
        return cache.gather(2, index.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, d))

    return alike(caches, lambda group: [gather(cache) for cache in group])


@triton.jit(do_not_specialize=["kept"])
def _copy(  # type: ignore[no-untyped-def]
    sources, outputs, strides, widths, index, heads, kept,
    TILE: tl.constexpr, WIDTHS: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Program (tile of positions, batch row and head, tensor). ALIKE: all heads of a row share one list of
    positions."""
    slot = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    pair = tl.program_id(1).to(tl.int64)
    row = pair // heads
    head = pair % heads
    inside = slot < kept
    position = tl.load(index + (row if ALIKE else pair) * kept + slot, mask=inside, other=0).to(tl.int64)
    for which in tl.static_range(len(sources)):
        if tl.program_id(2) == which:
            column = tl.arange(0, WIDTHS[which])
            mask = inside[:, None] & (column < widths[which])[None, :]
            source = sources[which] + row * strides[which][0] + head * strides[which][1]
            address = position[:, None] * strides[which][2] + column[None, :] * strides[which][3]
            values = tl.load(source + address, mask=mask)
            target = outputs[which] + (pair * kept + slot)[:, None] * widths[which] + column[None, :]
            tl.store(target, values, mask=mask)


def _launch(group: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    (batch, heads), kept = group[0].shape[:2], index.shape[2]
    taken = [torch.empty((batch, heads, kept, c.shape[3]), dtype=c.dtype, device=c.device) for c in group]
    if any(t.numel() for t in taken):
        bits = [cache.detach().view(BITS[cache.element_size()]) for cache in group]
        widths = tuple(cache.shape[3] for cache in group)
        with torch.cuda.device_of(index):  # triton launches on the current device
            _copy[(-(-kept // TILE), batch * heads, len(group))](
                tuple(bits), tuple(t.view(b.dtype) for t, b in zip(taken, bits, strict=True)),
                tuple(b.stride() for b in bits), widths, index.contiguous(), heads, kept,
                TILE=TILE, WIDTHS=tuple(triton.next_power_of_2(max(1, d)) for d in widths),
                ALIKE=index.shape[1] < heads,
            )  # fmt: skip
    return taken


def launch(caches: Tensors, index: Tensor) -> Tensors:
    """Launches the kernel: the contract of the definition without gradients, for tensors with the same B and Hk."""
    return alike(caches, lambda group: _launch(group, index))


def gather_cache(caches: Tensors, index: Tensor) -> Tensors:
    """Positions `index` of every cache, see the top of the file. Differentiable.

    Raises:
        ValueError: batch or heads differ between the caches, or the index fits neither all heads nor one.
        RuntimeError: a position is out of range, on the CPU; on a device the result is then undefined, because checking
            would synchronise.
    """
    group: Sequence[Tensor] = [caches] if isinstance(caches, Tensor) else caches
    for cache in group:
        batch, heads = cache.shape[:2]
        if (batch, heads) != group[0].shape[:2] or len(index) != batch or index.shape[1] not in (1, heads):
            raise ValueError(
                f"cache {tuple(cache.shape)} and index {tuple(index.shape)}: need [B, Hk, S, d] with the same B and Hk "
                "throughout, and [B, Hk, K] or [B, 1, K]"
            )
    return launch(caches, index) if runs_triton(index, *group) else definition(caches, index)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def index(batch: int, heads: int, kept: int, size: int) -> Tensor:
        return torch.randint(size, (batch, heads, kept), generator=generator)

    yield {"caches": (), "index": index(1, 1, 1, 1)}
    yield {"caches": draw(1, 1, 1, 3), "index": index(1, 1, 0, 1)}
    yield {"caches": (draw(2, 3, 40, 64), draw(2, 3, 40, 80)), "index": index(2, 3, 17, 40)}
    yield {"caches": [draw(2, 2, 33, 96), draw(2, 2, 35, 128)], "index": index(2, 1, 33, 33)}
    yield {"caches": draw(2, 2, 30, 16), "index": index(2, 2, 21, 30).int()}
    heads_last = draw(2, 9, 3, 20).transpose(1, 2)
    yield {"caches": (heads_last, draw(2, 3, 9, 40)[..., ::2]), "index": index(2, 3, 32, 9)[..., ::4]}
