"""Known answers of ProxyAttn: one query and one key at a time, in float64, and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from known_sparse import NO_IMAGES, heads_of, prompt, stage
from pydantic import ValidationError

from vtoken.stages.attention import PrefillQK


def proxyattn():
    counts: set[int] = set()
    for n, heads, proxies, stride, size, gamma, least, by_row in (
        (301, (4, 2), 1, 4, 16, 0.7, 16, False),
        (301, (4, 2), 2, 4, 16, 0.9, 48, True),
        (320, (4, 2), 4, 2, 32, 0.5, 32, False),
        (257, (4, 4), 2, 1, 16, 0.8, 50, False),
        (198, (6, 2), 6, 8, 16, 0.6, 1, True),
        (197, (8, 4), 2, 4, 16, 0.3, 1, False),
    ):
        p = prompt(n, heads, seed=n)
        s = stage("proxyattn", proxies=proxies, stride=stride, size=size, gamma=gamma, min_budget=least, by_row=by_row)
        found, scores = s.reads(p).blocks, s.scores(p.q, p.k, p.scale)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vtoken.compressors.attention.proxyattn.CHUNK", 5000)
            torch.testing.assert_close(s.scores(p.q, p.k, p.scale), scores)
        groups = [proxy(p, g, proxies, stride, size) for g in range(proxies)]
        for score, want in zip(scores.tolist(), groups, strict=True):
            assert [pytest.approx(row, rel=1e-4) for row in want] == [row[: r + 1] for r, row in enumerate(score)]
            assert not any(x for r, row in enumerate(score) for x in row[r + 1 :])
        for h, q, k in heads_of(p):
            count, score = budget(q, k, p.scale, size, gamma), groups[h * proxies // heads[0]]
            counts.add(count)
            for r, row in enumerate(score):
                read = {0, r}
                most = max(math.ceil(count * (r + 1) / len(score)) if by_row else count, math.ceil(least / size))
                for c in sorted(set(range(r)) - read, key=lambda c: -row[c]):
                    if len(read) >= most:
                        break
                    read.add(c)
                assert set(found[h, r].nonzero()[:, 0].tolist()) == read, (n, h, r)
    assert len(counts) > 8, "heads differ in what they need"
    by_hand()
    whole = stage("proxyattn", size=16, min_budget=160)
    assert bool(whole.reads(prompt(160)).blocks.equal(torch.ones(10, 10, dtype=torch.bool).tril().expand(4, 10, 10)))
    assert int(whole.reads(prompt(500)).blocks[:, -1].sum(-1).min()) >= 10, "and never fewer in a longer one"
    dense = [
        float(stage("proxyattn", gamma=g, size=16, min_budget=1).reads(prompt(400)).density()) for g in (0.3, 0.6, 0.95)
    ]
    assert dense == sorted(dense) and dense[0] < dense[-1]
    with pytest.raises(ValidationError, match="stride"):
        stage("proxyattn", stride=3)


def proxy(p, group, proxies, stride, size):
    """Row by row, for every key block up to it, the largest share that a scored key gets from a scored query of the
    row."""
    mine = range(group * p.heads // proxies, (group + 1) * p.heads // proxies)
    q = sum(p.q[h].double() for h in mine) / len(mine)
    k = sum(p.k[h // (p.heads // len(p.k))].double() for h in mine) / len(mine)
    out = [[0.0] * (r + 1) for r in range(math.ceil(len(q) / size))]
    for i in range(0, len(q), stride):
        keys = range(0, i + 1, stride)
        shares = torch.stack([q[i] @ k[j] * p.scale for j in keys]).softmax(0).tolist()
        for j, share in zip(keys, shares, strict=True):
            row = out[i // size]
            row[j // size] = max(row[j // size], share)
    return out


def budget(q, k, scale, size, gamma):
    """The fewest blocks that hold gamma of what the last queries attend to."""
    n = len(q)
    mass = [0.0] * math.ceil(n / size)
    for i in range(n - size, n):
        for j, share in enumerate((k[: i + 1] @ q[i] * scale).softmax(0).tolist()):
            mass[j // size] += share / size
    held, count = 0.0, 0
    while held < gamma:
        held, count = held + sorted(mass, reverse=True)[count], count + 1
    return count


def by_hand():
    """80 tokens in blocks of 16. Both heads rank block 2 by their mean, which neither does alone; one needs a block,
    the other all."""
    q, k = torch.zeros(2, 80, 16), torch.zeros(2, 80, 16)
    q[:, :, 0] = 1.0
    q[0, :, 1], q[1, :, 1] = 9.0, -9.0
    k[:, 32:48:4, 0] = 8.0
    p = PrefillQK(q, k, 1.0, 0, NO_IMAGES[:80], NO_IMAGES[:80])
    s = stage("proxyattn", size=16, gamma=0.9, min_budget=48)
    (score,) = s.scores(q, k, 1.0)
    four, rest = math.exp(8), 1.0
    assert float(score[4, 2]) == pytest.approx(four / (4 * four + 13 * rest)), "the query at 64 sees 17 scored keys"
    assert float(score[4, 1]) == pytest.approx(rest / (4 * four + 13 * rest)), (
        "the first query of a block sees fewest keys"
    )
    assert float(score[1, 1]) == pytest.approx(1 / 5)
    assert s.reads(p).blocks[0].int().tolist()[3:] == [[1, 0, 1, 1, 0], [1, 0, 1, 0, 1]], "first, own, and the heaviest"
    k[0, 33:48:4, 0] = 50.0
    skipped = stage("proxyattn", size=16, gamma=0.9, min_budget=16).scores(q, k, 1.0)
    assert torch.equal(skipped[0], score), "keys that the stride leaves out change nothing"
