"""Greedy choice of tokens that are dissimilar, one after the other, for all images in one launch.

    x         [ΣN, D]   tokens, packed over images, any length, any strides; fp16, bf16 or fp32 for the kernel
    lengths   N_i, on the host
    counts    K_i, on the host, 0 <= K_i <= N_i
    first     [images] int64, packed position of the token that each image starts with; any value if K_i is 0. None:
              the token whose highest cosine to any other is lowest
    strategy  "max_min": the next token is the one whose highest cosine to those taken is lowest; "max_sum": the one
              with the lowest sum of cosines to them. Ties to the lower position; no token is taken twice
    worth     [ΣN] fp32, non-negative, or None. With "max_min": the next (and first) token is the one for which worth *
              (1 - highest cosine) is largest
    index     [ΣK] int64, packed positions, image by image, in the order in which they were taken

fp32 accumulation; a token of length 0 has cosine 0 with everything. NaN in x gives an undefined result.

Bytes moved, e bytes per number: the kernels compute all cosines first, each pair once (N² * D FLOPs), and write 4 *
N² of them, which is read once without `first`; each choice then reads one row, 4 * N, by one program per image that
keeps its N distances in registers. 2880 -> 320 tokens, 4096 wide: 34 GFLOP, 33 MB of cosines, 3.7 MB of rows. The
definition does 2 * N * K * D FLOPs instead, reads x K times (15 GB in fp32) and takes five launches per choice,
whatever the number of images.

Without the cosines every choice would read x whole, e * N * D * K in all (7.5 GB in bf16, over a millisecond from L2 at
some 6 TB/s), and wait for the whole grid; the cosines take a tenth of a millisecond at 400 TFLOP/s, and are cheaper
while N / K is below some 130. The price is memory: images are processed in groups whose cosines fit in 512 MiB. An
image that does not fit alone, or has more than 16384 tokens, takes the definition.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from vtoken.kernels import _gram
from vtoken.kernels._dispatch import DTYPES, runs_triton, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, exact
from vtoken.kernels._tiles import segment_of
from vtoken.kernels.nearest_tokens import ROWS

tolerance = exact  # if no two candidates are within rounding of each other
Strategy = Literal["max_min", "max_sum"]
ROW = 1024  # cosines that one program reads at a time


def definition(
    x: Tensor, lengths: Sequence[int], counts: Sequence[int], first: Tensor | None = None,
    strategy: Strategy = "max_min", worth: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All images at once, padded to the longest, in a loop over choices, because each needs the one before. Computes
    one row of cosines per image at a time, and cuts off what an image chooses beyond its count."""
    if not sum(counts):
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    unit = padded(normalize(x.float(), dim=-1), lengths)
    longest = unit.shape[1]
    bounds = _gram.bounds(lengths, x.device)[:, None]
    starts = bounds[:-1]
    beyond = torch.where(torch.arange(longest, device=x.device) < bounds[1:] - starts, 0.0, torch.inf)
    worth = None if worth is None else padded(worth.float(), lengths)
    lonely = _ranks(_closest_of(unit, beyond), worth) if first is None else beyond
    best = lonely.argmin(1, keepdim=True) if first is None else (first[:, None] - starts).clamp(0, longest - 1)
    taken, near = [best], beyond + _cosines(unit, best)
    while len(taken) < max(counts):
        near.scatter_(1, best, torch.inf)
        taken.append(best := _ranks(near, worth).argmin(1, keepdim=True))
        more = _cosines(unit, best)
        near = near + more if strategy == "max_sum" else near.maximum(more)
    index = torch.cat(taken, 1) + starts
    return torch.cat([row[:k] for row, k in zip(index, counts, strict=True)])


def padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed [ΣN, ...] as [images, longest, ...], padded with zeros."""
    if len(set(lengths)) == 1:
        return x.unflatten(0, (len(lengths), -1))
    return pad_sequence(x.split(list(lengths)), batch_first=True)


def _cosines(unit: Tensor, best: Tensor) -> Tensor:
    """[images, longest] cosines of all tokens with the one at `best` [images, 1]."""
    row = unit.gather(1, best[..., None].expand(-1, 1, unit.shape[2]))
    return torch.bmm(row, unit.transpose(1, 2))[:, 0]


def _ranks(near: Tensor, worth: Tensor | None) -> Tensor:
    """[images, longest] ranks, the lowest taken first: the cosines `near`, or `worth` times near - 1, which is
    minus the distance; inf stays."""
    return near if worth is None else torch.where(near < torch.inf, worth * (near - 1).clamp(min=-2), near)


def _closest_of(unit: Tensor, beyond: Tensor) -> Tensor:
    """[images, longest] cosine of every token to its nearest neighbour, ROWS tokens at a time; `beyond` is inf at
    padding."""
    closest = []
    for start in range(0, unit.shape[1], ROWS):
        cosine = torch.bmm(unit[:, start : start + ROWS], unit.transpose(1, 2)) - beyond[:, None]
        cosine.diagonal(start, 1, 2).fill_(-torch.inf)
        closest.append(cosine.amax(2))
    return torch.cat(closest, 1) + beyond


@triton.jit
def _closest(  # type: ignore[no-untyped-def]
    cosines, longest, offsets, segments, closest, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Program (token): its highest cosine to another token of its image."""
    mine, row = segment_of(offsets, segments, tl.program_id(0), 1, SEGMENTS)
    begin = tl.load(offsets + mine).to(tl.int64)
    n = tl.load(offsets + mine + 1).to(tl.int64) - begin
    if row < begin + n:
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, n, BLOCK):
            lane = start + tl.arange(0, BLOCK)
            other = (lane < n) & (lane != row - begin)
            best = tl.maximum(best, tl.load(cosines + row * longest + lane, mask=other, other=float("-inf")))
        tl.store(closest + row, tl.max(best, 0))


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    cosines, longest, offsets, slots, first, closest, worth, index,
    GIVEN: tl.constexpr, SUM: tl.constexpr, WORTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (image): takes one token after the other. The row of the last token is never needed."""
    image = tl.program_id(0)
    begin = tl.load(offsets + image)
    n = tl.load(offsets + image + 1) - begin
    slot = tl.load(slots + image)
    end = tl.load(slots + image + 1)
    lane = tl.arange(0, BLOCK)
    weight = tl.load(worth + begin + lane, mask=lane < n, other=0.0) if WORTH else 1.0
    if slot < end:
        if GIVEN:
            best = tl.load(first + image) - begin
        else:
            rank = tl.load(closest + begin + lane, mask=lane < n, other=float("inf"))
            if WORTH:
                rank = tl.where(rank < float("inf"), weight * tl.maximum(rank - 1, -2.0), rank)
            best = tl.argmin(rank, 0).to(tl.int64)
        tl.store(index + slot, begin + best)
        near = tl.load(cosines + (begin + best) * longest + lane, mask=lane < n, other=float("inf"))
        for at in range(slot + 1, end):
            near = tl.where(lane == best, float("inf"), near)
            rank = near
            if WORTH:
                rank = tl.where(near < float("inf"), weight * tl.maximum(near - 1, -2.0), near)
            best = tl.argmin(rank, 0).to(tl.int64)
            tl.store(index + at, begin + best)
            more = tl.load(cosines + (begin + best) * longest + lane, mask=lane < n, other=float("inf"))
            if SUM:
                near += more
            else:
                near = tl.maximum(near, more)


def launch(
    x: Tensor, lengths: Sequence[int], counts: Sequence[int], first: Tensor | None = None,
    strategy: Strategy = "max_min", worth: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernels: the contract of the definition, for dtypes in DTYPES and sizes that pass `_gram.fits`;
    images go together as far as their cosines fit in memory."""
    taken = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for images, tokens in _gram.groups(lengths):
        sizes, most = lengths[images], max(lengths[images], default=0)
        index = torch.empty(sum(counts[images]), dtype=torch.int64, device=x.device)
        if not len(index):
            continue
        cosines, block, segments = _gram.cosines(x[tokens], sizes), triton.next_power_of_2(most), len(sizes)
        offsets, slots = (_gram.bounds(each, x.device) for each in (sizes, counts[images]))
        start = offsets if first is None else (first[images] - tokens.start).contiguous()
        closest = cosines if worth is None else worth[tokens].float().contiguous()
        weights = closest
        with torch.cuda.device_of(x):  # triton launches on the current device
            if first is None:
                closest = torch.empty(len(cosines), dtype=torch.float32, device=x.device)
                _closest[(len(cosines) + segments,)](
                    cosines, most, offsets, segments, closest,
                    BLOCK=min(block, ROW), SEGMENTS=triton.next_power_of_2(segments),
                )  # fmt: skip
            _take[(segments,)](
                cosines, most, offsets, slots, start, closest, weights, index,
                GIVEN=first is not None, SUM=strategy == "max_sum", WORTH=worth is not None, BLOCK=block,
                num_warps=_gram.warps(block),
            )  # fmt: skip
        taken.append(index + tokens.start)
    return torch.cat(taken)


def farthest_tokens(
    x: Tensor, lengths: Sequence[int], counts: Sequence[int], first: Tensor | None = None,
    strategy: Strategy = "max_min", worth: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[ΣK] packed positions in the order taken, see the top of the file. No host synchronisation.

    Raises ValueError if counts, lengths and first differ in number, if a count is below 0 or above N_i, if x and worth
    differ in number, or if worth is given for "max_sum".
    """
    checked(lengths, counts, len(lengths) if first is None else len(first))
    if worth is not None and (strategy != "max_min" or len(worth) != len(x)):
        raise ValueError(f"worth of {len(worth)} tokens for {len(x)}, {strategy}: one each, for max_min only")
    given = [t.detach() for t in (x, first, worth) if t is not None]
    triton_fits = x.dtype in DTYPES and _gram.fits(lengths) and runs_triton(*given)
    return (launch if triton_fits else definition)(x.detach(), lengths, counts, first, strategy, worth)


def checked(lengths: Sequence[int], counts: Sequence[int], given: int) -> None:
    """Raises ValueError if these do not fit together; `given` is the number of first tokens."""
    if not len(lengths) == len(counts) == given:
        raise ValueError(f"{len(lengths)} images, {len(counts)} counts, {given} first tokens: need as many of each")
    for image, (n, k) in enumerate(zip(lengths, counts, strict=True)):
        if not 0 <= k <= n:
            raise ValueError(f"image {image}: cannot keep {k} of {n} tokens")


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(lengths: list[int], counts: list[int], width: int, strategy: Strategy, first: int) -> Example:
        x = torch.randn(sum(lengths), width, generator=generator)
        starts = torch.tensor(
            [end - n + first % max(1, n) for end, n in zip(accumulate(lengths), lengths, strict=True)]
        )
        given = {"x": x, "lengths": lengths, "counts": counts}
        return {**given, "first": starts.long(), "strategy": strategy}

    yield case([], [], 4, "max_min", 0)
    yield case([0, 3], [0, 0], 4, "max_sum", 0)
    yield {**case([0, 1, 68, 40, 9], [0, 1, 10, 1, 0], 20, "max_min", 0), "first": None}
    for strategy in ("max_min", "max_sum"):
        yield case([1, 70, 0, 5, 33], [1, 21, 0, 5, 2], 80, strategy, first=7)
    # Cosines of 0 and 1 only, so ties everywhere; one token has length 0.
    corners = torch.eye(6)[[0, 1, 2, 0, 3, 1, 4, 5, 0]] * torch.tensor([1, 2, 4, 2, 0, 1, 1, 4, 1])[:, None]
    for strategy in ("max_min", "max_sum"):
        yield {**case([9], [9], 6, strategy, first=5), "x": corners}  # type: ignore[arg-type]
    valued = case([1, 70, 0, 5, 33], [1, 21, 0, 5, 2], 80, "max_min", first=7)
    yield {**valued, "worth": torch.rand(109, generator=generator)}
    yield {**valued, "first": None, "worth": torch.rand(109, generator=generator)}
    strided = case([40], [9], 33, "max_sum", first=39)
    yield {**strided, "x": apart(strided["x"], 0, 1)}
