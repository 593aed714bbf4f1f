"""Shared by several kernels: the segment of a tile, tiles of queries and keys, dot products."""

from vtoken.kernels._dispatch import tl, triton

LOG2_E = 1.4426950408889634
MANY = 1024  # number of tokens above which tiles of 128 keep a device busy


@triton.jit
def segment_of(offsets, segments, tile, TILE: tl.constexpr, SEGMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The segment of a tile, and the tile's first position. Segment s owns the tiles from offsets[s] // TILE + s
    on: always enough, at most one too many, and the host needs no lengths."""
    s = tl.arange(0, SEGMENTS)
    owned = tl.load(offsets + s, mask=s < segments, other=0) // TILE + s
    mine = tl.sum(((owned <= tile) & (s < segments)).to(tl.int32), 0) - 1
    begin = tl.load(offsets + mine).to(tl.int64)
    return mine, begin + (tile - begin // TILE - mine) * TILE


@triton.jit
def query_rows(  # type: ignore[no-untyped-def]
    q, query, end, head, strides, d, GROUPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Tile [ROWS, DIM] of q, queries times the query heads of one key head; token and head of each row; whether it
    is real."""
    row = tl.arange(0, ROWS)
    token = query + row // GROUPS
    query_head = head * GROUPS + row % GROUPS
    real = (row < ROWS // GROUPS * GROUPS) & (token < end)
    dim = tl.arange(0, DIM)
    address = token[:, None] * strides[0] + query_head[:, None] * strides[1] + dim[None, :] * strides[2]
    return tl.load(q + address, mask=real[:, None] & (dim < d)[None, :], other=0.0), token, query_head, real


@triton.jit
def key_columns(k, key, end, head, strides, d, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile [DIM, keys] of k, transposed."""
    dim = tl.arange(0, DIM)
    address = key[None, :] * strides[0] + head * strides[1] + dim[:, None] * strides[2]
    return tl.load(k + address, mask=(key < end)[None, :] & (dim < d)[:, None], other=0.0)


@triton.jit
def dots(  # type: ignore[no-untyped-def]
    x, row, row_inside, x_stride, y, column, column_inside, y_stride, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] dot products of tokens of x and tokens of y, each contiguous in memory."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        a_inside = row_inside[:, None] & (at < width)[None, :]
        a = tl.load(x + row[:, None] * x_stride + at[None, :], mask=a_inside, other=0.0)
        b_inside = column_inside[None, :] & (at < width)[:, None]
        b = tl.load(y + column[None, :] * y_stride + at[:, None], mask=b_inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


def dot_tiles(tokens: int, bytes_each: int) -> dict[str, int]:
    """Tile sizes of `dots`: small if there are few tokens, so that the device is busy, or if numbers are wide."""
    large = tokens >= MANY and bytes_each == 2
    return {"TILE": 128 if large else 64, "WIDTH": 128 // bytes_each, "num_warps": 8 if large else 4}


def attention_tiles(dim: int, bytes_each: int) -> int:
    """Keys per tile, so that the tiles fit in 64 KB of shared memory."""
    return max(16, min(64, 16384 // (dim * bytes_each)))
