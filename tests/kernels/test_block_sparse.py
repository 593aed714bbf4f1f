"""block_sparse_attention against an independent definition, one query at a time in float64, and against what must hold
of any lists."""

from __future__ import annotations

import math

import pytest
import torch

from vtoken import kernels
from vtoken.kernels import block_sparse_attention

EXAMPLES = list(kernels.ops()["block_sparse_attention"].examples())


@pytest.fixture(autouse=True)
def definition():
    with kernels.use("torch"):
        yield


def one_by_one(q, k, v, read, scale, size=128, columns=None, share=1, rows=None, of=None):
    """Query by query: the set of keys it sees, their softmax, their mean."""
    out, lse = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64), torch.full(q.shape[:2], -math.inf)
    for h in range(len(q)):
        listed = range(q.shape[1]) if rows is None else rows[h].tolist()
        for place, row in enumerate(listed):
            tile, last = place // size, row + k.shape[1] - q.shape[1]
            seen = {j for j in range(k.shape[1]) if read[h, tile, j // size]}
            seen |= (
                set() if columns is None else set(columns[h, tile // share if of is None else of[tile]].tolist()) - {-1}
            )
            at = sorted(j for j in seen if j <= last)
            if row >= 0 and at:
                kv = h // (len(q) // len(k))
                scores = k[kv, at].double() @ q[h, row].double() * scale
                out[h, row] = scores.softmax(0) @ v[kv, at].double()
                lse[h, row] = scores.logsumexp(0) / math.log(2)
    return out, lse


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
@pytest.mark.parametrize("chunk", [1 << 26, 900])
def test_definition(number, chunk, monkeypatch):
    monkeypatch.setattr(kernels.ops()["block_sparse_attention"], "CHUNK", chunk)
    example = EXAMPLES[number]
    out, lse = block_sparse_attention(**example)
    want, total = one_by_one(**example)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, total.float(), rtol=1e-4, atol=1e-5)


def test_by_hand():
    """Scores of the second query are ln 3 and 0; the first block alone, and a column that its own block repeats."""
    q, k = torch.ones(1, 2, 1), torch.tensor([[[3.0], [1.0]]]).log()
    v = torch.tensor([[[4.0], [8.0]]])
    everything = torch.ones(1, 1, 1, dtype=torch.bool)
    for columns in (None, torch.tensor([[[1, 0]]], dtype=torch.int32)):
        out, lse = block_sparse_attention(q, k, v, everything, 1.0, columns=columns)
        assert out[0, :, 0].tolist() == pytest.approx([4.0, 5.0]) and lse[0].tolist() == pytest.approx(
            [math.log2(3), 2]
        )
    out, lse = block_sparse_attention(q, k, v, ~everything, 1.0, columns=torch.tensor([[[1, -1]]], dtype=torch.int32))
    assert out[0, :, 0].tolist() == [0, 8] and lse[0].tolist() == [-math.inf, 0]


def test_everything_is_torchs_attention_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 333, 64, generator=g) for h in (6, 2, 2))
    read = torch.ones(6, 6, 6, dtype=torch.bool)
    out, _ = block_sparse_attention(q, k, v, read, 0.125, 64)
    k, v = (x.repeat_interleave(3, 0) for x in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=0.125)
    assert torch.equal(out, want[0])


def test_parts_merge():
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 90, 16, generator=g) for _ in range(3))
    read = torch.rand(2, 3, 3, generator=g) < 0.6
    first = read & (torch.arange(3) % 2 == 0)
    (one, l1), (two, l2) = (block_sparse_attention(q, k, v, part, 0.25, 32) for part in (first, read & ~first))
    total = torch.logaddexp2(l1, l2)
    share = [torch.where(total > -math.inf, 2 ** (part - total), 0)[..., None] for part in (l1, l2)]
    out, lse = block_sparse_attention(q, k, v, read, 0.25, 32)
    torch.testing.assert_close(one * share[0] + two * share[1], out)
    torch.testing.assert_close(total, lse)


@pytest.mark.parametrize("number", range(2, len(EXAMPLES)))
def test_what_comes_later_does_not_matter(number):
    """Change the keys from some token on: no query in front of it notices."""
    example = EXAMPLES[number]
    before, _ = block_sparse_attention(**example)
    g, n = torch.Generator().manual_seed(number), example["k"].shape[1]
    for token in torch.randint(n, (4,), generator=g).tolist():
        other = {name: example[name].clone() for name in "kv"}
        for x in other.values():
            x[:, token:] = torch.randn(x[:, token:].shape, generator=g)
        after, _ = block_sparse_attention(**{**example, **other})
        front = max(0, token - (n - example["q"].shape[1]))
        assert torch.equal(after[:, :front], before[:, :front])


def test_gradients():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(h, 40, 8, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    read = torch.rand(4, 3, 3, generator=g) < 0.5
    block_sparse_attention(q, k, v, read, 0.5, 16)[0].square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    seen = read.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :40, :40].tril()
    scores = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) * 0.5
    weights = scores.masked_fill(~seen, -1e9).softmax(-1) * seen.any(-1, keepdim=True)
    (weights @ v.repeat_interleave(2, 0)).square().sum().backward()
    for x, y in zip(got, (q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(x, y)


def test_refusals():
    x, read = torch.zeros(2, 40, 8), torch.ones(2, 3, 3, dtype=torch.bool)
    for arguments in (
        {"k": torch.zeros(2, 40, 4)},
        {"k": torch.zeros(3, 40, 8), "v": torch.zeros(3, 40, 8)},
        {"size": 24},
        {"size": 8},
        {"share": 0},
        {"read": read.int()},
        {"read": read[:, :2]},
        {"rows": torch.zeros(2, 60, dtype=torch.int32)},
        {"of": torch.zeros(2, dtype=torch.int32)},
        {"columns": torch.zeros(1, 3, 4, dtype=torch.int32)},
        {"columns": torch.zeros(2, 2, 4, dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match=r"need|must be"):
            block_sparse_attention(**{"q": x, "k": x, "v": x, "read": read, "scale": 1.0, "size": 16, **arguments})


def test_every_mode_has_an_example():
    modes = [("columns" in e, "rows" in e, e["q"].shape[1] < e["k"].shape[1], bool(e["read"].any())) for e in EXAMPLES]
    assert {(False, False, False, True), (True, False, False, True), (True, False, False, False)} <= set(modes)
    assert {(False, True, False, True), (True, True, False, True), (False, False, True, True)} <= set(modes)
