"""The most similar other token of every token, by cosine, without the N x N matrix.

    x          [ΣN, D]  tokens that look for a partner, any length, any strides
    y          [ΣM, D]  tokens to choose from, same dtype
    x_offsets  [S + 1] int32 or int64, 0 = first, ascending, last = ΣN; y_offsets likewise for ΣM. A token
               looks only in its own segment; segments may be empty
    among      "all": all tokens of y; "others": all but itself; "later": only tokens after it. For the last two, x is y
    unit       all tokens have length 1, so none has to be normalised
    similarity [ΣN] fp32, highest cosine, -inf if there is no candidate
    partner    [ΣN] int64, its position in y, ties to the lower one, -1 if there is none

NaN in x or y gives an undefined result. fp32 accumulation; a token of length 0 has cosine 0 with everything.

Bytes moved, e bytes per number: y is read once per 64 or 128 tokens of x of its segment and x once per as many of y,
mostly from L2; 12 bytes per token written, times the shares into which the columns are cut so that the device is
busy. The definition writes and reads 4 * N * M of scores. 2 * N * M * D FLOPs per segment. One image of 2880 tokens,
4096 wide: 68 GFLOP.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.kernels._dispatch import DTYPES, equal_steps, interpretable, runs_triton, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, within
from vtoken.kernels._tiles import dot_tiles, dots, segment_of

# The order of fp32 sums differs; partners are exact where cosines differ by more than that.
tolerance = within((1e-5, 1e-6))
ROWS = 1024  # tokens whose similarities the definition computes at once
PROGRAMS = 264  # programs to keep a device busy: two per multiprocessor of an H100 or H200
Among = Literal["all", "others", "later"]


def definition(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, among: Among = "all", unit: bool = False
) -> tuple[Tensor, Tensor]:
    """Segments of equal length at once, others one by one, ROWS tokens at a time. Reads the offsets, so it waits for
    the device if they are there."""

    def normed(tokens: Tensor) -> Tensor:
        return tokens.float() if unit else normalize(tokens.float(), dim=-1)

    x_bounds, y_bounds, segments = x_offsets.tolist(), y_offsets.tolist(), len(x_offsets) - 1
    if among == "all" and equal_steps(x_bounds) and equal_steps(y_bounds) and len(x) <= ROWS * segments:
        rows, choices = (normed(tokens).unflatten(0, (segments, -1)) for tokens in (x, y))
        best = torch.bmm(rows, choices.transpose(1, 2)).max(-1)
        if segments > 1:
            return best.values.flatten(), (best.indices + y_offsets[:-1, None].to(y.device)).flatten()
        return best.values[0], best.indices[0]
    similarity, partner = [x.new_zeros(0, dtype=torch.float32)], [x.new_zeros(0, dtype=torch.int64)]
    for (x0, x1), (y0, y1) in zip(pairwise(x_bounds), pairwise(y_bounds), strict=True):
        choice = normed(y[y0:y1])
        tokens = choice if x is y else normed(x[x0:x1])
        column = torch.arange(y1 - y0, device=y.device)
        for start in range(0, x1 - x0, ROWS):
            cosine = tokens[start : start + ROWS] @ choice.T
            if among != "all":
                row = column[start : start + ROWS, None]
                cosine.masked_fill_(column == row if among == "others" else column <= row, -torch.inf)
            if y1 == y0:
                similarity.append(cosine.new_full((len(cosine),), -torch.inf))
                partner.append(column.new_full((len(cosine),), -1))
                continue
            best = cosine.max(1)
            similarity.append(best.values)
            position = best.indices + y0
            partner.append(position if among == "all" else position.where(best.values > -torch.inf, -1))
    return torch.cat(similarity), torch.cat(partner)


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    x, y, x_inverse, y_inverse, x_offsets, y_offsets, segments, x_stride, y_stride, width, similarity,
    partner, tokens,
    AMONG: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (tile of x, share of the columns): the best of its columns, written to [shares, ΣN]."""
    mine, first = segment_of(x_offsets, segments, tl.program_id(0), TILE, SEGMENTS)
    x_end = tl.load(x_offsets + mine + 1).to(tl.int64)
    y_begin = tl.load(y_offsets + mine).to(tl.int64)
    y_end = tl.load(y_offsets + mine + 1).to(tl.int64)
    if first < x_end:
        row = first + tl.arange(0, TILE)
        if not UNIT:
            x_norm = tl.load(x_inverse + row, mask=row < x_end, other=0.0)
        share = tl.cdiv(tl.cdiv(y_end - y_begin, TILE), tl.num_programs(1)) * TILE
        begin = y_begin + tl.program_id(1) * share
        end = tl.minimum(begin + share, y_end)
        if AMONG == "later":
            begin = tl.maximum(begin, first + 1)
        top = tl.full([TILE], float("-inf"), tl.float32)
        where = tl.full([TILE], -1, tl.int64)
        for start in range(begin, end, TILE):
            column = start + tl.arange(0, TILE)
            cosine = dots(x, row, row < x_end, x_stride, y, column, column < end, y_stride, width, TILE, TILE, WIDTH)
            if not UNIT:
                cosine *= x_norm[:, None] * tl.load(y_inverse + column, mask=column < end, other=0.0)[None, :]
            open = (column < end)[None, :]
            if AMONG == "others":
                open = open & (row[:, None] != column[None, :])
            if AMONG == "later":
                open = open & (row[:, None] < column[None, :])
            best, at = tl.max(tl.where(open, cosine, float("-inf")), 1, return_indices=True)
            where = tl.where(best > top, start + at, where)
            top = tl.maximum(best, top)
        slot = tl.program_id(1).to(tl.int64) * tokens + row
        tl.store(similarity + slot, top, mask=row < x_end)
        tl.store(partner + slot, where, mask=row < x_end)


def inverse_norms(x: Tensor) -> Tensor:
    """[ΣN] fp32, 1 / length of each token, clamped as in torch's normalize."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12).reciprocal()


def side_by_side(x: Tensor) -> Tensor:
    """x without its gradient, with every token contiguous, as `dots` reads it."""
    x = interpretable(x.detach())
    return x if x.stride(1) == 1 else x.contiguous()


def launch(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, among: Among = "all", unit: bool = False
) -> tuple[Tensor, Tensor]:
    """Launches the kernel: the contract of the definition without gradients, for the dtypes in DTYPES."""
    same = x is y
    x = side_by_side(x)
    y = x if same else side_by_side(y)
    norms, others = (x, y) if unit else (inverse_norms(x), None if same else inverse_norms(y))
    tokens, segments, blocks = len(x), len(x_offsets) - 1, dot_tiles(len(x), x.element_size())
    tile = blocks["TILE"]
    tiles = tokens // tile + segments
    shares = max(1, min(PROGRAMS // tiles, -(-len(y) // tile))) if tiles else 1
    similarity = torch.empty((shares, tokens), dtype=torch.float32, device=x.device)
    partner = torch.empty((shares, tokens), dtype=torch.int64, device=x.device)
    bounds = [offsets.to(x.device, non_blocking=True).contiguous() for offsets in (x_offsets, y_offsets)]
    if tokens:
        with torch.cuda.device_of(x):  # triton launches on the current device
            _nearest[(tiles, shares)](
                x, y, norms, norms if others is None else others, *bounds, segments, x.stride(0), y.stride(0),
                x.shape[1], similarity, partner, tokens,
                AMONG=among, UNIT=unit, **blocks, SEGMENTS=triton.next_power_of_2(segments),
            )  # fmt: skip
    if shares == 1:
        return similarity[0], partner[0]
    best = similarity.max(0, keepdim=True)  # the first of equal shares holds the lower positions
    return best.values[0], partner.gather(0, best.indices)[0]


def nearest_tokens(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, among: Among = "all", unit: bool = False
) -> tuple[Tensor, Tensor]:
    """(similarity, partner), see the top of the file. The similarity is differentiable.

    Raises:
        ValueError: x and y differ in width, x_offsets and y_offsets in number of segments, or, unless `among` is "all",
            x and y in number of tokens.
    """
    if x.shape[1] != y.shape[1] or len(x_offsets) != len(y_offsets) or (among != "all" and len(x) != len(y)):
        raise ValueError(
            f"x {tuple(x.shape)} in {len(x_offsets) - 1} segments, y {tuple(y.shape)} in {len(y_offsets) - 1}: widths "
            f"and segments have to agree, and for among={among!r} x is y"
        )
    fits = x.dtype == y.dtype and x.dtype in DTYPES and runs_triton(x, y)
    return (launch if fits else definition)(x, y, x_offsets, y_offsets, among, unit)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(n: list[int], m: list[int], width: int) -> Example:
        x, y = (torch.randn(sum(lengths), width, generator=generator) for lengths in (n, m))
        bounds = {f"{name}_offsets": torch.tensor([0, *lengths]).cumsum(0) for name, lengths in (("x", n), ("y", m))}
        return {"x": x, "y": y, **bounds}

    def alone(lengths: list[int], width: int, among: Among) -> Example:
        given = case(lengths, lengths, width)
        return {**given, "y": given["x"], "y_offsets": given["y_offsets"].int(), "among": among}

    yield case([], [], 3)
    yield case([0, 2, 5], [4, 0, 130], 70)
    thin = case([65, 1], [64, 1], 1)
    yield {**thin, "x": thin["x"].sign(), "y": thin["y"].sign()}
    yield case([3], [200], 130)
    level = case([40, 40, 40], [33, 33, 33], 20)
    yield level
    yield {**level, "x": normalize(level["x"], dim=-1), "y": normalize(level["y"], dim=-1), "unit": True}
    yield alone([1, 0, 129, 3], 40, "others")
    yield alone([1, 0, 129, 3], 40, "later")
    doubled = alone([70], 16, "others")
    # Pairs of equal tokens, and one pair of length 0. (Among three equal tokens, tiling decides which two are closer.)
    twice = doubled["x"][:35].repeat(2, 1).index_fill(0, torch.tensor([3, 38]), 0)
    yield {**doubled, "x": twice, "y": twice}
    strided = case([6, 9], [9, 6], 24)
    yield {
        **strided,
        "x": apart(strided["x"], 0, 1),
        "y": torch.nn.functional.pad(strided["y"], (3, 5), value=torch.nan)[:, 3:27],
    }
