"""Attention that every key receives, head by head: column sums of the softmax, without an N x N map.

    q          [ΣQ, H, d]   queries of all segments, packed, any strides: all tokens of a segment, or its last ones
    k          [ΣN, Hk, d]  keys, same dtype; H is a multiple of Hk, and query head h reads key head h // (H / Hk)
    q_offsets  [S + 1] int32 or int64, 0 = first, ascending, last = ΣQ; k_offsets likewise for ΣN
    scale      factor on q . k before the softmax
    causal     queries are the last tokens of their segment, no more than its keys, and see no later key
    result     [ΣN, H] fp32: softmax over the keys that a query sees, summed over the queries of the segment

A column of a segment with Q queries sums to Q; divide by Q for a mean. `query_attention` averages over heads and suits
few queries; this op suits many queries, and choices of keys per head. fp32 accumulation (fp64 for fp64 inputs).

Bytes moved, e bytes per element, with M tiles of queries and P tiles of keys per segment: K is read H / Hk times M + 1
times and q P + 1 times, e * d per token and head (re-reads mostly from L2); 4 * ΣQ * H of log-sums are written and read
P times, 4 * ΣN * H of sums written. O(N) memory. 4 * d FLOPs per head and pair of query and key: scores are computed
twice, once for the denominators. The definition computes at most CHUNK scores at once and moves some 16 bytes for each.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vtoken.kernels._column_sums import column_sums, groups_of
from vtoken.kernels._dispatch import heads_fit
from vtoken.kernels._examples import Examples, apart, packed_heads, within
from vtoken.kernels.query_attention import CHUNK

tolerance = within((1e-4, 1e-6))  # only the order of fp32 sums differs


def definition(
    q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool = False
) -> Tensor:
    """Segment by segment, a chunk of queries at a time. Reads the offsets, so it waits if they are on a device."""
    groups = groups_of(q, k, q_offsets, k_offsets)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    parts: list[Tensor] = []
    for (q0, q1), (k0, k1) in zip(pairwise(q_offsets.tolist()), pairwise(k_offsets.tolist()), strict=True):
        keys, received = k[k0:k1].to(dtype), []
        chunk = max(1, CHUNK // max(1, q.shape[1] * (k1 - k0)))
        for start in range(q0, q1, chunk) if k1 > k0 else ():
            queries = q[start : min(start + chunk, q1)].to(dtype).unflatten(1, (k.shape[1], groups))
            scores = torch.einsum("qhgd,nhd->hgqn", queries, keys) * scale
            if causal:
                # The queries are the last tokens; each sees all keys except those of later queries.
                hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=k.device)
                scores = scores.masked_fill(hidden.triu(k1 - k0 - q1 + start + 1), -torch.inf)
            received.append(scores.softmax(-1).sum(2).flatten(0, 1))
        none = keys.new_zeros(q.shape[1], k1 - k0) if not received else received[0]
        parts.append((none if len(received) < 2 else torch.stack(received).sum(0)).T)
    return parts[0].float() if len(parts) == 1 else torch.cat([k.new_zeros(0, q.shape[1]), *parts]).float()


def launch(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool = False) -> Tensor:
    """Launches the kernels: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    return column_sums(q, k, q_offsets, k_offsets, scale, causal=causal, mean=False).T


def received_attention(
    q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool = False
) -> Tensor:
    """Attention that every key receives per head, see the top of the file. Differentiable; a gradient keeps all scores.

    Offsets that do not cover all of q and k, and causal segments with more queries than keys, give an undefined result.
    Raises ValueError for shapes that do not fit.
    """
    return (launch if heads_fit(q, k) else definition)(q, k, q_offsets, k_offsets, scale, causal)


def examples() -> Examples:
    case = partial(packed_heads, torch.Generator().manual_seed(0))
    yield {**case([], [], (2, 2), 8), "causal": False}
    yield {**case([0, 0], [0, 5], (2, 1), 8), "causal": True}
    yield {**case([1, 65, 0, 100], [1, 65, 3, 100], (2, 2), 64), "causal": False}
    yield {**case([70, 7], [70, 7], (2, 1), 80), "causal": True}
    yield {**case([9, 0, 1, 33], [133, 0, 1, 33], (6, 2), 96), "causal": True}
    yield {**case([17], [81], (3, 1), 128), "causal": True}
    strided = case([3, 2], [50, 31], (4, 2), 16)
    yield {**strided, "q": apart(strided["q"], 0, 1), "k": strided["k"].repeat(1, 1, 2)[..., 5:21], "scale": 3.0}
