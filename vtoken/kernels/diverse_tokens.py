"""Greedy maximum of a determinant (determinantal point process): relevant tokens that differ, all images at once.

    x          [ΣN, D]  tokens, packed over images, any length, any strides; fp16, bf16 or fp32 for the kernel
    relevance  [ΣN]     fp32, non-negative
    lengths    N_i, on the host
    counts     K_i, on the host, 0 <= K_i <= N_i
    index      [ΣK] int64, packed positions, image by image, in the order in which they were taken

The kernel matrix is K_ij = r_i cos(x_i, x_j) r_j. Each step takes the token with the largest part of K_ii that the
tokens taken so far do not explain, ties to the lower position; a remainder of at most EPSILON * K_ii counts as 0. fp32
throughout; NaN in x gives an undefined result.

Bytes moved: all cosines first, as `farthest_tokens`; choice i then reads i rows of the orthogonal basis that the
taken tokens span, so 2 * N * K² in all, by one program per image, and writes one. 576 -> 64 tokens: 4.7 MB. The
definition reads and writes the whole matrix per choice, in six launches. Limits are those of `farthest_tokens`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.kernels import _gram
from vtoken.kernels._dispatch import DTYPES, runs_triton, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, exact
from vtoken.kernels.farthest_tokens import checked, padded

tolerance = exact  # if no two candidates are within rounding of each other
EPSILON = 1e-6


def definition(x: Tensor, relevance: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """All images at once: each choice subtracts what it explains from the kernel matrices [images, longest,
    longest]."""
    if not sum(counts):
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    unit, r = padded(normalize(x.float(), dim=-1), lengths), padded(relevance, lengths)
    matrix = torch.bmm(unit, unit.transpose(1, 2)) * (r[:, :, None] * r[:, None])
    gain, none = matrix.diagonal(dim1=1, dim2=2), torch.zeros_like(r)
    gain.copy_(r.square())
    left, explained = gain, EPSILON * gain
    steps = []
    for _ in range(max(counts)):
        steps.append(best := left.max(1, keepdim=True))
        row = matrix.gather(1, best.indices[..., None].expand(-1, 1, r.shape[1]))
        matrix.baddbmm_(row.transpose(1, 2), row / best.values[..., None], alpha=-1)
        left = torch.where(gain > explained, gain, none)
    chosen, worth = (torch.cat([step[part] for step in steps], 1) for part in (1, 0))
    return packed(chosen, worth > 0, lengths, counts)


def packed(chosen: Tensor, worth: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[ΣK] packed positions of the first K_i `chosen` [images, most] of every image. Where nothing was left to gain
    (`worth` is False from then on), the first tokens not yet taken are used instead."""
    images, most = chosen.shape
    ends = torch.tensor([lengths, counts]).to(chosen.device, non_blocking=True)[:, :, None]
    worth = worth & (torch.arange(most, device=chosen.device) < ends[1])
    longest = max(lengths)
    taken = (torch.arange(longest + 1, device=chosen.device) >= ends[0]).scatter(1, chosen.where(worth, longest), True)
    free = taken.byte().sort(dim=1, stable=True).indices
    nth = (~worth).cumsum(1) - 1
    index = torch.where(worth, chosen, free.gather(1, nth.clamp(min=0))) + (ends[0].cumsum(0) - ends[0])
    return index[0] if images == 1 else torch.cat([row[:k] for row, k in zip(index, counts, strict=True)])


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    cosines, longest, relevance, offsets, slots, basis, index, epsilon, BLOCK: tl.constexpr
):
    """Program (image): takes one token after the other; its rows of the basis [ΣK, longest] are scratch space."""
    image = tl.program_id(0)
    begin = tl.load(offsets + image)
    n = tl.load(offsets + image + 1) - begin
    slot = tl.load(slots + image)
    end = tl.load(slots + image + 1)
    lane = tl.arange(0, BLOCK)
    real = lane < n
    r = tl.load(relevance + begin + lane, mask=real, other=0.0)
    gain = r * r
    explained = epsilon * gain
    taken = lane >= n
    for at in range(slot, end):
        best = tl.argmax(tl.where(taken, -1.0, gain), 0).to(tl.int64)
        tl.store(index + at, begin + best)
        taken = taken | (lane == best)
        left = tl.sum(tl.where(lane == best, gain, 0.0), 0)
        row = tl.load(cosines + (begin + best) * longest + lane, mask=real, other=0.0)
        row = r * tl.load(relevance + begin + best) * row
        for i in range(slot, at):
            earlier = tl.load(basis + i * longest + lane, mask=real, other=0.0)
            row -= earlier * tl.load(basis + i * longest + best)
        row = tl.where(left > 0, row / tl.sqrt(left), 0.0)
        tl.store(basis + at * longest + lane, row, mask=real)
        tl.debug_barrier()  # all threads read in the next round what one thread wrote
        gain -= row * row
        gain = tl.where(gain > explained, gain, 0.0)


def launch(x: Tensor, relevance: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Launches the kernels: the contract of the definition, for dtypes in DTYPES and sizes that pass `_gram.fits`;
    images go together as far as their cosines fit in memory."""
    taken = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for images, tokens in _gram.groups(lengths):
        sizes, longest = lengths[images], max(lengths[images], default=0)
        index = torch.empty(sum(counts[images]), dtype=torch.int64, device=x.device)
        if not len(index):
            continue
        cosines, block = _gram.cosines(x[tokens], sizes), triton.next_power_of_2(longest)
        basis = torch.empty((len(index), longest), dtype=torch.float32, device=x.device)
        offsets, slots = (_gram.bounds(each, x.device) for each in (sizes, counts[images]))
        with torch.cuda.device_of(x):  # triton launches on the current device
            _take[(len(sizes),)](
                cosines, longest, relevance[tokens].float().contiguous(), offsets, slots, basis, index, EPSILON,
                BLOCK=block, num_warps=_gram.warps(block),
            )  # fmt: skip
        taken.append(index + tokens.start)
    return torch.cat(taken)


def diverse_tokens(x: Tensor, relevance: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[ΣK] packed positions in the order taken, see the top of the file. No host synchronisation.

    Raises ValueError if counts and lengths differ in number, or if a count is below 0 or above N_i.
    """
    checked(lengths, counts, len(lengths))
    x, relevance = x.detach(), relevance.detach()
    triton_fits = x.dtype in DTYPES and _gram.fits(lengths) and runs_triton(x, relevance)
    return (launch if triton_fits else definition)(x, relevance, lengths, counts)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(lengths: list[int], counts: list[int], width: int) -> Example:
        x = torch.randn(sum(lengths), width, generator=generator)
        relevance = torch.rand(sum(lengths), generator=generator) + 0.1
        return {"x": x, "relevance": relevance, "lengths": lengths, "counts": counts}

    yield case([], [], 4)
    yield case([0, 3], [0, 0], 4)
    yield case([1, 70, 0, 5, 33], [1, 21, 0, 5, 2], 80)
    # The first token explains its copies at once; they are then taken by position.
    copies = case([9], [7], 16)
    yield {**copies, "x": copies["x"][[0, 1, 0, 2, 0, 0, 3, 0, 0]], "relevance": torch.ones(9)}
    strided = case([40], [9], 33)
    yield {**strided, "x": apart(strided["x"], 0, 1)}
