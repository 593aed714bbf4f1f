"""How much each block of queries attends to each block of keys, estimated from block means.

    q        [B, H, Nq, d]   queries after RoPE, any strides; they are the last Nq of Nk tokens
    k        [B, Hk, Nk, d]  keys, same dtype; H is a multiple of Hk, and query head h reads key head h // (H / Hk)
    block    tokens per block, of queries and of keys; the last block may hold fewer, and its mean is over those
    scale    factor on mean q . mean k before the softmax
    padding  [B] int64 keys at the front of each row that are padding, or None; they are left out of all means
    means    [B, Hk, blocks, d] means of the key blocks, or None to compute them
    result   [B, H, ceil(Nq / block), ceil(Nk / block)] fp32: softmax over the key blocks of which the query block sees
             at least the first token; zero for blocks that it does not see, and for blocks that hold only padding

fp32 accumulation; products of means as three TF32 products each, as exact as fp32. Bytes moved, e bytes per element:
q and k read once, e * (H * Nq + Hk * Nk) * d per batch row; the means written in fp32, 1 / block of that, and read
once per 16 blocks; the result written twice and read once. The definition writes and reads the result about four
times.
"""

import torch
from torch import Tensor

from vtoken.kernels._dispatch import heads_fit, interpretable, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, padded_heads, within
from vtoken.kernels._tiles import LOG2_E
from vtoken.kernels.probe_sums import groups_of

tolerance = within((1e-4, 1e-6))  # the order of fp32 sums differs, in means, scores and softmax


def definition(
    q: Tensor, k: Tensor, block: int, scale: float, padding: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Means, scores, mask, softmax."""
    groups = groups_of(q, k)
    queries, keys = q.shape[2], k.shape[2]
    start = torch.zeros(len(q), dtype=torch.int64, device=q.device) if padding is None else padding.to(q.device)
    (q_means, q_real), (k_means, k_real) = _means(q, block, start - (keys - queries)), _means(k, block, start, means)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q_means.unflatten(1, (-1, groups)), k_means).flatten(1, 2) * scale
    row = torch.arange(1, scores.shape[2] + 1, device=q.device).mul(block).clamp(max=queries) + keys - queries
    seen = row[:, None] > torch.arange(scores.shape[3], device=q.device) * block
    seen = (seen & q_real[:, :, None] & k_real[:, None])[:, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)


def _means(x: Tensor, block: int, start: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, H, blocks, d] means of the tokens from `start` [B] on, and [B, blocks] whether a block has such tokens."""
    tokens, blocks = x.shape[2], -(-x.shape[2] // block)
    if known is not None:
        ends = torch.arange(1, blocks + 1, device=x.device).mul(block).clamp(max=tokens)
        return known.float(), ends > start[:, None]
    real = torch.arange(tokens, device=x.device) >= start[:, None]
    owner = torch.arange(tokens, device=x.device) // block
    x = x.float().masked_fill(~real[:, None, :, None], 0)
    total = x.new_zeros(*x.shape[:2], blocks, x.shape[3]).index_add_(2, owner, x)
    count = total.new_zeros(len(x), blocks).index_add_(1, owner, real.float())
    return total / count.clamp(min=1)[:, None, :, None], count > 0


@triton.jit(do_not_specialize=["tokens", "shift"])
def _pool(  # type: ignore[no-untyped-def]
    x, padding, heads, tokens, shift, d, block, strides, means,
    PADDED: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (block, batch row and head): one mean. `shift`: number of keys before the first token of x."""
    at = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    start = 0
    if PADDED:
        start = tl.load(padding + pair // heads).to(tl.int32) - shift
    dim = tl.arange(0, DIM)
    begin = tl.maximum(at * block, start)
    end = tl.minimum(at * block + block, tokens)
    total = tl.zeros([DIM], tl.float32)
    source = x + pair // heads * strides[0] + pair % heads * strides[1]
    for token in range(begin, end, TILE):
        row = token + tl.arange(0, TILE)
        inside = (row < end)[:, None] & (dim < d)[None, :]
        values = tl.load(source + row[:, None] * strides[2] + dim[None, :] * strides[3], mask=inside, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    mean = total / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(means + (pair * tl.num_programs(0) + at) * d + dim, mean, mask=dim < d)


@triton.jit
def _block_tile(  # type: ignore[no-untyped-def]
    rows, k_means, pair, row, column, groups, key_blocks, queries, keys, start, d, block, scale, DIM: tl.constexpr
):
    """[rows, columns] base-2 logits; -inf where not visible."""
    dim = tl.arange(0, DIM)
    at = (pair // groups * key_blocks + column)[None, :] * d + dim[:, None]
    columns = tl.load(k_means + at, mask=(column < key_blocks)[None, :] & (dim < d)[:, None], other=0.0)
    last = tl.minimum(row * block + block, queries) + keys - queries
    seen = (last[:, None] > (column * block)[None, :]) & (last > start)[:, None]
    seen = seen & ((column < key_blocks) & (tl.minimum(column * block + block, keys) > start))[None, :]
    return tl.where(seen, tl.dot(rows, columns, input_precision="tf32x3") * scale, float("-inf"))


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "queries", "keys"])
def _scores(  # type: ignore[no-untyped-def]
    q_means, k_means, padding, heads, groups, query_blocks, key_blocks, queries, keys, d, block, scale, result,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (tile of query blocks, batch row and head): scores and the parts of their softmax, then the quotient."""
    pair = tl.program_id(1).to(tl.int64)
    start = 0
    if PADDED:
        start = tl.load(padding + pair // heads).to(tl.int32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = (row < query_blocks)[:, None] & (dim < d)[None, :]
    rows = tl.load(q_means + (pair * query_blocks + row)[:, None] * d + dim[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, key_blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        scores = _block_tile(
            rows, k_means, pair, row, column, groups, key_blocks, queries, keys, start, d, block, scale, DIM
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = new_top
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total > 0, total, 1.0)
    for first in range(0, key_blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        scores = _block_tile(
            rows, k_means, pair, row, column, groups, key_blocks, queries, keys, start, d, block, scale, DIM
        )
        share = tl.exp2(scores - base[:, None]) / total[:, None]
        written = (row < query_blocks)[:, None] & (column < key_blocks)[None, :]
        tl.store(result + (pair * query_blocks + row)[:, None] * key_blocks + column[None, :], share, mask=written)


def launch(
    q: Tensor, k: Tensor, block: int, scale: float, padding: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Launches the kernels: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    groups = groups_of(q, k)
    q, k = interpretable(q.detach()), interpretable(k.detach())
    (batch, heads, queries, d), (_, key_heads, keys, _) = q.shape, k.shape
    query_blocks, key_blocks = -(-queries // block), -(-keys // block)
    result = torch.empty((batch, heads, query_blocks, key_blocks), dtype=torch.float32, device=q.device)
    if not result.numel():
        return result
    start = q if padding is None else padding.to(q.device, non_blocking=True).contiguous()
    blocks = {"PADDED": padding is not None, "DIM": max(16, triton.next_power_of_2(d))}
    q_means = torch.empty((batch, heads, query_blocks, d), dtype=torch.float32, device=q.device)
    k_means, pools = means, [(q, q_means, queries)]
    if k_means is None:
        k_means = torch.empty((batch, key_heads, key_blocks, d), dtype=torch.float32, device=q.device)
        pools.append((k, k_means, keys))
    with torch.cuda.device_of(q):  # triton launches on the current device
        for x, made, count in pools:
            grid = (made.shape[2], batch * made.shape[1])
            _pool[grid](x, start, made.shape[1], count, keys - count, d, block, x.stride(), made, **blocks, TILE=16)
        _scores[(-(-query_blocks // 16), batch * heads)](
            q_means, k_means.float().contiguous(), start, heads, groups, query_blocks, key_blocks, queries, keys, d,
            block, scale * LOG2_E, result, **blocks, ROWS=16, COLUMNS=32, num_warps=4 if d <= 128 else 8,
            num_stages=3 if d <= 128 else 2,
        )  # fmt: skip
    return result


def pooled_scores(
    q: Tensor, k: Tensor, block: int, scale: float, padding: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Block-to-block attention, see the top of the file. Differentiable. Raises ValueError for wrong shapes."""
    return (launch if heads_fit(q, k) else definition)(q, k, block, scale, padding, means)


def examples() -> Examples:
    draw = torch.Generator().manual_seed(0)

    def case(heads: tuple[int, int], tokens: tuple[int, int], d: int, block: int, *padding: int) -> Example:
        return {**padded_heads(draw, max(1, len(padding)), heads, tokens, d, *padding), "block": block, "scale": 1.0}

    yield case((1, 1), (0, 3), 8, 2)
    yield case((1, 1), (1, 1), 8, 4)
    yield case((2, 1), (130, 130), 80, 7)
    yield case((3, 1), (33, 70), 64, 16, 0, 69, 40)
    yield case((2, 2), (70, 70), 96, 32, 33)
    known = case((2, 1), (40, 40), 64, 16)
    yield {**known, "means": _means(known["k"], 16, torch.zeros(1, dtype=torch.int64))[0]}
    strided = case((2, 1), (40, 41), 128, 3)
    yield {**strided, "q": apart(strided["q"], 1, 2), "k": apart(strided["k"], 2, 3)}
