"""Known answers of PruneSID."""

from __future__ import annotations

import math

import torch
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens.prunesid import components, free_first, shares


def literally(x, attention, k):
    """PruneSID with sets and loops, float64, ranked by attention."""
    n, x = len(x), x.double()
    z = torch.sigmoid(x).T
    _, _, vh = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    group = vh[: max(1, k // 4)].abs().argmax(0).tolist()
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    mean = sum(float(cosine[i, j]) for i in range(n) for j in range(i + 1, n)) / (n * (n - 1) / 2)
    ranked = []
    for g in sorted(set(group)):
        left, free, rest = (
            sorted((i for i in range(n) if group[i] == g), key=lambda i: (-float(attention[i]), i)),
            [],
            [],
        )
        for i in left:
            (rest if any(float(cosine[i, j]) > 18 * k / n * mean for j in free) else free).append(i)
        ranked.append((free, rest))
    most = [min(5 * math.ceil(k / 64), len(free)) for free, _ in ranked]
    while sum(most) < k:
        most = [min(m + 1, len(free) + len(rest)) for m, (free, rest) in zip(most, ranked, strict=True)]
    total, count, before = sum(len(free) for free, _ in ranked), [], 0
    for i in range(len(ranked)):
        upto = round((k - len(ranked)) * sum(len(free) for free, _ in ranked[: i + 1]) / total)
        count.append(min(1 + upto - before, most[i]))
        before = upto
    for i in sorted(range(len(ranked)), key=lambda i: -len(ranked[i][0])):
        count[i] += min(most[i] - count[i], k - sum(count))
    return sorted(i for (free, rest), c in zip(ranked, count, strict=True) for i in (free + rest)[:c])


def prunesid():
    stage = registry.stage("prunesid")
    # Two directions far from each other, each three times: two components, one token of each direction.
    blocks = torch.cat([torch.tensor([[9.0, 9, -9, -9]]).repeat(3, 1), torch.tensor([[-9.0, 9, -9, 9]]).repeat(3, 1)])
    _, group = components(blocks, 2)
    assert len(set(group[:3].tolist())) == len(set(group[3:].tolist())) == 1
    close = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    assert free_first([0, 1, 2], close) == ([0, 2, 1], 2), "1 is suppressed by 0, and suppresses nothing itself"
    assert shares([4, 4], [3, 1], 4) == [3, 1], "one each, the others by what is free"
    assert shares([9, 9], [9, 1], 10) == [7, 3], "bounds 5 and 1 rise until they hold 10"
    assert shares([1, 9], [1, 2], 6) == [1, 5]
    g = torch.Generator().manual_seed(11)
    x, attention = torch.randn(60 + 35, 24, generator=g) + 0.4, torch.rand(95, generator=g)
    batch = tokens(x, (60, 35), ((1, 6, 10), (1, 5, 7)), cls_attention=attention, features=x)
    for k in (1, 9, 20, 30):
        want = literally(x[:60], attention[:60], k) + [60 + i for i in literally(x[60:], attention[60:], k)]
        assert stage(keep=k).select(batch).index.tolist() == want, k
    kept = stage(keep=20, rank="component").select(batch)
    assert kept.lengths == (20, 20) and kept.index.tolist() != stage(keep=20).select(batch).index.tolist()
