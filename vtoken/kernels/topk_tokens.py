"""Exact top-k per image over ragged packed scores, in reading order.

    scores   [ΣN], any stride; fp16, bf16 or fp32 for the kernel, any real dtype for the definition
    offsets  [images + 1] int32 or int64, 0 = first, ascending, last = ΣN; empty images allowed
    counts   [images] int, list or tensor, 0 <= counts[i] <= N_i
    index    [ΣK] int64, positions on the packed axis, ascending within each image and so overall

Ties go to the lower position; -0.0 equals 0.0. NaN ranks below everything, -inf included, and all NaNs are equal: they
are taken only if an image has fewer than k other scores, the first ones first.

Bytes moved, e bytes per score: e * ΣN read from device memory, 8 * ΣK of index written, 24 bytes per image of bounds.
The kernel goes over its image's scores 34 times (32 bits of bisection, a count, a compaction); all passes but the first
read from cache (16384 fp32 scores are 64 KB). One launch. The definition sorts twice, in some ten launches.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtoken.kernels._dispatch import DTYPES, interpretable, runs_triton, tl, triton
from vtoken.kernels._examples import Examples, exact

tolerance = exact


def definition(scores: Tensor, offsets: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """A stable sort by score, then by image. Synchronises only if counts are on a device."""
    wanted, device = _on_host(counts, offsets), scores.device
    # An ascending sort of negated scores puts NaN last; 0 - x makes -0.0 and 0.0 equal.
    key = 0 - (scores if scores.is_floating_point() else scores.double())
    if device.type != "cpu":  # a radix sort would put negative NaN first
        key = key.masked_fill(key.isnan(), torch.nan)
    ranked = key.sort(stable=True).indices
    if len(wanted) == 1:
        return ranked[: wanted[0]].sort().values
    owner = np.repeat(np.arange(len(wanted)), wanted)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    if offsets.device.type == "cpu":
        bounds = np.array(offsets.tolist())
        image = uploaded(np.repeat(np.arange(len(wanted)), np.diff(bounds)), device)
        at = uploaded(bounds[owner] + rank, device)
    else:
        image = torch.bucketize(torch.arange(len(scores), device=device), offsets[1:], right=True)
        at = offsets[:-1].long()[uploaded(owner, device)] + uploaded(rank, device)
    return ranked[image[ranked].sort(stable=True).indices][at].sort().values


def uploaded(values: Any, device: torch.device) -> Tensor:
    """A numpy array on the device; the host does not wait for the copy."""
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)


@triton.jit
def _keys(scores, position, inside, stride):  # type: ignore[no-untyped-def]
    """uint32 keys in the order of the scores; 0 stands for NaN and padding only (-inf is 0x7fffff)."""
    value = tl.load(scores + position * stride, mask=inside, other=float("nan")).to(tl.float32)
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits).to(tl.uint32)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(value == value, key, 0).to(tl.uint32)


@triton.jit
def _select(scores, offsets, starts, index, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (image): finds the k-th largest key bit by bit, then writes the positions above it and of the first
    ties."""
    image = tl.program_id(0)
    begin = tl.load(offsets + image).to(tl.int64)
    n = (tl.load(offsets + image + 1).to(tl.int64) - begin).to(tl.int32)
    slot = tl.load(starts + image)
    k = (tl.load(starts + image + 1) - slot).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    # The largest threshold that at least k keys reach. A trial is never 0, so padding never counts.
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = threshold | bit
        reached = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            i = start + lane
            reached += (_keys(scores, begin + i, i < n, stride) >= trial).to(tl.int32)
        threshold = tl.where(tl.sum(reached, 0) >= k, trial, threshold)
        bit = bit >> 1

    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + lane
        above += (_keys(scores, begin + i, i < n, stride) > threshold).to(tl.int32)
    ties_left = k - tl.sum(above, 0)

    for start in range(0, n, BLOCK):
        i = start + lane
        key = _keys(scores, begin + i, i < n, stride)
        tie = ((key == threshold) & (i < n)).to(tl.int32)
        take = (key > threshold) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties_left))
        taken = take.to(tl.int32)
        tl.store(index + slot + tl.cumsum(taken, 0) - 1, begin + i, mask=take)
        slot += tl.sum(taken, 0)
        ties_left -= tl.sum(tie, 0)


def _on_host(counts: Sequence[int] | Tensor, offsets: Tensor) -> list[int]:
    """counts as a list; counts on a device are fetched, which is the only synchronisation in this file."""
    wanted: list[int] = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(wanted) != len(offsets) - 1:
        raise ValueError(f"{len(wanted)} counts for {len(offsets) - 1} images")
    # Offsets on a device are not fetched for this check; then only negative counts are found.
    ends = offsets.tolist() if offsets.device.type == "cpu" else list(accumulate(wanted, initial=0))
    lengths = [end - begin for begin, end in pairwise(ends)]
    for image, (k, n) in enumerate(zip(wanted, lengths, strict=True)):
        if not 0 <= k <= n:
            raise ValueError(f"image {image}: cannot keep {k} of {n} tokens")
    return wanted


def launch(scores: Tensor, offsets: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """Launches the kernel: the contract of the definition, for the dtypes in DTYPES."""
    ends = list(accumulate(_on_host(counts, offsets), initial=0))
    index = torch.empty(ends[-1], dtype=torch.int64, device=scores.device)
    if ends[-1]:
        # A plain copy of a list to a device waits for the stream; a non_blocking copy does not.
        starts = torch.tensor(ends, dtype=torch.int64).to(scores.device, non_blocking=True)
        bounds = offsets.to(scores.device, non_blocking=True).contiguous()
        values = interpretable(scores.detach())
        block = max(128, min(2048, triton.next_power_of_2(len(scores))))
        with torch.cuda.device_of(scores):  # triton launches on the current device
            _select[(len(ends) - 1,)](values, bounds, starts, index, values.stride(0), BLOCK=block)
    return index


def topk_tokens(scores: Tensor, offsets: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """Positions of the ``counts[i]`` highest scores of image i, see the top of the file.

    No host synchronisation unless counts is on a device. Raises ValueError if counts and images differ in number, if a
    count is negative or, with offsets on the CPU, above N_i; with offsets on a device, the latter gives an undefined
    result.
    """
    fits = scores.dtype in DTYPES and runs_triton(scores.detach())
    return launch(scores, offsets, counts) if fits else definition(scores, offsets, counts)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    inf, nan = float("inf"), float("nan")
    yield {"scores": torch.empty(0), "offsets": torch.tensor([0]), "counts": []}
    yield {"scores": torch.empty(0), "offsets": torch.tensor([0, 0, 0]), "counts": [0, 0]}
    one = torch.tensor([0, 1, 1], dtype=torch.int32)
    yield {"scores": torch.tensor([nan]), "offsets": one, "counts": torch.tensor([1, 0])}
    yield {"scores": torch.randn(577, generator=generator), "offsets": torch.tensor([0, 577]), "counts": [64]}
    odd = torch.tensor([nan, -inf, 0.0, -0.0, inf, nan, -inf, 1e-40, -1e-7, -nan])
    for k in (0, 3, 4, 6, 10):
        yield {"scores": odd, "offsets": torch.tensor([0, 10]), "counts": [k]}
    few_values = torch.randint(-2, 3, (3001,), generator=generator).float()
    ragged = torch.tensor([0, 0, 1, 578, 578, 2602, 3001])
    yield {"scores": few_values, "offsets": ragged, "counts": [0, 1, 100, 0, 2024, 0]}
    yield {"scores": few_values.repeat(2)[::2], "offsets": torch.tensor([0, 1024, 3001]), "counts": [1, 1500]}
    yield {"scores": torch.rand(16385, generator=generator), "offsets": torch.tensor([0, 16385]), "counts": [4097]}
