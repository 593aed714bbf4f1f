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

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtoken.kernels._dispatch import interpretable, runs_triton, tl, triton
from vtoken.kernels._tiles import LOG2_E, attention_tiles
from vtoken.kernels.query_attention import CHUNK, DTYPES, groups_of


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


if triton is not None:
    from vtoken.kernels._tiles import key_columns, log_sums_kernel, query_rows, segment_of

    @triton.jit
    def _column_sums(  # type: ignore[no-untyped-def]
        q, k, q_offsets, k_offsets, segments, d, scale, q_strides, k_strides, log_sums, sums, keys,
        GROUPS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
        CAUSAL: tl.constexpr,
    ):  # fmt: skip
        """Program (tile of keys, query head): sums over the queries of the segment, into [H, ΣN]."""
        mine, first = segment_of(k_offsets, segments, tl.program_id(0), KEYS, SEGMENTS)
        head = tl.program_id(1).to(tl.int64)
        k_end = tl.load(k_offsets + mine + 1).to(tl.int64)
        q_begin = tl.load(q_offsets + mine).to(tl.int64)
        q_end = tl.load(q_offsets + mine + 1).to(tl.int64)
        if first < k_end:
            key = first + tl.arange(0, KEYS)
            columns = key_columns(k, key, k_end, head // GROUPS, k_strides, d, DIM)
            share = tl.zeros([KEYS], tl.float32)
            if CAUSAL:  # starts at the query at the first key of the tile
                q_begin = tl.maximum(q_begin, q_end - (k_end - first))
            for query in range(q_begin, q_end, ROWS):
                rows, token, _, real = query_rows(q, query, q_end, head, q_strides, d, 1, ROWS, DIM)
                scores = tl.dot(rows, columns, input_precision="ieee") * scale
                log_sum = tl.load(log_sums + token * tl.num_programs(1) + head, mask=real, other=0.0)
                seen = real[:, None]
                if CAUSAL:
                    seen = seen & (key[None, :] <= (k_end - q_end + token)[:, None])
                share += tl.sum(tl.where(seen, tl.exp2(scores - log_sum[:, None]), 0.0), 0)
            tl.store(sums + head * keys + key, share, mask=key < k_end)


def launch(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool = False) -> Tensor:
    """Launches the kernels: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    groups = groups_of(q, k, q_offsets, k_offsets)
    q, k = interpretable(q.detach()), interpretable(k.detach())
    (queries, heads, d), (keys, key_heads, _), segments = q.shape, k.shape, len(q_offsets) - 1
    log_sums = torch.empty((queries, heads), dtype=torch.float32, device=q.device)
    sums = torch.empty((heads, keys), dtype=torch.float32, device=q.device)
    dim = max(16, triton.next_power_of_2(d))
    tile = attention_tiles(dim, q.element_size())
    rows = triton.next_power_of_2(max(groups, tile))
    blocks = {"GROUPS": groups, "KEYS": tile, "DIM": dim, "SEGMENTS": triton.next_power_of_2(segments)}
    bounds = [offsets.to(q.device, non_blocking=True).contiguous() for offsets in (q_offsets, k_offsets)]
    common = (q, k, *bounds, segments, d, scale * LOG2_E, q.stride(), k.stride(), log_sums)
    with torch.cuda.device_of(q):  # triton launches on the current device
        if queries and keys:
            tiles = (queries // (rows // groups) + segments, key_heads)
            log_sums_kernel[tiles](*common, **blocks, ROWS=rows, CAUSAL=causal, num_stages=2)
        if keys:
            tiles = (keys // tile + segments, heads)
            _column_sums[tiles](*common, sums, keys, **blocks, ROWS=tile, CAUSAL=causal, num_stages=2)
    return sums.T


def received_attention(
    q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool = False
) -> Tensor:
    """Attention that every key receives per head, see the top of the file. Differentiable; a gradient keeps all scores.

    Offsets that do not cover all of q and k, and causal segments with more queries than keys, give an undefined result.
    Raises ValueError for shapes that do not fit.
    """
    fits = q.dtype == k.dtype and q.dtype in DTYPES and q.shape[-1] <= 256 and runs_triton(q, k)
    return (launch if fits else definition)(q, k, q_offsets, k_offsets, scale, causal)


def examples() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def case(
        q_lengths: list[int], k_lengths: list[int], heads: tuple[int, int], d: int, causal: bool = False
    ) -> dict[str, Any]:
        q = torch.randn(sum(q_lengths), heads[0], d, generator=generator)
        k = torch.randn(sum(k_lengths), heads[1], d, generator=generator)
        q_offsets, k_offsets = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
        bounds = {"q_offsets": q_offsets, "k_offsets": k_offsets.int()}
        return {"q": q, "k": k, **bounds, "scale": d**-0.5, "causal": causal}

    yield case([], [], (2, 2), 8)
    yield case([0, 0], [0, 5], (2, 1), 8, causal=True)
    yield case([1, 65, 0, 100], [1, 65, 3, 100], (2, 2), 64)
    yield case([70, 7], [70, 7], (2, 1), 80, causal=True)
    yield case([9, 0, 1, 33], [133, 0, 1, 33], (6, 2), 96, causal=True)
    yield case([17], [81], (3, 1), 128, causal=True)
    strided = case([3, 2], [50, 31], (4, 2), 16)
    heads_first = strided["q"].transpose(0, 1).contiguous().transpose(0, 1)
    yield {**strided, "q": heads_first, "k": strided["k"].repeat(1, 1, 2)[..., 5:21], "scale": 3.0}


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute): both sides accumulate in fp32 from the same inputs, so only the order of sums differs."""
    return 1e-4, 1e-6
