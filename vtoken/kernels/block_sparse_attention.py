"""Causal attention of one sequence in which every query block reads only some key blocks, and optionally single keys.

    q        [H, Q, d]   queries, any strides; query i is at position i + N - Q
    k, v     [Hk, N, d]  same dtype; H is a multiple of Hk, and query head h reads key head h // (H / Hk)
    read     [H, T, M] bool: which of the M = ceil(N / size) key blocks each of the T query blocks reads
    columns  [H, G, C] int32 or None: lists of single keys to read in addition, each key at most once in a list,
             -1 = none. Query block t reads list t // share. A key whose block is read anyway counts once. Ascending
             lists are cheapest: a query block goes through its list up to the last key that it may see
    of       [T] int32 or None: the list that each query block reads, instead of t // share
    rows     [H, R] int32 or None: the queries that make up the query blocks, T = ceil(R / size), each at most once,
             -1 = none. None: all queries in order, R = Q
    result   out [H, Q, d]: softmax(scale * q . k) @ v over the keys that are read and not after the query; 0 for
             queries without such keys, or not in `rows`. lse [H, Q] fp32: log2 of the softmax's denominator, -inf for
             these queries. Results over disjoint sets of keys can be merged: l = logaddexp2(l1, l2),
             out = out1 * 2^(l1 - l) + out2 * 2^(l2 - l)

fp32 accumulation (fp64 for fp64 inputs).

Bytes moved, e bytes per element: q and out once, 2 e H Q d; one block of K and V for every True of `read`, 2 e d size
sum(read) (mostly from L2: the query heads of a key head follow each other); one key for every query block that reads a
column; `read` and 4 C bytes of columns per query block twice; a list of 4 H T M bytes written and read once. FLOPs:
4 d size^2 sum(read), including the masked half of diagonal blocks. At 128k tokens, 28 / 4 heads x 128, a tenth of the
causal blocks: 0.5 TFLOP of 6.2. The definition computes everything that it masks, and the scores again for `lse`.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vtoken.kernels._dispatch import interpretable, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, within
from vtoken.kernels._flex import attend, backend_of
from vtoken.kernels._lists import assigned, check, lists_of
from vtoken.kernels._tiles import LOG2_E

CHUNK = 1 << 26  # scores that the definition computes at once: 256 MiB of fp32
# In half precision the kernel rounds the weights before they meet the values.
tolerance = within((1e-4, 1e-5), half=(2e-2, 2e-2))


def definition(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float, size: int = 128, columns: Tensor | None = None,
    share: int = 1, rows: Tensor | None = None, of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's own attention under a mask, a few query blocks at a time."""
    (heads, queries, _), keys, device = q.shape, k.shape[1], q.device
    out, lse = q.new_zeros(heads, queries, v.shape[2]), q.new_full((heads, queries), -torch.inf, dtype=torch.float32)
    listed = queries if rows is None else rows.shape[1]
    single = None if columns is None else _marked(columns, keys)
    of = assigned(read, share, of)
    each = size * max(1, CHUNK // max(1, heads * keys * size))
    for place in torch.arange(listed, device=device).split(each) if listed else ():
        row = (place.expand(heads, -1) if rows is None else rows[:, place]).long()
        visible = read[:, place // size].repeat_interleave(size, 2)[..., :keys]
        if single is not None:
            visible = visible | single[:, of[place // size]]
        position = row + keys - queries
        visible = visible & (torch.arange(keys, device=device) <= position[..., None]) & (row >= 0)[..., None]
        asked = q[:, place] if rows is None else q.take_along_dim(row.clamp(min=0)[..., None], 1)
        o, total = _masked(asked, k, v, visible, scale)
        head, at = (row >= 0).nonzero(as_tuple=True)
        out = out.index_put((head, row[head, at]), o[head, at])
        lse = lse.index_put((head, row[head, at]), total[head, at])
    return out, lse


def _marked(columns: Tensor, keys: int) -> Tensor:
    """[H, G, N] bool from lists of keys."""
    marks = columns.new_zeros(*columns.shape[:2], keys + 1, dtype=torch.bool)
    return marks.scatter_(2, torch.where(columns < 0, keys, columns).long(), True)[..., :keys]


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) for queries [H, R, d] with a mask of visible keys [H, R, N]."""
    groups = len(q) // len(k)
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    out = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible[None], scale=scale)[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.detach().to(wide) @ k.detach().to(wide).transpose(1, 2)) * scale
    lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1) * LOG2_E
    return torch.where(visible.any(-1, keepdim=True), out, 0), lse.float()


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    queries, k, v, key, known, visible, k_strides, v_strides, d, scale, out, total, top,
    MASK: tl.constexpr, DIM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Continues an online softmax over some more keys. With MASK, only `known` [keys] are loaded and only `visible`
    [rows, keys] count; otherwise all. FULL: d is DIM."""
    dim = tl.arange(0, DIM)
    inside = dim < d
    place = key.to(tl.int64)
    at = k + place[None, :] * k_strides[1] + dim[:, None] * k_strides[2]
    if FULL and not MASK:
        columns = tl.load(at)
    else:
        columns = tl.load(at, mask=known[None, :] & inside[:, None], other=0.0)
    scores = tl.dot(queries, columns, input_precision="ieee") * scale
    if MASK:
        scores = tl.where(visible, scores, -1e30)
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    if MASK:
        weights = tl.where(visible, weights, 0.0)
    at = v + place[:, None] * v_strides[1] + dim[None, :] * v_strides[2]
    if FULL and not MASK:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0)
    shrink = tl.exp2(top - new_top)
    out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return out, total * shrink + tl.sum(weights, 1), new_top


@triton.jit
def _single(  # type: ignore[no-untyped-def]
    columns, read, start, end, keys, SIZE: tl.constexpr, KEYS: tl.constexpr
):
    """A few single keys, -1 for those whose block is read anyway."""
    entry = start + tl.arange(0, KEYS)
    key = tl.load(columns + entry, mask=entry < end, other=-1)
    there = (key >= 0) & (key < keys)
    covered = tl.load(read + key // SIZE, mask=there, other=1)
    return tl.where(covered == 0, key, -1)


# These change with the prompt and say nothing about alignment (strides do): a new length does not recompile.
@triton.jit(do_not_specialize=["queries", "keys", "blocks", "groups", "length", "listed"])
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, read, lists, counts, columns, of, rows, out, lse, queries, keys, d, scale, blocks, groups, length,
    listed, q_strides, k_strides, v_strides,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, LISTED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Program (part of a query block, head). The last blocks read most and start first."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = part // (SIZE // ROWS)
    at = head * (tl.num_programs(0) // (SIZE // ROWS)) + tile
    place = part * ROWS + tl.arange(0, ROWS)
    if LISTED:
        row = tl.load(rows + head * listed + place, mask=place < listed, other=-1)
    else:
        row = tl.where(place < queries, place, -1)
    real = row >= 0
    position = tl.where(real, row + keys - queries, -1)
    dim = tl.arange(0, DIM)
    inside = real[:, None] & (dim < d)[None, :]
    where = row.to(tl.int64)[:, None] * q_strides[1] + dim[None, :] * q_strides[2]
    asked = tl.load(q + head * q_strides[0] + where, mask=inside, other=0.0)
    k += head // GROUPS * k_strides[0]
    v += head // GROUPS * v_strides[0]
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    count = tl.load(counts + at * 3)
    whole = tl.load(counts + at * 3 + 1)
    # Loaded one round ahead: keys whose address depends on a load in the same round cannot be prefetched.
    steps = count * (SIZE // KEYS)
    block = tl.load(lists + at * blocks, mask=count > 0, other=0)
    for i in range(0, whole * (SIZE // KEYS)):
        key = block * SIZE + i % (SIZE // KEYS) * KEYS + tl.arange(0, KEYS)
        block = tl.load(lists + at * blocks + (i + 1) // (SIZE // KEYS), mask=i + 1 < steps, other=0)
        sums, total, top = _step(
            asked, k, v, key, key >= 0, key, k_strides, v_strides, d, scale, sums, total, top, False, DIM, FULL
        )
    for i in range(whole * (SIZE // KEYS), steps):
        key = block * SIZE + i % (SIZE // KEYS) * KEYS + tl.arange(0, KEYS)
        block = tl.load(lists + at * blocks + (i + 1) // (SIZE // KEYS), mask=i + 1 < steps, other=0)
        known = key < keys
        visible = (key[None, :] <= position[:, None]) & known[None, :]
        sums, total, top = _step(
            asked, k, v, key, known, visible, k_strides, v_strides, d, scale, sums, total, top, True, DIM, FULL
        )
    if COLUMNS:
        mine = columns + (head * groups + tl.load(of + tile)) * length
        end = tl.load(counts + at * 3 + 2)
        coming = _single(mine, read + at * blocks, 0, end, keys, SIZE, KEYS)
        for start in range(0, end, KEYS):
            key = coming
            coming = _single(mine, read + at * blocks, start + KEYS, end, keys, SIZE, KEYS)
            known = key >= 0
            visible = (key[None, :] <= position[:, None]) & known[None, :]
            sums, total, top = _step(
                asked, k, v, key, known, visible, k_strides, v_strides, d, scale, sums, total, top, True, DIM, FULL
            )
    some = tl.where(total > 0, total, 1.0)
    where = (head * queries + row.to(tl.int64))[:, None] * d + dim[None, :]
    tl.store(out + where, sums / some[:, None], mask=inside)
    tl.store(lse + head * queries + row, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=real)


def tiles_of(dim: int, bytes_each: int, size: int) -> dict[str, int]:
    """Tile sizes of `_attend`: a tile of queries, its sums and some tiles of keys have to fit into registers and shared
    memory. With two stages, keys are not prefetched; three need 132 KiB at d 128 in half precision, so wider heads have
    two."""
    large = dim * bytes_each > 256
    # No tensor cores compute fp32 exactly, and unrolled products take many registers.
    rows = min(size, 128 if not large else 32 if bytes_each == 4 else 64)
    keys = min(size, 32 if large else 64)
    return {"ROWS": rows, "KEYS": keys, "num_warps": 8 if rows == 128 else 4, "num_stages": 2 if large else 3}


def launch(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float, size: int = 128, columns: Tensor | None = None,
    share: int = 1, rows: Tensor | None = None, of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    dtype = q.dtype
    q, k, v = (interpretable(x.detach()) for x in (q, k, v))
    (heads, queries, d), keys, (_, tiles, blocks) = q.shape, k.shape[1], read.shape
    out = (torch.empty if rows is None else torch.zeros)((heads, queries, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    if rows is not None:
        lse.fill_(-torch.inf)
    if not (heads and tiles and d):
        return out.to(dtype), lse
    flags = read.contiguous().view(torch.uint8)
    dim = max(16, triton.next_power_of_2(d))
    cut = tiles_of(dim, q.element_size(), size)
    singles = None if columns is None else columns.int().contiguous()
    mine = None if columns is None else assigned(read, share, of).contiguous()
    chosen = None if rows is None else rows.int().contiguous()
    groups, length = (0, 0) if singles is None else singles.shape[1:]
    with torch.cuda.device_of(q):  # triton launches on the current device
        lists, counts = lists_of(flags, size, keys - queries, rows is not None, singles, mine)
        _attend[(tiles * (size // cut["ROWS"]), heads)](
            q, k, v, flags, lists, counts, lists if singles is None else singles, lists if mine is None else mine,
            lists if chosen is None else chosen, out, lse, queries, keys, d, scale * LOG2_E, blocks, groups, length,
            0 if chosen is None else chosen.shape[1], q.stride(), k.stride(), v.stride(),
            GROUPS=heads // len(k), SIZE=size, DIM=dim, COLUMNS=singles is not None, LISTED=chosen is not None,
            FULL=dim == d, **cut,
        )  # fmt: skip
    return out.to(dtype), lse


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float, size: int = 128, columns: Tensor | None = None,
    share: int = 1, rows: Tensor | None = None, of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over the blocks that are read, see the top of the file. `out` is differentiable in q, k and v, `lse` is
    not.

    Columns and rows beyond the sequence, and list numbers in `of` that do not exist, give an undefined result. Raises
    ValueError for shapes that do not fit.
    """
    check(q, k, v, read, size, columns, share, rows, of)
    if (chosen := backend_of(q, k, v, columns, rows)) == "flex":
        return attend(q, k, v, read, scale, size)
    return (launch if chosen == "triton" else definition)(q, k, v, read, scale, size, columns, share, rows, of)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(
        heads: tuple[int, int], queries: int, keys: int, d: int, size: int, listed: int | None = None, p: float = 0.4
    ) -> Example:
        tiles = -(-(queries if listed is None else listed) // size)
        read = torch.rand(heads[0], tiles, -(-keys // size), generator=generator) < p
        q, k, v = (torch.randn(h, n, d, generator=generator) for h, n in ((heads[0], queries), *[(heads[1], keys)] * 2))
        return {"q": q, "k": k, "v": v, "read": read, "scale": d**-0.5, "size": size}

    def some(count: int, of: int, *shape: int) -> Tensor:
        """Lists [*shape, count] of different numbers below `of`, the second half of the last list -1."""
        taken = torch.rand(*shape, of, generator=generator).argsort(-1)[..., :count].int()
        taken[-1, ..., count // 2 :] = -1
        return taken

    yield case((2, 2), 0, 0, 8, 16)
    yield case((1, 1), 1, 1, 1, 16, p=1.0)
    yield case((4, 2), 200, 200, 64, 64)  # blocks
    yield {**case((6, 2), 100, 100, 20, 16, p=0.2), "columns": some(21, 100, 6, 4), "share": 2}  # blocks and columns
    yield {**case((2, 1), 70, 70, 16, 32, p=0.0), "columns": some(9, 70, 2, 1), "share": 3}  # columns alone
    of = torch.tensor([2, 0, 1, 1, 0, 2, 2], dtype=torch.int32)
    yield {**case((4, 2), 100, 100, 16, 16, p=0.2), "columns": some(21, 100, 4, 3), "of": of}  # lists in any order
    yield {**case((3, 3), 90, 90, 96, 32, listed=40), "rows": some(40, 90, 3)}  # rows
    both = {"rows": some(20, 60, 2), "columns": some(7, 60, 2, 2)}
    yield {**case((2, 1), 60, 60, 32, 16, listed=20), **both}  # all three
    gaps = torch.full((2, 1, 1100), -1, dtype=torch.int32)
    gaps[..., torch.arange(20) * 57] = some(20, 70, 2, 1)
    yield {**case((2, 1), 70, 70, 16, 16, p=0.2), "columns": gaps, "share": 5}  # a long list with gaps
    yield case((2, 2), 45, 130, 8, 64)  # after a prefix
    yield case((4, 2), 45, 130, 16, 16, p=0.7)  # the same with whole tiles, at a width that fills them
    yield case((2, 1), 33, 33, 256, 16)
    yield case((2, 2), 130, 130, 128, 128, p=1.0)
    strided = case((4, 2), 50, 50, 16, 16)
    yield {**strided, **{name: apart(strided[name], 0, 1) for name in "qkv"}, "scale": 3.0}
    wide = case((2, 1), 40, 40, 131, 16, p=0.7)
    yield {**wide, **{name: wide[name][..., 2:130] for name in "qkv"}}  # rows 131 numbers apart, from the third on
