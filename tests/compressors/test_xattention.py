"""XAttention in chunks of queries: the scores of one pass over all products, for about half of them."""

from __future__ import annotations

import pytest
import torch
from known_sparse import prompt, stage
from torch.utils.flop_counter import FlopCounterMode

from vtoken.compressors.attention import xattention


def at_once(q, k, scale, size, stride):
    """The definition without chunks: every product, softmaxed under one mask, summed per pair of blocks."""
    n, t, per = q.shape[1], -(-q.shape[1] // size), size // stride
    q, k = (torch.cat([x, x.new_zeros(len(x), t * size - n, x.shape[2])], 1) for x in (q, k))
    asked, keys = (x.view(len(x), t * per, -1) for x in (q.view(len(q), t * per, stride, -1).flip(2), k))
    products = asked.double() @ keys.double().mT * scale / stride
    ahead = torch.ones(t * per, t * per).triu(1).bool()
    shares = products.masked_fill(ahead, -torch.inf).softmax(-1)
    shares[:, -(-n // stride) :] = 0
    return shares.view(len(q), t, per, t, per).sum((2, 4))


@pytest.mark.parametrize("n", [33, 500, 512, 777])
@pytest.mark.parametrize(("parts", "chunk"), [(1, 1 << 26), (8, 1 << 26), (8, 9_000)])
def test_chunks_change_nothing(n, parts, chunk, monkeypatch):
    monkeypatch.setattr(xattention, "PARTS", parts)
    monkeypatch.setattr(xattention, "LEAST", 1)
    monkeypatch.setattr(xattention, "CHUNK", chunk)
    p, s = prompt(n, heads=(4, 4), seed=n), stage("xattention", size=16, stride=4)
    before = p.q.clone(), p.k.clone()
    got = s.scores(p.q, p.k, p.scale)
    torch.testing.assert_close(got.double(), at_once(p.q, p.k, p.scale, 16, 4), atol=1e-5, rtol=1e-4)
    assert torch.equal(p.q, before[0]) and torch.equal(p.k, before[1]), "masks are applied in place, but not there"


def test_keys_behind_a_chunk_are_not_multiplied():
    """A long prompt comes in at least eight chunks, so 36 of 64 products are left; a short one comes in one."""
    s = stage("xattention", size=16, stride=4)
    for n, share in ((xattention.LEAST * xattention.PARTS * 4, 36 / 64), (xattention.LEAST * 4, 1)):
        q, k = torch.randn(2, n, 4), torch.randn(2, n, 4)
        with FlopCounterMode(display=False) as counter:
            s.scores(q, k, 0.5)
        assert counter.get_total_flops() == pytest.approx(share * 2 * 2 * (n // 4) ** 2 * 16)
