"""How much attention every key receives from the few queries of its segment, without an N x N map.

    q          [ΣQ, H, d]   queries of all segments, packed, any strides
    k          [ΣN, Hk, d]  keys, same dtype; H is a multiple of Hk, and query head h reads key head h // (H / Hk)
    q_offsets  [S + 1] int32 or int64, 0 = first, ascending, last = ΣQ; k_offsets likewise for ΣN
    scale      factor on q . k before the softmax
    result     [ΣN] fp32: softmax over all keys of the segment, averaged over its queries and the H heads

Every segment sums to 1; one without queries gets zeros. One query per image gives CLS attention, the last token's
gives last-query attention, all tokens as queries give received attention. fp32 accumulation (fp64 for fp64 inputs).

Bytes moved, e bytes per element, with M tiles of queries and P tiles of keys per segment. The kernels read K M + 1
times, e * ΣN * Hk * d each (re-reads mostly from L2), read q P + 1 times, write 4 * ΣQ * H of log-sums and read them
P times, write and read 4 * ΣN * Hk of sums per head, and write 4 * ΣN. CLS of CLIP-L at 336 px (577 x 16 x 64, bf16):
M = 1, P = 10, 2 * 1.18 MB of K and 0.1 MB of everything else. The definition reads K once per chunk and writes and
reads the fp32 scores about four times, 4 * ΣQ * N * H each; it computes at most CHUNK of them at a time.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vtoken.kernels._column_sums import column_sums, groups_of
from vtoken.kernels._dispatch import equal_steps, heads_fit
from vtoken.kernels._examples import Examples, apart, packed_heads, within

CHUNK = 1 << 24  # scores that the definition computes at once: 64 MiB of fp32
tolerance = within((1e-4, 1e-7))  # only the order of fp32 sums differs


def definition(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Segments of equal length at once, others one by one, a chunk of queries at a time. Reads the offsets, so it waits
    for the device if they are there."""
    groups = groups_of(q, k, q_offsets, k_offsets)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds, segments = (q_offsets.tolist(), k_offsets.tolist()), len(k_offsets) - 1
    if equal_steps(bounds[0]) and equal_steps(bounds[1]) and len(q) * q.shape[1] * len(k) <= CHUNK * segments:
        queries = q.to(dtype).unflatten(1, (k.shape[1], groups)).unflatten(0, (segments, -1))
        scores = torch.einsum("sqhgd,snhd->shqgn", queries, k.to(dtype).unflatten(0, (segments, -1)))
        return (scores if scale == 1 else scores * scale).softmax(-1).mean((1, 2, 3)).flatten().float()
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(bounds[0]), pairwise(bounds[1]), strict=True):
        keys = k[k0:k1].to(dtype)
        received = keys.new_zeros(k1 - k0)
        chunk = max(1, CHUNK // max(1, q.shape[1] * (k1 - k0)))
        for queries in q[q0:q1].split(chunk) if q1 > q0 and k1 > k0 else ():
            grouped = queries.to(dtype).unflatten(1, (k.shape[1], groups))
            scores = torch.einsum("qhgd,nhd->qhgn", grouped, keys) * scale
            received = received + scores.softmax(-1).sum((0, 1, 2))
        parts.append(received / max(1, (q1 - q0) * q.shape[1]))
    return torch.cat([k.new_zeros(0, dtype=dtype), *parts]).float()


def launch(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Launches the kernels: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    return column_sums(q, k, q_offsets, k_offsets, scale, mean=True).sum(0)


def query_attention(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Attention that every key receives, see the top of the file. Differentiable, with all scores in memory.

    Offsets that do not cover all of q and k give an undefined result. Raises ValueError for shapes that do not fit.
    """
    return (launch if heads_fit(q, k) else definition)(q, k, q_offsets, k_offsets, scale)


def examples() -> Examples:
    case = partial(packed_heads, torch.Generator().manual_seed(0))
    yield case([], [], (2, 2), 8)
    yield case([0, 0], [0, 5], (2, 1), 8)
    yield case([1], [1], (1, 1), 1)
    yield case([1], [577], (3, 3), 64)
    yield case([1, 0, 2, 1, 3], [70, 9, 0, 1, 129], (14, 2), 72)
    yield case([0, 37, 1, 100, 65], [1, 37, 64, 100, 65], (6, 2), 20)
    yield case([33], [65], (20, 1), 80)
    yield case([5, 1], [40, 33], (1, 1), 256)
    strided = case([3, 2], [50, 31], (4, 2), 16)
    yield {**strided, "q": apart(strided["q"], 0, 1), "k": strided["k"].repeat(1, 1, 2)[..., 5:21], "scale": 3.0}
