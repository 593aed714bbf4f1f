"""What the last queries of a prompt attend to: attention summed per key (vertical) and per distance (slash).

    q         [B, H, L, d]   the last L queries, after RoPE, any strides
    k         [B, Hk, N, d]  keys, same dtype, L <= N; query head h reads key head h // (H / Hk), H a multiple of Hk
    scale     factor on q . k before the softmax
    padding   [B] int64 keys at the front of each row that are padding, or None; queries there do not count
    recent    number of last queries whose column sums are also returned, which saves a second stage its own pass
    vertical  [B, H, N] fp32: key j's column sum of the causal softmax over the L queries
    slash     [B, H, N] fp32: the attention of each query to the key `distance` tokens before it, summed over queries
    late      [B, H, N] fp32: as vertical, for the last `recent` queries; [B, H, 0] if recent is 0

Query i stands at position N - L + i. vertical and slash of a head both sum to the number of queries; divide by it for
means. L = N gives the sums over a whole prompt. fp32 accumulation. The map [H, L, N] is not stored, but its diagonals
are, tile by tile: a 32nd of its numbers, in fp32, if tiles are 64 wide (d up to 128 in half precision).

Bytes moved, e bytes per element: K is read 2 * ceil(L / 64) times per query head, mostly from L2, and per tile of 64
queries and keys of a head 128 partial sums of 4 bytes are written and read (2 * L * N / 8 bytes per head); 8 * N
written. 4 * L * N * d FLOPs per head. The diagonals of a tile are turned into columns in registers, so there are no
atomics and every run gives the same result. The definition computes CHUNK scores at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.kernels._dispatch import heads_fit, interpretable, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, padded_heads, within
from vtoken.kernels._tiles import LOG2_E, attention_tiles
from vtoken.kernels.query_attention import CHUNK

SPLIT = 4096  # keys per program in the pass for the denominators
tolerance = within((1e-4, 1e-6))  # only the order of fp32 sums differs
Sums = tuple[Tensor, Tensor, Tensor]


def definition(q: Tensor, k: Tensor, scale: float, padding: Tensor | None = None, recent: int = 0) -> Sums:
    """One head and one chunk of queries at a time."""
    groups = groups_of(q, k, recent)
    (batch, heads, last, _), keys = q.shape, k.shape[2]
    vertical, slash, late = _made(torch.zeros, q, k, recent)
    start = torch.zeros(batch, dtype=torch.int64, device=q.device) if padding is None else padding.to(q.device)
    column = torch.arange(keys, device=q.device)
    chunk = max(1, CHUNK // max(1, batch * keys))
    for head in range(heads):
        their_keys = k[:, head // groups].float()
        for first in range(0, last, chunk):
            queries = q[:, head, first : first + chunk].float()
            rows = queries.shape[1]
            end = keys - last + first + rows  # one past the last key that they see
            position = torch.arange(end - rows, end, device=q.device)
            seen = (column[:end] <= position[:, None]) & (column[:end] >= start[:, None, None])
            scores = (queries @ their_keys[:, :end].mT * scale).masked_fill(~seen, -torch.inf)
            share = scores.softmax(-1).masked_fill(~seen, 0)
            vertical[:, head, :end] += share.sum(1)
            slash[:, head, :end] += _diagonals(share)
            if recent > last - first - rows:
                late[:, head, :end] += share[:, max(0, last - first - recent) :].sum(1)
    return vertical, slash, late


def _diagonals(share: Tensor) -> Tensor:
    """[B, N] sums over equal distances of [B, R, N]; its last row belongs to the last key."""
    _, rows, n = share.shape
    # Each row is padded by one column more than is read, so it shifts by one against the row before and equal distances
    # align.
    sheared = pad(share.flip(1), (0, rows)).flatten(1)[:, : rows * (n + rows - 1)].unflatten(1, (rows, -1))
    return sheared.sum(1)[:, :n].flip(-1)


def _made(new: Callable[..., Tensor], q: Tensor, k: Tensor, recent: int) -> Sums:
    widths = (k.shape[2], k.shape[2], k.shape[2] if recent else 0)
    vertical, slash, late = (new((*q.shape[:2], n), dtype=torch.float32, device=q.device) for n in widths)
    return vertical, slash, late


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    q, k, pair, heads, groups, first, key, last, keys, start, d, scale, q_strides, k_strides,
    TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """[TILE, TILE] base-2 logits of the queries from `first` on and these keys; -inf where not visible."""
    row = first + tl.arange(0, TILE)
    dim = tl.arange(0, DIM)
    far = row.to(tl.int64)
    batch = pair // heads
    head = pair % heads
    q_at = batch * q_strides[0] + head * q_strides[1] + far[:, None] * q_strides[2] + dim[None, :] * q_strides[3]
    a = tl.load(q + q_at, mask=(row < last)[:, None] & (dim < d)[None, :], other=0.0)
    k_at = batch * k_strides[0] + head // groups * k_strides[1]
    k_at += key[None, :] * k_strides[2] + dim[:, None] * k_strides[3]
    b = tl.load(k + k_at, mask=(key < keys)[None, :] & (dim < d)[:, None], other=0.0)
    seen = (key[None, :] <= (keys - last + row)[:, None]) & (key >= start)[None, :] & (row < last)[:, None]
    return tl.where(seen, tl.dot(a, b, input_precision="ieee") * scale, float("-inf")), row


@triton.jit(do_not_specialize=["last", "keys"])
def _log_sums(  # type: ignore[no-untyped-def]
    q, k, padding, heads, groups, last, keys, d, scale, q_strides, k_strides, log_sums,
    PADDED: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, split of the keys, batch row and head): log2 of its part of the denominators."""
    first = tl.program_id(0) * TILE
    pair = tl.program_id(2).to(tl.int64)
    start = 0
    if PADDED:
        start = tl.load(padding + pair // heads).to(tl.int32)
    begin = tl.program_id(1) * SPLIT
    end = tl.minimum(tl.minimum(begin + SPLIT, keys), keys - last + first + TILE)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for at in range(begin, end, TILE):
        key = at + tl.arange(0, TILE).to(tl.int64)
        scores, _ = _tile(
            q, k, pair, heads, groups, first, key, last, keys, start, d, scale, q_strides, k_strides, TILE, DIM
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = new_top
    row = first + tl.arange(0, TILE)
    slot = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + pair) * last + row
    tl.store(log_sums + slot, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=row < last)


@triton.jit(do_not_specialize=["last", "keys", "recent"])
def _sums(  # type: ignore[no-untyped-def]
    q, k, padding, heads, groups, last, keys, d, scale, q_strides, k_strides, log_sums, vertical, late, diagonals,
    recent, PADDED: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, batch row and head): its columns, and the sums along the diagonals of every tile, [B *
    H, tiles of queries, tiles of keys, 2 * TILE]; diagonal TILE - 1 goes through the corner."""
    tile = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    start = 0
    if PADDED:
        start = tl.load(padding + pair // heads).to(tl.int32)
    key = tile * TILE + tl.arange(0, TILE)
    columns = tl.zeros([TILE], tl.float32)
    of_recent = tl.zeros([TILE], tl.float32)
    i = tl.arange(0, TILE)
    c = tl.arange(0, 2 * TILE)
    # Row i of the turned tile holds, at c, the key with i - j = c - (TILE - 1).
    j = i[:, None] + (TILE - 1) - c[None, :]
    on_tile = (j >= 0) & (j < TILE)
    for first in range(0, last, TILE):
        scores, row = _tile(
            q, k, pair, heads, groups, first, key, last, keys, start, d, scale, q_strides, k_strides, TILE, DIM
        )
        log_sum = tl.load(log_sums + pair * last + row, mask=row < last, other=0.0)
        log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
        share = tl.exp2(scores - log_sum[:, None])
        columns += tl.sum(share, 0)
        if RECENT:
            of_recent += tl.sum(tl.where((row >= last - recent)[:, None], share, 0.0), 0)
        turned = tl.gather(share, tl.where(on_tile, j, 0), 1)
        slot = (pair * tl.cdiv(last, TILE) + first // TILE) * tl.num_programs(0) + tile
        tl.store(diagonals + slot * 2 * TILE + c, tl.sum(tl.where(on_tile, turned, 0.0), 0))
    tl.store(vertical + pair * keys + key, columns, mask=key < keys)
    if RECENT:
        tl.store(late + pair * keys + key, of_recent, mask=key < keys)


@triton.jit(do_not_specialize=["last", "keys"])
def _slashes(diagonals, last, keys, slash, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (tile of distances, batch row and head): sums over the tiles that each distance crosses, two per tile
    of queries."""
    distance = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    pair = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(keys, TILE)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, last, TILE):
        # Distance at the corner of the first tile of keys; at that of tile t it is smaller by TILE * t.
        corner = keys - last + first
        # The tiles crossed have TILE * tile in [highest - (2 * TILE - 2), highest].
        highest = corner + TILE - 1 - distance
        for back in tl.static_range(2):
            tile = tl.where(highest >= 0, highest // TILE, -1) - back
            c = distance - corner + tile * TILE + TILE - 1
            slot = (pair * tl.cdiv(last, TILE) + first // TILE) * tiles + tile
            inside = (tile >= 0) & (tile < tiles) & (c >= 0) & (c < 2 * TILE)
            total += tl.load(diagonals + slot * 2 * TILE + c, mask=inside, other=0.0)
    tl.store(slash + pair * keys + distance, total, mask=distance < keys)


def groups_of(q: Tensor, k: Tensor, recent: int = 0) -> int:
    """Query heads per key head; raises ValueError if the arguments do not fit together."""
    if not 0 <= recent <= q.shape[-2]:
        raise ValueError(f"recent {recent}: there are {q.shape[-2]} queries")
    alike = q.ndim == k.ndim == 4 and len(q) == len(k) and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0
    if not alike or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: need [B, H, L, d] and [B, Hk, N, d], H a multiple of Hk, L <= N"
        )
    return q.shape[1] // k.shape[1]


def launch(q: Tensor, k: Tensor, scale: float, padding: Tensor | None = None, recent: int = 0) -> Sums:
    """Launches the kernels: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    groups = groups_of(q, k, recent)
    q, k = interpretable(q.detach()), interpretable(k.detach())
    (batch, heads, last, d), keys = q.shape, k.shape[2]
    vertical, slash, late = _made(torch.empty, q, k, recent)
    if not last or not vertical.numel():
        return vertical.zero_(), slash.zero_(), late.zero_()
    dim = max(16, triton.next_power_of_2(d))
    tile = attention_tiles(dim, q.element_size())
    pairs, q_tiles, k_tiles, splits = batch * heads, -(-last // tile), -(-keys // tile), -(-keys // SPLIT)
    log_sums = torch.empty((splits, pairs, last), dtype=torch.float32, device=q.device)
    diagonals = torch.empty((pairs, q_tiles, k_tiles, 2 * tile), dtype=torch.float32, device=q.device)
    start = q if padding is None else padding.to(q.device, non_blocking=True).contiguous()
    common = (q, k, start, heads, groups, last, keys, d, scale * LOG2_E, q.stride(), k.stride())
    blocks = {"PADDED": padding is not None, "TILE": tile, "DIM": dim}
    with torch.cuda.device_of(q):  # triton launches on the current device
        _log_sums[(q_tiles, splits, pairs)](*common, log_sums, **blocks, SPLIT=SPLIT, num_stages=2)
        whole = log_sums[0] if splits == 1 else torch.logsumexp(log_sums / LOG2_E, 0) * LOG2_E
        _sums[(k_tiles, pairs)](
            *common, whole, vertical, late, diagonals, recent, **blocks, RECENT=recent > 0, num_stages=1, num_warps=8
        )
        _slashes[(k_tiles, pairs)](diagonals, last, keys, slash, TILE=tile)
    return vertical, slash, late


def probe_sums(q: Tensor, k: Tensor, scale: float, padding: Tensor | None = None, recent: int = 0) -> Sums:
    """(vertical, slash, late), see the top of the file. No gradient. Raises ValueError for shapes that do not fit."""
    q, k = q.detach(), k.detach()
    return (launch if heads_fit(q, k) else definition)(q, k, scale, padding, recent)


def examples() -> Examples:
    draw = torch.Generator().manual_seed(0)

    def case(batch: int, heads: tuple[int, int], last: int, keys: int, d: int, *padding: int) -> Example:
        return {**padded_heads(draw, batch, heads, (last, keys), d, *padding), "scale": d**-0.5}

    yield case(1, (1, 1), 0, 5, 8)
    yield case(1, (1, 1), 1, 1, 8)
    yield {**case(2, (2, 1), 65, 130, 80, 0, 100), "recent": 3}
    yield {**case(1, (2, 2), 64, 64, 96), "recent": 64}
    yield case(2, (3, 1), 5, 133, 128, 131, 7)
    strided = case(1, (2, 1), 9, 70, 64)
    yield {**strided, "q": apart(strided["q"], 1, 2), "k": apart(strided["k"], 2, 3)}
