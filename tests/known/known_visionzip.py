"""Known answers of the methods that choose and merge: VisionZip, PruMerge, VScan."""

from __future__ import annotations

from dataclasses import replace

import torch
from packing import tokens

from vtoken import registry
from vtoken.stages import Fact


def given(lengths, parts, x, facts):
    """Packed tokens with facts of chosen layers."""
    return replace(tokens(x, lengths, parts=parts), facts={Fact(*key): value for key, value in facts.items()})


def draw(lengths, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, generator=g), torch.rand(sum(lengths), generator=g)


def cosine(a, b):
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def best(score, k):
    """The k best positions, ties to the lower."""
    return sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:k]


def close(got, want):
    torch.testing.assert_close(got.double(), torch.stack(want).double(), atol=1e-5, rtol=1e-5)


def visionzip():
    stage = registry.stage("visionzip")
    attention = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.8, 0.05, 0.15])
    keys = torch.tensor([[1.0, 0], [0, 0], [0.9, 0.1], [0, 1], [0, 0], [0.1, 0.9], [1, 0.2]])
    x = torch.arange(7.0)[:, None]
    seven = tokens(x, (7,), ((1, 1, 7),), cls_attention=attention, keys=keys, features=10 * x.repeat(1, 2))
    keep = stage(keep=4, contextual=2).select(seven)
    assert keep.index.tolist() == [0, 1, 3, 4], "1 and 4 dominant; of 0 2 3 5 6 every second is a target: 0, 3"
    assert keep.into.tolist() == [0, 1, 0, 2, 3, 2, 0]
    torch.testing.assert_close(keep.apply(x)[:, 0], torch.tensor([0 + (2 + 6) / 2, 1, 3 + 5, 4]))
    half = stage(keep=4, contextual=2, halve=True).select(seven)
    torch.testing.assert_close(half.apply(x)[:, 0], torch.tensor([(0 + (2 + 6) / 2) / 2, 1, (3 + 5) / 2, 4]))
    # Behind the projector stand the sums of features; what nobody joined is only itself.
    sums = keep.apply(x, lambda f: 100 * f[:, :1])
    torch.testing.assert_close(sums[:, 0], torch.tensor([100 * (0 + (20 + 60) / 2), 1, 100 * (30 + 50.0), 4]))
    assert half.apply(x, lambda f: f / 0).isfinite().all(), "half and half needs no projector"
    facts = {"cls_attention": attention[:4], "keys": keys[:4], "features": x[:4] + 1}
    alone = stage(keep=3, contextual=2).select(tokens(x[:4], (4,), ((1, 1, 4),), **facts))
    assert alone.apply(x[:4], lambda f: f)[:, 0].tolist() == [1, 1, 3 + 4], "3 joined 2, nobody 0"
    again = replace(seven, size=torch.ones(7))
    assert stage(keep=4, contextual=2).select(again).fused.features is None, (
        "merged before: features tell of one member"
    )
    assert stage(keep=1).select(seven).index.tolist() == [1] and stage(keep=4, contextual=0).select(
        seven
    ).index.tolist() == [1, 2, 3, 4]
    assert [stage(keep=k)._merged(k) for k in (192, 128, 64, 32)] == [30, 20, 10, 5], "published splits"

    assert "heads: 3 does not divide" in stage(keep=4, heads=3).tower_incompatibility(32, 1)
    assert not stage(keep=4, heads=4).tower_incompatibility(32, 1) and not stage(keep=4).tower_incompatibility(33, 4)

    lengths, parts = (40, 23), (((1, 5, 8),), ((1, 23, 1),))
    x, attention = draw(lengths, 6)
    keys = draw(lengths, 12, seed=1)[0]
    for heads, k, c in ((3, 13, 2), (None, 20, 7), (4, 22, 3)):
        options = {"heads": heads} if c in (2, 3) else {"contextual": c}
        facts = {("cls_attention",): attention, ("keys",): keys, ("features",): x}
        keep = stage(keep=k, **options).select(given(lengths, parts, x, facts))
        metric = keys.double() if heads is None else keys.double().view(-1, heads, 12 // heads).mean(1)
        index, want = [], []
        for start, n in ((0, 40), (40, 23)):
            dominant = best(attention[start : start + n], k - c)
            rest = [i for i in range(n) if i not in dominant]
            targets = rest[:: len(rest) // c][:c]
            joined = {t: [] for t in targets}
            for i in rest:
                if i not in targets:
                    joined[max(targets, key=lambda t, i=i, s=start: cosine(metric[s + i], metric[s + t]))].append(
                        x[start + i]
                    )
            for i in sorted(dominant + targets):
                own = x[start + i]
                index.append(start + i)
                want.append(own + torch.stack(joined[i]).mean(0) if joined.get(i) else own)
        assert keep.index.tolist() == index and keep.lengths == (k, k)
        close(keep.apply(x), want)


def prumerge():
    stage = registry.stage("prumerge")
    # Quartiles 2 and 4, so the bar is 7: tokens 4 and 7 lie above it.
    attention = torch.tensor([1.0, 2, 3, 2, 9, 4, 2, 8, 3])
    keys = torch.tensor([[1.0, 0.1], [0, 1], [0.1, 1], [1, 0], [1, 0.02], [-1, 0], [-1, -1], [0, 1.1], [-1, 0.1]])
    x = torch.arange(9.0)[:, None]
    facts = {("cls_attention", -1): attention, ("keys", -1): keys}
    nine = given((9,), (((1, 3, 3),),), x, facts)
    keep = stage(neighbours=2).select(nine)
    assert keep.index.tolist() == [4, 7] and keep.lengths == (2,)
    assert keep.into.tolist() == [0, 1, 1, 0, 0, -1, -1, 1, -1], "two nearest each, the others are lost"
    torch.testing.assert_close(keep.apply(x)[:, 0], torch.tensor([(4 + 0 + 3 * 2) / 4.0, (7 + 1 * 2 + 2 * 3) / 6.0]))
    # Both ask for all others: each goes where its key is nearer.
    assert stage(neighbours=8).select(nine).into.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert stage(neighbours=0).select(nine).into.tolist() == [-1] * 4 + [0, -1, -1, 1, -1]
    assert stage(plus=True).select(nine).index.tolist() == list(range(8)), "9 // 2 // 3 = 1: every token but the last"
    for outliers, evenly in ((38, 115), (8, 24), (7, 22)):  # steps of 5, 24 and 27; 5 divides 575
        peaks = torch.zeros(576).index_fill(0, torch.arange(outliers) * 15 + 1, 1.0)
        whole = given(
            (576,),
            (((1, 24, 24),),),
            torch.zeros(576, 1),
            {("cls_attention", -1): peaks, ("keys", -1): torch.ones(576, 2)},
        )
        kept = set(stage(plus=True).select(whole).index.tolist())
        theirs = set(range(0, 575, int(int(1 / (outliers / 576)) / 3)))
        assert len(theirs) == evenly and kept == theirs | set(peaks.nonzero()[:, 0].tolist())
    assert stage(keep=3).select(nine).index.tolist() == [4, 5, 7], "with a budget the highest"
    assert stage(keep=5, plus=True).select(nine).index.tolist() == [1, 3, 4, 6, 7], "2 outliers, then 3 of 7 evenly"
    assert stage(keep=1, plus=True).select(nine).index.tolist() == [4]
    flat = given((4,), (((1, 2, 2),),), x[:4], {k: torch.ones_like(v[:4]) for k, v in facts.items()})
    assert stage().select(flat).index.tolist() == [0], "what lies on the bar is no outlier, but one stays"
    assert stage().expected_counts((576,), (), (0,)) == (41,) and stage(plus=True).expected_counts(
        (576, 3), (), (0, 0)
    ) == (144, 1)

    lengths, parts = (150, 60), (((1, 10, 15),), ((1, 6, 10),))
    x, attention = draw(lengths, 5)
    attention = attention**8
    keys = draw(lengths, 6, seed=2)[0]
    both = given(lengths, parts, x, {("cls_attention", -1): attention, ("keys", -1): keys})
    for plus in (False, True):
        keep = stage(plus=plus, neighbours=4).select(both)
        index, want, counts = [], [], []
        for start, n in ((0, 150), (150, 60)):
            a = attention[start : start + n].double()
            ranked = sorted(a.tolist())
            q1, q3 = (
                ranked[int(p)] + (p - int(p)) * (ranked[int(p) + 1] - ranked[int(p)])
                for p in ((n - 1) * 0.25, (n - 1) * 0.75)
            )
            chosen = {i for i in range(n) if float(a[i]) > q3 + 1.5 * (q3 - q1)}
            assert 2 < len(chosen) < n / 4, "a test of outliers needs some"
            if plus:
                chosen |= set(range(0, n - 1, int(int(1 / (len(chosen) / n)) / 3)))
            near = {
                i: sorted(set(range(n)) - {i}, key=lambda j, i=i, s=start: -cosine(keys[s + i], keys[s + j]))[:4]
                for i in chosen
            }
            homes = {i: [] for i in chosen}
            for j in set(range(n)) - chosen:
                wanting = [i for i in chosen if j in near[i]]
                if wanting:
                    homes[max(wanting, key=lambda i, j=j, s=start: cosine(keys[s + i], keys[s + j]))].append(j)
            for i in sorted(chosen):
                total = x[start + i].double() + sum(a[j] * x[start + j].double() for j in homes[i])
                index.append(start + i)
                want.append(total / (1 + sum(float(a[j]) for j in homes[i])))
            counts.append(len(chosen))
        assert keep.index.tolist() == index and keep.lengths == tuple(counts)
        close(keep.apply(x), want)


def vscan():
    stage = registry.stage("vscan")
    early, late = torch.zeros(16), torch.zeros(16)
    early[[1, 7, 12, 15, 14]] = torch.tensor([0.5, 0.9, 0.3, 0.95, 0.94])
    late[[15, 0, 3]] = torch.tensor([1.0, 0.9, 0.8])
    x = torch.tensor([[0.0, 1.0]]).repeat(16, 1)
    x[[15, 14, 13]] = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.3]])
    grid = given((16,), (((1, 4, 4),),), x, {("cls_attention", 5): early, ("cls_attention",): late})
    keep = stage(keep=4, window=2).select(grid)
    assert keep.index.tolist() == [0, 3, 7, 15], "15 and 7 lead their windows (14 does not), 0 and 3 the rest"
    assert keep.into.tolist() == [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 3, 3]
    torch.testing.assert_close(keep.apply(x)[3], torch.tensor([2.0, 0.1]))
    assert stage(keep=1, window=2).select(grid).index.tolist() == [15], "no half for the local scan"
    assert 14 in stage(keep=10, window=2).select(grid).index.tolist(), "second round"

    lengths = (576, 35, 48, 60)
    parts = (((1, 24, 24),), ((1, 7, 5),), ((1, 6, 3), (1, 6, 5)), ((2, 5, 6),))
    x, early = draw(lengths, 6)
    late = draw(lengths, 1, seed=4)[1]
    early[-60:-30] += 1  # the first frame of the video
    facts = {("cls_attention", 2): early, ("cls_attention",): late}
    keep = stage(keep=64, local_layer=2).select(
        given(lengths[:1], parts[:1], x[:576], {k: v[:576] for k, v in facts.items()})
    )
    local = set()
    for top, left in ((y, x) for y in range(0, 24, 6) for x in range(0, 24, 6)):
        window = [(top + y) * 24 + left + x for y in range(6) for x in range(6)]
        local |= set(sorted(window, key=lambda i: -float(early[i]))[:2])
    rest = sorted(set(range(576)) - local, key=lambda i: -float(late[i]))
    assert keep.index.tolist() == sorted(local | set(rest[:32])), "the authors' rule: 32 local tokens are 2 per window"

    keep = stage(keep=15, local_layer=2, window=3).select(given(lengths, parts, x, facts))
    index, want, start = [], [], 0
    for n, rasters in zip(lengths, parts, strict=True):
        windows, number = {}, 0
        for r, (t, h, w) in enumerate(rasters):
            for frame, y in ((frame, y) for frame in range(t) for y in range(h)):
                for column in range(w):
                    key = (r, frame, min(y // 3, max(1, h // 3) - 1), min(column // 3, max(1, w // 3) - 1))
                    windows.setdefault(key, []).append(number)
                    number += 1
        e, g, v = (t[start : start + n] for t in (early, late, x))
        rounds, local = [sorted(ids, key=lambda i, e=e: -float(e[i])) for ids in windows.values()], []
        while len(local) < 7:
            heads = sorted((ids.pop(0) for ids in rounds if ids), key=lambda i, e=e: -float(e[i]))
            local += heads[: 7 - len(local)]
        rest = sorted(set(range(n)) - set(local), key=lambda i, g=g: -float(g[i]))
        kept = sorted(local + rest[:8])
        cells = {i: [v[i]] for i in kept}
        for j in set(range(n)) - set(kept):
            cells[max(kept, key=lambda i, j=j, v=v: cosine(v[i], v[j]))].append(v[j])
        index += [start + i for i in kept]
        want += [torch.stack(cells[i]).double().mean(0) for i in kept]
        start += n
    assert keep.index.tolist() == index
    close(keep.apply(x), want)
