"""Whether a kernel gives what its definition does, on what is measured: the same tokens, dtype and tiles.

Where the result is a choice among many, a last bit of a cosine decides between two that are as good, and everything
after it differs. Such a choice is checked against what it has to be: as good as the best there was, within a tolerance.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import DEVICE, DTYPE
from torch import Tensor
from torch.nn.functional import normalize

from vtoken import kernels

GREEDY = ("diverse_tokens", "farthest_tokens")
# Of a cosine; of a gain, relative. At 2880 -> 320 tokens of 4096 numbers fp32 sums stay below 1e-6, cosines rounded to
# bf16 come to 2e-4 and 7e-5.
COSINE, GAIN = 1e-5, 1e-5


def agree(name: str, given: dict[str, Any]) -> None:
    """AssertionError where kernel and definition differ."""
    op: Any = kernels.ops()[name]
    got = op.launch(**given)
    if name in GREEDY:
        short = (farthest if name == "farthest_tokens" else diverse)(index=got, **given)
        assert short <= (COSINE if name == "farthest_tokens" else GAIN), f"a token falls short of the best by {short:g}"
        exactly(op)
        return
    want = op.definition(**given)
    if name == "nearest_tokens":
        (want, _), (got, partner) = want, got
        x, y = (normalize(given[t].float(), dim=-1) for t in ("x", "y"))
        torch.testing.assert_close((x * y[partner]).sum(-1), got, rtol=0, atol=COSINE)
    relative, absolute = op.tolerance(DTYPE)
    torch.testing.assert_close(got, want, rtol=relative, atol=absolute, equal_nan=True)


def exactly(op: Any) -> None:
    """The op's own examples in fp32, where no two candidates are that close."""
    for example in op.examples():
        given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in example.items()}
        assert torch.equal(op.launch(**given), op.definition(**given)), f"{op.__name__} differs from its definition"


def farthest(index: Tensor, x: Tensor, first: Tensor, strategy: str, **_: Any) -> float:
    """By how much the highest cosine of a chosen token was above the lowest there was, at most; one image. Infinite
    where a token is chosen twice, or the first is not the given one."""
    unit = normalize(x.double(), dim=-1)
    cosines, short = unit[index] @ unit.T, torch.zeros((), dtype=torch.float64, device=x.device)
    near = cosines[0].index_fill(0, index[:1], torch.inf)
    for step, chosen in enumerate(index[1:], 1):
        short = torch.maximum(short, near[chosen] - near.min())
        near = near + cosines[step] if strategy == "max_sum" else near.maximum(cosines[step])
        near = near.index_fill(0, chosen[None], torch.inf)
    return float(short) if torch.equal(index[:1], first) else torch.inf


def diverse(index: Tensor, x: Tensor, relevance: Tensor, **_: Any) -> float:
    """By which share the gain of a chosen token was below the highest there was, at most; one image. Infinite where a
    token is chosen twice."""
    unit, r = normalize(x.double(), dim=-1), relevance.double()
    gain, basis = r.square(), unit.new_zeros(len(index), len(unit))
    short = torch.zeros((), dtype=torch.float64, device=x.device)
    for step, chosen in enumerate(index):
        best = gain.max()
        short = torch.maximum(short, (best - gain[chosen]) / best)
        row = r * r[chosen] * (unit @ unit[chosen]) - basis[:step].T @ basis[:step, chosen]
        basis[step] = row * gain[chosen].rsqrt()
        gain = (gain - basis[step].square()).index_fill(0, chosen[None], -torch.inf)
    return float(short)
