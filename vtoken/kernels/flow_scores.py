"""FlowCut's three criteria in one score: (attention / its sum + relevance / its sum) * L1 norm of the value.

    attention  [ΣN]     non-negative; real dtype, fp16, bf16 or fp32 for the kernel
    relevance  [ΣN]     likewise, or None to leave it out
    value      [ΣN, d]  values averaged over heads, any strides
    offsets    [S + 1] int32 or int64, 0 = first, ascending, last = ΣN: segments, scored independently; may be empty
    result     [ΣN] fp32; sums are over the segment; a share of a sum of 0 is 0

Bytes moved, e bytes per element: e * ΣN * d of values read once, e * ΣN of attention and relevance read by every tile
of 64 tokens of the segment (L2: a few KB), 4 * ΣN written. One launch, where the definition takes about twelve and
writes and reads |value| in between. fp32 accumulation.
"""

import torch
from torch import Tensor

from vtoken.kernels._dispatch import DTYPES, equal_steps, interpretable, runs_triton, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, within
from vtoken.kernels._tiles import segment_of

tolerance = within((1e-5, 1e-7))  # the order of fp32 sums differs
TINY = torch.finfo(torch.float32).tiny


def definition(attention: Tensor, relevance: Tensor | None, value: Tensor, offsets: Tensor) -> Tensor:
    """Sums over segments, expanded to the tokens again; segments of equal length, if the host knows them, as rows."""
    if offsets.device.type == "cpu" and equal_steps(offsets.tolist()):
        shares = torch.stack([attention] if relevance is None else [attention, relevance]).float()
        rows = shares.unflatten(1, (len(offsets) - 1, -1))
        flow = (rows / rows.sum(-1, keepdim=True).clamp(min=TINY)).sum(0).flatten()
        return flow * torch.linalg.vector_norm(value.float(), 1, -1)
    lengths = offsets.to(value.device, torch.int64, non_blocking=True).diff()

    def share(x: Tensor) -> Tensor:
        x = x.float()
        total = torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True).clamp(min=TINY)
        return x / total.repeat_interleave(lengths, output_size=len(x))

    flow = share(attention) if relevance is None else share(attention) + share(relevance)
    return flow * value.float().abs().sum(-1)


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    attention, relevance, value, offsets, segments, strides, d, tiny, result,
    BOTH: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens): the sums over its segment, then the scores of its tokens."""
    mine, first = segment_of(offsets, segments, tl.program_id(0), TILE, SEGMENTS)
    begin = tl.load(offsets + mine).to(tl.int64)
    end = tl.load(offsets + mine + 1).to(tl.int64)
    if first < end:
        seen = tl.zeros([BLOCK], tl.float32)
        related = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            seen += tl.load(attention + at * strides[0], mask=at < end, other=0.0).to(tl.float32)
            if BOTH:
                related += tl.load(relevance + at * strides[1], mask=at < end, other=0.0).to(tl.float32)
        token = first + tl.arange(0, TILE)
        flow = tl.load(attention + token * strides[0], mask=token < end, other=0.0).to(tl.float32)
        flow = flow / tl.maximum(tl.sum(seen, 0), tiny)
        if BOTH:
            more = tl.load(relevance + token * strides[1], mask=token < end, other=0.0).to(tl.float32)
            flow += more / tl.maximum(tl.sum(related, 0), tiny)
        dim = tl.arange(0, DIM)
        density = tl.zeros([TILE], tl.float32)
        for start in range(0, d, DIM):
            address = token[:, None] * strides[2] + (start + dim)[None, :] * strides[3]
            inside = (token < end)[:, None] & (start + dim < d)[None, :]
            density += tl.sum(tl.abs(tl.load(value + address, mask=inside, other=0.0).to(tl.float32)), 1)
        tl.store(result + token, flow * density, mask=token < end)


def launch(attention: Tensor, relevance: Tensor | None, value: Tensor, offsets: Tensor) -> Tensor:
    """Launches the kernel: the contract of the definition without gradients, for the dtypes in DTYPES."""
    given = [interpretable(t.detach()) for t in (attention, attention if relevance is None else relevance, value)]
    tokens, segments = len(value), len(offsets) - 1
    result = torch.empty(tokens, dtype=torch.float32, device=value.device)
    bounds = offsets.to(value.device, non_blocking=True).contiguous()
    strides = (given[0].stride(0), given[1].stride(0), *given[2].stride())
    if tokens:
        with torch.cuda.device_of(value):  # triton launches on the current device
            _score[(tokens // 64 + segments,)](
                *given, bounds, segments, strides, value.shape[1], TINY, result,
                BOTH=relevance is not None, TILE=64, DIM=64, BLOCK=1024, SEGMENTS=triton.next_power_of_2(segments),
            )  # fmt: skip
    return result


def flow_scores(attention: Tensor, relevance: Tensor | None, value: Tensor, offsets: Tensor) -> Tensor:
    """Scores of all tokens, see the top of the file. Differentiable. No host synchronisation."""
    given = [attention, value] if relevance is None else [attention, relevance, value]
    fits = all(t.dtype in DTYPES for t in given) and runs_triton(*given)
    return (launch if fits else definition)(attention, relevance, value, offsets)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(lengths: list[int], d: int, both: bool = True) -> Example:
        n = sum(lengths)
        attention, relevance = torch.rand(2, n, generator=generator)
        given = {"attention": attention, "relevance": relevance if both else None}
        value = torch.randn(n, d, generator=generator)
        return {**given, "value": value, "offsets": torch.tensor([0, *lengths]).cumsum(0).int()}

    yield case([], 4)
    yield case([0, 1, 0, 65, 3], 64)
    yield case([577], 80, both=False)
    yield case([1030, 5], 1)
    strided = case([7, 9], 128)
    zeros = strided["relevance"].clone()
    zeros[:7] = 0
    yield {**strided, "relevance": zeros.repeat_interleave(2)[::2], "value": apart(strided["value"], 0, 1)}
