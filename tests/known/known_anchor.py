"""Known answers of AnchorAttention and of the row maxima under it: one query and one key at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from known_sparse import heads_of, prompt, seen_by, stage

from vtoken import kernels
from vtoken.kernels import row_maxima


def anchorattention():
    row_maxima_one_by_one()
    for n, step, theta, dense_tail, released in (
        (230, 2, 2.0, True, False),
        (230, 2, 2.5, False, False),
        (224, 3, 2.0, True, False),
        (192, 2, 2.0, True, True),
        (215, 4, 2.5, False, True),
    ):
        p = prompt(n, seed=n + step)
        s = stage("anchorattention", size=16, step=step, theta=theta, dense_tail=dense_tail, released=released)
        found, chosen = seen_by(s.reads(p), n), []
        for h, q, k in heads_of(p):
            want, stripes = by_hand(q, k, p.scale, 16, step, theta, dense_tail, released)
            assert torch.equal(found[h], want), (n, h)
            chosen.append(stripes)
        assert any(0.05 < share < 0.95 for share in chosen) and len(set(chosen)) > 2, "single keys were chosen, not all"
    assert bool(seen_by(stage("anchorattention", size=16, step=8).reads(prompt(250)), 250).sum() == 4 * 250 * 251 / 2)
    everywhere = seen_by(stage("anchorattention", size=16, step=2, theta=1e9).reads(prompt(230)), 230)
    assert bool((everywhere == torch.ones(230, 230, dtype=torch.bool).tril()).all()), "no range is forgotten"
    hole = seen_by(stage("anchorattention", size=16, step=2, theta=1e9, released=True).reads(prompt(224)), 224)
    missing = {
        (i // 32, j // 16) for _, i, j in (~hole & torch.ones(224, 224, dtype=torch.bool).tril()).nonzero().tolist()
    }
    assert missing == {(g, 2 * g - 1) for g in range(2, 7)}, "the block in front of every group but the second"
    dense = [float(stage("anchorattention", size=16, step=2, theta=t).reads(prompt(400)).density()) for t in (-9, 2, 9)]
    assert dense == sorted(dense) and dense[0] < dense[1] < dense[2]
    lists = stage("anchorattention", size=16, step=2, theta=2.0).reads(prompt(230))
    for each in lists.columns.flatten(0, 1).tolist():
        real = [x for x in each if x >= 0]
        assert real == sorted(set(real)) and each[len(real) :] == [-1] * (len(each) - len(real))
        assert not {x // 16 for x in real} & {0}
    more_than_are_listed()


def more_than_are_listed():
    """Blocks with most chosen keys are read whole, no more of them than it takes; nothing that was chosen is left
    out."""
    n, overfull = 230, 0
    for most, released in ((1, False), (9, False), (30, True), (500, False)):
        options = {"size": 16, "step": 2, "theta": 2.0, "dense_tail": False, "released": released}
        free, short = (
            stage("anchorattention", **options, **o).reads(prompt(n, seed=3)) for o in ({}, {"max_columns": most})
        )
        assert short.columns.shape[2] == min(most, n) and free.columns.shape[2] == n
        for h in range(4):
            for group in range(8):
                chosen, listed = ([x for x in r.columns[h, group].tolist() if x >= 0] for r in (free, short))
                held = sorted((sum(x // 16 == b for x in chosen), -b) for b in {x // 16 for x in chosen})
                whole = set()
                while len([x for x in chosen if x // 16 not in whole]) > most:
                    whole.add(-held.pop()[1])
                assert listed == [x for x in chosen if x // 16 not in whole]
                for t in range(2 * group, min(2 * group + 2, 15)):
                    read, asked = (set(r.blocks[h, t].nonzero()[:, 0].tolist()) for r in (short, free))
                    assert read == asked | whole
                overfull += bool(whole)
    assert 20 < overfull < 100


def by_hand(q, k, scale, size, step, theta, dense_tail, released):
    """([N, N] what is read, share of the keys in between that were chosen) of one head."""
    n, group = len(q), size * step
    last = n // group * group if dense_tail else n
    seen, asked, taken = torch.zeros(n, n, dtype=torch.bool), 0, 0
    scores = (q @ k.T * scale).tolist()

    def exact(i):
        start = i // group * group
        front, start = (group, start) if released else (size, start - size)
        return [j for j in range(i + 1) if j < front or j >= start]

    anchors, means = {}, {}
    for b in range(-(-n // size)):
        rows = range(b * size, min(n, (b + 1) * size))
        anchors[b] = sum(max(scores[i][j] for j in exact(i)) for i in rows) / len(rows)
        means[b] = sum(q[i] for i in rows) / len(rows)
    for start in range(0, n, group):
        rows = range(start, min(n, start + group))
        blocks = range(start // size, -(-rows.stop // size))
        keys = range(size, start - size)
        near = [j for j in keys if any(float(means[b] @ k[j]) * scale + theta >= anchors[b] for b in blocks)]
        for i in rows:
            seen[i, exact(i) + near] = True
            if start >= last:
                seen[i, : i + 1] = True
        asked, taken = asked + len(keys), taken + len(near)
    return seen, taken / max(1, asked)


def row_maxima_one_by_one():
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(4, 77, 8, generator=g), torch.randn(2, 77, 8, generator=g)
    read = torch.rand(4, 5, 5, generator=g) < 0.5
    with kernels.use("torch"):
        got = row_maxima(q, k, read, 0.3, 16)
    for h in range(4):
        for i in range(77):
            scores = [float(q[h, i] @ k[h // 2, j]) * 0.3 for j in range(i + 1) if read[h, i // 16, j // 16]]
            assert float(got[h, i]) == pytest.approx(max(scores, default=-math.inf), abs=1e-5)
    with pytest.raises(ValueError, match="whole sequence"):
        row_maxima(q[:, 1:], k, read, 0.3, 16)
    with pytest.raises(ValueError, match="read is"):
        row_maxima(q, k, read[:, 1:], 0.3, 16)
