"""Weighted mean of the tokens that share a slot; ToMe calls it merging by size.

    x       [ΣN, ...]  packed tokens, any trailing shape, dtype and strides
    into    [ΣN] int64 slot of each token, 0 <= slot < slots, or -1: dropped
    slots   ΣK, on the host
    weight  [ΣN] weight of each token, or None for equal weights
    total   [ΣK] fp32 `totals` of these, if known already and no token is dropped
    result  [ΣK, ...] dtype of x: sum of weight * token over the slot's members, divided by the sum of their weights;
            NaN for a slot without members or without weight

fp32 accumulation. Slots are packed, so images may be ragged: nothing here depends on where one ends.

Bytes moved, R the bytes of a token: R per member read, R per slot written, and some 50 bytes per token of sorting,
which puts the members of a slot side by side. Every slot is summed by one program, in the order of its tokens, so the
result is the same in every run. The definition writes and reads fp32 products of all members and adds them up, on a
GPU with atomics, in any order.
"""

import math

import torch
from torch import Tensor

from vtoken.kernels._dispatch import DTYPES, interpretable, runs_triton, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, within

# Sums of a few tokens in fp32, rounded once to the dtype of x.
tolerance = within((1e-5, 1e-5), half=(2e-3, 1e-5), bf16=(1e-2, 1e-5))


def totals(into: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """[ΣK] fp32 sum of the weights of each slot's members; `into` is `slots` for tokens that belong to none."""
    each = torch.ones(len(into), device=into.device) if weight is None else weight.float()
    return each.new_zeros(slots + 1).index_add_(0, into, each)[:slots]


def definition(
    x: Tensor, into: Tensor, slots: int, weight: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """index_add with one extra slot, which takes the dropped tokens."""
    slot = into.remainder(slots + 1) if total is None else into
    total = totals(slot, slots, weight) if total is None else total
    flat = x.reshape(len(x), math.prod(x.shape[1:])).float()
    weighted = flat if weight is None else flat * weight.float()[:, None]
    mean = flat.new_zeros(slots + 1, flat.shape[1]).index_add_(0, slot, weighted)[:slots]
    return (mean / total[:, None]).to(x.dtype).view(slots, *x.shape[1:])


@triton.jit
def _means(  # type: ignore[no-untyped-def]
    x, order, ends, weight, stride, width, result, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (slot, block of numbers)."""
    slot = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = 0.0
    mean = tl.zeros([BLOCK], tl.float32)
    for member in range(tl.load(ends + slot), tl.load(ends + slot + 1)):
        token = tl.load(order + member)
        each = 1.0
        if WEIGHTED:
            each = tl.load(weight + token).to(tl.float32)
        mean += each * tl.load(x + token * stride + at, mask=at < width, other=0.0).to(tl.float32)
        total += each
    tl.store(result + slot * width + at, mean / total, mask=at < width)


def launch(x: Tensor, into: Tensor, slots: int, weight: Tensor | None = None, total: Tensor | None = None) -> Tensor:
    """Launches the kernel: the contract of the definition without gradients, for the dtypes in DTYPES."""
    dtype, x = x.dtype, interpretable(x.detach())
    width = math.prod(x.shape[1:])
    rows = x.reshape(len(x), width)
    rows = rows if width == 1 or rows.stride(1) == 1 else rows.contiguous()
    result = torch.empty((slots, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if result.numel():
        in_order = into.sort(stable=True)
        ends = torch.searchsorted(in_order.values, torch.arange(slots + 1, device=x.device))
        weights = x if weight is None else interpretable(weight.detach()).contiguous()
        block = min(1024, triton.next_power_of_2(width))
        with torch.cuda.device_of(x):  # triton launches on the current device
            _means[(slots, -(-width // block))](
                rows, in_order.indices, ends, weights, rows.stride(0), width, result,
                WEIGHTED=weight is not None, BLOCK=block,
            )  # fmt: skip
    return result.to(dtype)


def merge_tokens(
    x: Tensor, into: Tensor, slots: int, weight: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """[ΣK, ...] means, see the top of the file. Differentiable. No host synchronisation.

    A slot that is out of range gives an undefined result; on the CPU it raises IndexError.
    """
    given = (x, into) if weight is None else (x, into, weight)
    fits = x.dtype in DTYPES and runs_triton(*given)
    return (launch if fits else definition)(x, into, slots, weight, total)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(slots: int, n: int, *shape: int, weighted: bool = True) -> Example:
        into = torch.cat([torch.arange(slots), torch.randint(-1, max(1, slots), (n - slots,), generator=generator)])
        weight = torch.rand(n, generator=generator) + 0.1 if weighted else None
        return {"x": torch.randn(n, *shape, generator=generator), "into": into, "slots": slots, "weight": weight}

    yield case(0, 0, 3)
    yield {**case(1, 5, 7), "into": torch.tensor([-1, 0, -1, 0, 0])}
    yield case(70, 577, 33)
    yield case(3, 9, 2, 5, weighted=False)
    yield case(2, 6)
    yield case(4, 11, 1100)
    whole = case(6, 40, 5)
    into = whole["into"].clamp(min=0)
    yield {**whole, "into": into, "total": totals(into, 6, whole["weight"])}
    strided = case(5, 40, 8)
    yield {**strided, "x": apart(strided["x"], 0, 1), "weight": strided["weight"].repeat_interleave(2)[::2]}
    # Slot 1 has no members, and a dropped NaN must not reach any mean.
    lonely = torch.tensor([0, 2, -1, 2])
    yield {"x": torch.tensor([[1.0], [2.0], [float("nan")], [4.0]]), "into": lonely, "slots": 3, "weight": None}
