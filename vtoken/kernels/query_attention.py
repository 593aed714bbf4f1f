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

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtoken.kernels._dispatch import equal_steps, interpretable, runs_triton, tl, triton
from vtoken.kernels._tiles import LOG2_E, attention_tiles

CHUNK = 1 << 24  # scores that the definition computes at once: 64 MiB of fp32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


if triton is not None:
    from vtoken.kernels._tiles import key_columns, log_sums_kernel, query_rows, segment_of

    @triton.jit
    def _received(  # type: ignore[no-untyped-def]
        q, k, q_offsets, k_offsets, segments, d, scale, q_strides, k_strides, log_sums, sums, keys,
        GROUPS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
    ):  # fmt: skip
        """Program (tile of keys, key head): its part of the result, [Hk, ΣN], over all queries of the segment. Heads
        are summed afterwards, which, unlike atomics, is deterministic."""
        mine, first = segment_of(k_offsets, segments, tl.program_id(0), KEYS, SEGMENTS)
        head = tl.program_id(1).to(tl.int64)
        k_end = tl.load(k_offsets + mine + 1).to(tl.int64)
        q_begin = tl.load(q_offsets + mine).to(tl.int64)
        q_end = tl.load(q_offsets + mine + 1).to(tl.int64)
        heads = tl.num_programs(1) * GROUPS
        if first < k_end:
            key = first + tl.arange(0, KEYS)
            columns = key_columns(k, key, k_end, head, k_strides, d, DIM)
            share = tl.zeros([KEYS], tl.float32)
            for query in range(q_begin, q_end, ROWS // GROUPS):
                rows, token, query_head, real = query_rows(q, query, q_end, head, q_strides, d, GROUPS, ROWS, DIM)
                scores = tl.dot(rows, columns, input_precision="ieee") * scale
                log_sum = tl.load(log_sums + token * heads + query_head, mask=real, other=0.0)
                share += tl.sum(tl.where(real[:, None], tl.exp2(scores - log_sum[:, None]), 0.0), 0)
            share = share / (tl.maximum(q_end - q_begin, 1) * heads).to(tl.float32)
            tl.store(sums + head * keys + key, share, mask=key < k_end)


def groups_of(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor) -> int:
    """Query heads per key head; raises ValueError if the arguments do not fit together."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: need [ΣQ, H, d] and [ΣN, Hk, d], H a multiple of Hk")
    if len(q_offsets) != len(k_offsets):
        raise ValueError(f"q_offsets has {len(q_offsets) - 1} segments, k_offsets has {len(k_offsets) - 1}")
    return q.shape[1] // k.shape[1]


def launch(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Launches the kernels: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    groups = groups_of(q, k, q_offsets, k_offsets)
    q, k = interpretable(q.detach()), interpretable(k.detach())
    (queries, heads, d), (keys, key_heads, _), segments = q.shape, k.shape, len(q_offsets) - 1
    log_sums = torch.empty((queries, heads), dtype=torch.float32, device=q.device)
    sums = torch.empty((key_heads, keys), dtype=torch.float32, device=q.device)
    dim = max(16, triton.next_power_of_2(d))
    # A dot product takes at least 16 rows: enough for one query per segment, too few to reuse keys for many.
    tile = attention_tiles(dim, q.element_size())
    rows = triton.next_power_of_2(max(groups, 16 if queries * groups <= 16 * segments else min(64, 2 * tile)))
    blocks = {"GROUPS": groups, "ROWS": rows, "KEYS": tile, "DIM": dim, "SEGMENTS": triton.next_power_of_2(segments)}
    bounds = [offsets.to(q.device, non_blocking=True).contiguous() for offsets in (q_offsets, k_offsets)]
    common = (q, k, *bounds, segments, d, scale * LOG2_E, q.stride(), k.stride(), log_sums)
    with torch.cuda.device_of(q):  # triton launches on the current device
        if queries and keys:
            tiles = (queries // (rows // groups) + segments, key_heads)
            log_sums_kernel[tiles](*common, **blocks, CAUSAL=False, num_stages=2)
        if keys:
            _received[(keys // tile + segments, key_heads)](*common, sums, keys, **blocks, num_stages=2)
    return sums.sum(0)


def query_attention(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Attention that every key receives, see the top of the file. Differentiable; a gradient keeps all scores in
    memory.

    Offsets that do not cover all of q and k give an undefined result. Raises ValueError for shapes that do not fit.
    """
    fits = q.dtype == k.dtype and q.dtype in DTYPES and q.shape[-1] <= 256 and runs_triton(q, k)
    return (launch if fits else definition)(q, k, q_offsets, k_offsets, scale)


def examples() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def case(q_lengths: list[int], k_lengths: list[int], heads: tuple[int, int], d: int) -> dict[str, Any]:
        q = torch.randn(sum(q_lengths), heads[0], d, generator=generator)
        k = torch.randn(sum(k_lengths), heads[1], d, generator=generator)
        q_offsets, k_offsets = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
        return {"q": q, "k": k, "q_offsets": q_offsets, "k_offsets": k_offsets.int(), "scale": d**-0.5}

    yield case([], [], (2, 2), 8)
    yield case([0, 0], [0, 5], (2, 1), 8)
    yield case([1], [1], (1, 1), 1)
    yield case([1], [577], (3, 3), 64)
    yield case([1, 0, 2, 1, 3], [70, 9, 0, 1, 129], (14, 2), 72)
    yield case([0, 37, 1, 100, 65], [1, 37, 64, 100, 65], (6, 2), 20)
    yield case([33], [65], (20, 1), 80)
    yield case([5, 1], [40, 33], (1, 1), 256)
    strided = case([3, 2], [50, 31], (4, 2), 16)
    heads_first = strided["q"].transpose(0, 1).contiguous().transpose(0, 1)
    yield {**strided, "q": heads_first, "k": strided["k"].repeat(1, 1, 2)[..., 5:21], "scale": 3.0}


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute): both sides accumulate in fp32 from the same inputs, so only the order of sums differs."""
    return 1e-4, 1e-7
