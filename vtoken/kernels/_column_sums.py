"""Column sums of the softmax of packed segments: the kernels of `query_attention` and `received_attention`."""

import torch
from torch import Tensor

from vtoken.kernels._dispatch import interpretable, tl, triton
from vtoken.kernels._tiles import LOG2_E, attention_tiles, key_columns, query_rows, segment_of


@triton.jit
def _log_sums(  # type: ignore[no-untyped-def]
    q, k, q_offsets, k_offsets, segments, d, scale, q_strides, k_strides, log_sums,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, key head): log2 of the softmax denominators, [ΣQ, H], online over the keys. With
    causal attention, the queries are the last tokens of their segment."""
    mine, query = segment_of(q_offsets, segments, tl.program_id(0), ROWS // GROUPS, SEGMENTS)
    head = tl.program_id(1).to(tl.int64)
    q_end = tl.load(q_offsets + mine + 1).to(tl.int64)
    k_begin = tl.load(k_offsets + mine).to(tl.int64)
    k_end = tl.load(k_offsets + mine + 1).to(tl.int64)
    if (query < q_end) & (k_begin < k_end):
        rows, token, query_head, real = query_rows(q, query, q_end, head, q_strides, d, GROUPS, ROWS, DIM)
        sees = k_end - q_end + token  # the position of the query among the keys
        stop = k_end
        if CAUSAL:
            stop = tl.minimum(k_end, k_end - q_end + query + ROWS // GROUPS)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(k_begin, stop, KEYS):
            key = start + tl.arange(0, KEYS)
            columns = key_columns(k, key, k_end, head, k_strides, d, DIM)
            scores = tl.dot(rows, columns, input_precision="ieee") * scale
            seen = (key < k_end)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= sees[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
            top = new_top
        tl.store(log_sums + token * tl.num_programs(1) * GROUPS + query_head, top + tl.log2(total), mask=real)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    q, k, q_offsets, k_offsets, segments, d, scale, q_strides, k_strides, log_sums, sums, keys,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr, EACH: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, EACH query heads of one key head): sums over these heads and the queries of the
    segment, [H / EACH, ΣN]. MEAN divides them by the numbers of queries and of all heads."""
    mine, first = segment_of(k_offsets, segments, tl.program_id(0), KEYS, SEGMENTS)
    head = tl.program_id(1).to(tl.int64)
    k_end = tl.load(k_offsets + mine + 1).to(tl.int64)
    q_begin = tl.load(q_offsets + mine).to(tl.int64)
    q_end = tl.load(q_offsets + mine + 1).to(tl.int64)
    heads = tl.num_programs(1) * EACH
    if first < k_end:
        key = first + tl.arange(0, KEYS)
        columns = key_columns(k, key, k_end, head * EACH // GROUPS, k_strides, d, DIM)
        share = tl.zeros([KEYS], tl.float32)
        start = q_begin
        if CAUSAL:  # at the query at the first key of the tile
            start = tl.maximum(q_begin, q_end - (k_end - first))
        for query in range(start, q_end, ROWS // EACH):
            rows, token, query_head, real = query_rows(q, query, q_end, head, q_strides, d, EACH, ROWS, DIM)
            scores = tl.dot(rows, columns, input_precision="ieee") * scale
            log_sum = tl.load(log_sums + token * heads + query_head, mask=real, other=0.0)
            seen = real[:, None]
            if CAUSAL:
                seen = seen & (key[None, :] <= (k_end - q_end + token)[:, None])
            share += tl.sum(tl.where(seen, tl.exp2(scores - log_sum[:, None]), 0.0), 0)
        if MEAN:
            share = share / (tl.maximum(q_end - q_begin, 1) * heads).to(tl.float32)
        tl.store(sums + head * keys + key, share, mask=key < k_end)


def groups_of(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor) -> int:
    """Query heads per key head; raises ValueError if the arguments do not fit together."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: need [ΣQ, H, d] and [ΣN, Hk, d], H a multiple of Hk")
    if len(q_offsets) != len(k_offsets):
        raise ValueError(f"q_offsets has {len(q_offsets) - 1} segments, k_offsets has {len(k_offsets) - 1}")
    return q.shape[1] // k.shape[1]


def column_sums(
    q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, *, causal: bool = False, mean: bool
) -> Tensor:
    """[H, ΣN] fp32 sums over the queries of a segment. With `mean`, [Hk, ΣN]: each key head's part of the mean over
    queries and heads, all heads that share a key at once, so that few queries fill a tile. Summing heads afterwards is
    deterministic, unlike atomics."""
    groups = groups_of(q, k, q_offsets, k_offsets)
    q, k = interpretable(q.detach()), interpretable(k.detach())
    (queries, heads, d), (keys, key_heads, _), segments = q.shape, k.shape, len(q_offsets) - 1
    each = groups if mean else 1
    log_sums = torch.empty((queries, heads), dtype=torch.float32, device=q.device)
    sums = torch.empty((heads // each, keys), dtype=torch.float32, device=q.device)
    dim = max(16, triton.next_power_of_2(d))
    tile = attention_tiles(dim, q.element_size())
    # A dot product takes at least 16 rows: enough for one query per segment, too few to reuse keys for many.
    few = queries * groups <= 16 * segments
    rows = triton.next_power_of_2(max(groups, tile if not mean else 16 if few else min(64, 2 * tile)))
    blocks = {"GROUPS": groups, "ROWS": rows, "KEYS": tile, "DIM": dim, "SEGMENTS": triton.next_power_of_2(segments)}
    bounds = [offsets.to(q.device, non_blocking=True).contiguous() for offsets in (q_offsets, k_offsets)]
    common = (q, k, *bounds, segments, d, scale * LOG2_E, q.stride(), k.stride(), log_sums)
    with torch.cuda.device_of(q):  # triton launches on the current device
        if queries and keys:
            tiles = (queries // (rows // groups) + segments, key_heads)
            _log_sums[tiles](*common, **blocks, CAUSAL=causal, num_stages=2)
        if keys:
            tiles = (keys // tile + segments, heads // each)
            _sums[tiles](*common, sums, keys, **blocks, CAUSAL=causal, EACH=each, MEAN=mean, num_stages=2)
    return sums
