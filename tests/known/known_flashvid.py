"""Known answers of FlashVID: by hand, and by loops in float64 over tokens and trees."""

from __future__ import annotations

import math

import pytest
import torch
from packing import tokens

from vtoken import registry
from vtoken.pruners._dpc import density_peaks
from vtoken.pruners.tokens._trees import grow
from vtoken.pruners.tokens._video import segments
from vtoken.stages.budget import apportion


def clip(frames, per, seed, drift=0.4, width=12):
    """Tokens [frames, per, width] of a video that drifts, with a new scene every fourth frame; attention."""
    g = torch.Generator().manual_seed(seed)
    scenes = [torch.randn(per, width, generator=g) + 0.7 for _ in range(frames)]
    x = torch.stack([scenes[t // 4] + drift * torch.randn(per, width, generator=g) for t in range(frames)])
    return 0.3 * x, torch.rand(frames, per, generator=g)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def scenes(x, cut, least):
    """First and last frame + 1 of each segment."""
    means = [frame.mean(0) for frame in x]
    alike = [(cosine(means[t], means[t + 1]), t + 1) for t in range(len(x) - 1)]
    cuts = sorted(t for value, t in alike if value < cut)
    others = sorted(pair for pair in alike if pair[0] >= cut)
    cuts = sorted(cuts + [t for _, t in others[: max(0, min(least, len(x)) - 1 - len(cuts))]])
    return list(zip([0, *cuts], [*cuts, len(x)], strict=True))


def attended(frame, attention, count):
    """Greedy: the worth of the candidate times 1 - its highest cosine to any other, then to any chosen one."""
    n, chosen = len(frame), []
    while len(chosen) < count:
        against = {j: [i for i in (chosen or range(n)) if i != j] for j in range(n) if j not in chosen}
        gain = {j: attention[j] * min(1 - cosine(frame[i], frame[j]) for i in of) for j, of in against.items()}
        chosen.append(max(gain, key=lambda j: (gain[j], -j)))
    return chosen


def peaks(values, count):
    """Position of the centre that each of the values joins."""
    n, d = len(values), len(values[0])
    apart = [[float((a - b).norm()) / math.sqrt(d) for b in values] for a in values]
    near = min(count, 7)
    density = [math.exp(-sum(v * v for v in sorted(row)[:near]) / near) for row in apart]
    most = max(map(max, apart))
    rank = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        rank.append(min(denser, default=most) * density[i])
    centres = sorted(range(n), key=lambda i: (-rank[i], i))[:count]
    return [i if i in centres else min(centres, key=lambda c: (apart[i][c], centres.index(c))) for i in range(n)]


def literally(x, attention, budget, alpha, relevance, similarity, cut, least, exact):
    """{(frame, place): value} of what is left."""
    x, left = x.double(), {}
    for begin, end in scenes(x, cut, least):
        frames, event = range(begin, end), x[begin:end].mean((0, 1))
        first = math.ceil(alpha * budget)
        rest = {}
        for t in frames:
            relevant = [max(0.0, float(token @ event)) if relevance else 1.0 for token in x[t]]
            taken = attended(x[t], [float(a) * r for a, r in zip(attention[t], relevant, strict=True)], first)
            left |= {(t, j): x[t, j] for j in taken}
            rest[t] = [j for j in range(len(x[t])) if j not in taken]
        links = {}
        for t in frames[1:]:
            for j in rest[t]:
                best = max(rest[t - 1], key=lambda i: cosine(x[t, j], x[t - 1, i]))
                links[t, j] = (cosine(x[t, j], x[t - 1, best]), (t - 1, best))
        most = len(frames) * (len(x[0]) - budget)
        held = sorted((node for node in links if links[node][0] > similarity), key=lambda node: -links[node][0])
        held = held[: most - 1] if len(held) > most else held
        trees, nodes = {}, [(t, j) for t in frames for j in rest[t]]
        for node in nodes:
            root = node
            while root in held:
                root = links[root][1]
            trees.setdefault(root, []).append(node)
        values = {}
        for root, of in trees.items():
            direct = sum(links[node][1] == root for node in held)
            values[root] = sum(x[node] for node in of) / (len(of) if exact else 1 + direct)
        standing = {t: [root for root in sorted(values) if root[0] == t] for t in frames}
        room, total = len(frames) * (budget - first), len(values)
        wanted = [len(standing[t]) * room / total for t in frames]
        counts = [math.ceil(w) for w in wanted]
        if exact:
            counts = [1 if standing[t] else 0 for t in frames]
            while sum(counts) < room:
                lacking = {t: w - c for w, c, t in zip(wanted, counts, frames, strict=True) if c < len(standing[t])}
                counts[max(lacking, key=lambda t: (lacking[t], -t)) - begin] += 1
        for t, count in zip(frames, counts, strict=True):
            roots = standing[t]
            home = peaks([values[root] for root in roots], count) if roots else []
            for centre in set(home):
                joined = [values[root] for root, to in zip(roots, home, strict=True) if to == centre]
                left[roots[centre]] = sum(joined) / len(joined)
    return left


def flashvid():
    stage = registry.stage("flashvid")
    by_hand()
    for seed, (frames, per, budget) in enumerate(((6, 9, 4), (9, 12, 5), (5, 16, 4), (8, 10, 7))):
        x, attention = clip(frames, per, seed)
        batch = tokens(
            torch.cat([x.flatten(0, 1), x[0, :4], x[1].repeat(2, 1)]),
            (frames * per, 4, 2 * per),
            ((frames, 1, per), (1, 2, 2), (2, 1, per)),
            cls_attention=torch.cat([attention.flatten(), attention[0, :4], attention[1].repeat(2)]),
        )
        for exact, relevance, least in ((True, True, 1), (True, False, 4), (False, True, 3), (False, False, 1)):
            options = {"relevance": relevance, "segments": least, "as_released": not exact}
            keep = stage(keep={"per_frame": budget}, **options).select(batch)
            want = literally(x, attention, budget, 0.7, relevance, 0.8, 0.9, least, exact)
            assert keep.index[: keep.lengths[0]].tolist() == sorted(t * per + j for t, j in want)
            got, values = keep.apply(batch.x)[: keep.lengths[0]], torch.stack([want[node] for node in sorted(want)])
            torch.testing.assert_close(got.double(), values, atol=1e-5, rtol=1e-4)
            assert keep.lengths[1] == 4, "a picture passes whole"
            assert not exact or keep.lengths == (frames * budget, 4, 2 * budget)
            share = stage(keep=frames * budget, **options).select(batch)
            assert torch.equal(share.index[: frames * budget], keep.index[: frames * budget])
    chosen = stage(keep={"per_frame": 3}).select(batch)
    assert chosen.lengths == (24, 4, 6) and int((chosen.into >= 0).sum()) == 34, "no budget is left for trees"
    assert stage(keep={"total": 7}).select(batch).lengths[1] == 4, "images use up nothing"
    with pytest.raises(ValueError, match="flashvid works on videos"):
        stage(keep={"per_crop": 3})


def by_hand():
    # Scenes: frames 0 and 1 alike, 2 and 3 alike; a third segment is made where the next least alike meet.
    means = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]])
    assert segments(means, 0.9, 1) == [2, 2] and segments(means, 0.9, 3) == [2, 1, 1]
    assert segments(means, -1.0, 1) == [4] and segments(means, -1.0, 9) == [1, 1, 1, 1]
    # A chain over three frames, and one row in the last that resembles none before it.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0], [1.0, 0.2], [-1.0, -1.0]])
    trees = grow(x, [2, 2, 2], [3], [6], 0.8)
    assert trees.root.tolist() == [0, 1, 0, 1, 0, 5]
    assert trees.size.tolist() == [3, 2, 3, 2, 3, 1] and trees.near.tolist() == [2, 2, 2, 2, 2, 1]
    assert grow(x, [2, 2, 2], [1, 2], [6, 6], 0.8).root.tolist() == [0, 1, 2, 3, 2, 5], "not across segments"
    assert grow(x, [2, 2, 2], [3], [2], 0.8).root.tolist() == [0, 1, 2, 3, 2, 5], "of three links the closest"
    # Two clumps far apart; all are as dense, measured by one neighbour, so the first of each is its centre. Measured by
    # two, a row that is alone has no density: it joins the nearest.
    clumps = torch.tensor([[0.0], [1.0], [90.0], [91.0], [92.0]])
    assert density_peaks(clumps, [5], [2], 7).tolist() == [0, 0, 2, 2, 2]
    assert density_peaks(clumps[1:], [4], [3], 7).tolist() == [1, 1, 2, 3]
    assert density_peaks(clumps, [2, 3], [2, 1], 7).tolist() == [0, 1, 2, 2, 2]
    assert density_peaks(clumps, [2, 3], [0, 3], 7).tolist() == [-1, -1, 2, 3, 4]
    assert apportion(torch.tensor([1.5, 0.5, 4.0]), [3, 3, 4], 6) == [1, 1, 4]
    assert apportion(torch.tensor([0.4, 0.9, 0.7]), [3, 0, 3], 1) == [0, 0, 1], "fewer than frames"
    # Ten identical frames: what is left are the tokens of one, exactly, once as chosen in each frame, once as trees.
    stage, frame = registry.stage("flashvid"), torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    batch = tokens(frame.repeat(10, 1), (80,), ((10, 2, 4),), cls_attention=torch.rand(8).repeat(10))
    for exact in (True, False):
        s = stage(keep=26, alpha=0.6, segments=1, similarity=0.5, relevance=False, as_released=not exact)
        keep = s.select(batch)
        assert keep.lengths == (26,), "2 of each frame, and the 6 others of the first"
        one = keep.apply(batch.x)
        same = (one[:, None] - frame).norm(dim=2).amin(1) < 1e-5
        assert bool(same.all()) == exact, "the authors' chains are 5 times too long"
        assert keep.index[:8].tolist() == list(range(8))
    longer = one.norm(dim=1) / frame[keep.index % 8].norm(dim=1)
    assert sorted(longer.round(decimals=3).tolist()) == [1.0] * 20 + [5.0] * 6
