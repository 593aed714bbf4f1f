"""The largest score of every query over the key blocks that it reads: softmax's running maximum, without the values.

    q        [H, N, d]   queries of the whole sequence, any strides
    k        [Hk, N, d]  same dtype; H is a multiple of Hk, and query head h reads key head h // (H / Hk)
    read     [H, T, T] bool: which of the T = ceil(N / size) key blocks each query block reads
    result   [H, N] fp32: the maximum of scale * q . k over the keys that are read and not after the query; -inf if
             there are none

fp32 accumulation.

Bytes moved, e bytes per element: q once, e H N d; one block of K for every True of `read`, e d size sum(read) (mostly
from L2); `read` twice, a list of 4 H T T bytes written and read once, the result once. FLOPs: 2 d size^2 sum(read). The
definition computes everything that it masks.
"""

import torch
from torch import Tensor

from vtoken.kernels._dispatch import heads_fit, interpretable, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, within
from vtoken.kernels._lists import check, lists_of

CHUNK = 1 << 26  # scores that the definition computes at once: 256 MiB of fp32
tolerance = within((1e-5, 1e-5), half=(1e-3, 1e-3))


def definition(q: Tensor, k: Tensor, read: Tensor, scale: float, size: int = 128) -> Tensor:
    """Scores under a mask, a few query blocks at a time."""
    (heads, n, _), out = q.shape, []
    keys = k.float().repeat_interleave(heads // len(k), 0).transpose(1, 2)
    at = torch.arange(n, device=q.device)
    each = size * max(1, CHUNK // max(1, heads * n * size))
    for rows in at.split(each) if n else ():
        seen = read[:, rows // size].repeat_interleave(size, 2)[..., :n] & (at <= rows[:, None])
        out.append((q[:, rows].float() @ keys * scale).masked_fill(~seen, -torch.inf).amax(-1))
    return torch.cat(out, 1) if out else q.new_empty(heads, 0, dtype=torch.float32)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _maxima(  # type: ignore[no-untyped-def]
    q, k, lists, counts, out, tokens, d, scale, blocks, q_strides, k_strides,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (part of a query block, head). The last blocks read most and start first."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    at = head * (tl.num_programs(0) // (SIZE // ROWS)) + part // (SIZE // ROWS)
    row = part * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = dim < d
    where = row.to(tl.int64)[:, None] * q_strides[1] + dim[None, :] * q_strides[2]
    asked = tl.load(q + head * q_strides[0] + where, mask=(row < tokens)[:, None] & inside[None, :], other=0.0)
    k += head // GROUPS * k_strides[0]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    steps = tl.load(counts + at * 3) * (SIZE // KEYS)
    block = tl.load(lists + at * blocks, mask=steps > 0, other=0)
    for i in range(0, steps):
        key = block * SIZE + i % (SIZE // KEYS) * KEYS + tl.arange(0, KEYS)
        block = tl.load(lists + at * blocks + (i + 1) // (SIZE // KEYS), mask=i + 1 < steps, other=0)
        address = key.to(tl.int64)[None, :] * k_strides[1] + dim[:, None] * k_strides[2]
        columns = tl.load(k + address, mask=(key < tokens)[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(asked, columns, input_precision="ieee") * scale
        visible = (key[None, :] <= row[:, None]) & (key < tokens)[None, :]
        top = tl.maximum(top, tl.max(tl.where(visible, scores, float("-inf")), 1))
    tl.store(out + head * tokens + row, top, mask=row < tokens)


def launch(q: Tensor, k: Tensor, read: Tensor, scale: float, size: int = 128) -> Tensor:
    """Launches the kernel: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    q, k = (interpretable(x.detach()) for x in (q, k))
    heads, n, d = q.shape
    out = torch.empty((heads, n), dtype=torch.float32, device=q.device)
    if not (heads and n):
        return out
    dim = max(16, triton.next_power_of_2(d))
    large = dim * q.element_size() > 256
    part, step = min(size, 64 if large else 128), min(size, 32 if large else 64)
    with torch.cuda.device_of(q):  # triton launches on the current device
        lists, counts = lists_of(read.contiguous().view(torch.uint8), size, 0)
        _maxima[(read.shape[1] * (size // part), heads)](
            q, k, lists, counts, out, n, d, scale, read.shape[2], q.stride(), k.stride(),
            GROUPS=heads // len(k), SIZE=size, ROWS=part, KEYS=step, DIM=dim, num_warps=8 if part == 128 else 4,
            num_stages=3,
        )  # fmt: skip
    return out


def row_maxima(q: Tensor, k: Tensor, read: Tensor, scale: float, size: int = 128) -> Tensor:
    """The maxima, see the top of the file; no gradients. Raises ValueError for shapes that do not fit."""
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: need the queries of the whole sequence")
    check(q, k, k, read, size)
    with torch.no_grad():
        return (launch if heads_fit(q, k, beside=[read]) else definition)(q, k, read, scale, size)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(heads: tuple[int, int], n: int, d: int, size: int, p: float = 0.5) -> Example:
        q, k = (torch.randn(h, n, d, generator=generator) for h in heads)
        read = torch.rand(heads[0], -(-n // size), -(-n // size), generator=generator) < p
        return {"q": q, "k": k, "read": read, "scale": d**-0.5, "size": size}

    yield case((2, 2), 0, 8, 16)
    yield case((1, 1), 1, 1, 16, 1.0)
    yield case((4, 2), 100, 20, 16)
    yield case((2, 1), 33, 256, 16, 0.3)
    yield case((2, 2), 130, 64, 128, 1.0)
    strided = case((4, 2), 50, 16, 16)
    yield {**strided, **{name: apart(strided[name], 0, 1) for name in "qk"}, "scale": 3.0}
