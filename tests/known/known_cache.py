"""Known answers of the stages that shrink the KV cache, by hand or by an independent definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vtoken import registry
from vtoken.compressors.cache.adakv import among_highest
from vtoken.compressors.cache.pyramidkv import narrowed
from vtoken.stages.cache import CachedLayer
from vtoken.stages.layer_size import LayerSize


def layer(n, images, heads=4, kv_heads=2, seed=0):
    """Random keys, values and queries of a row of n tokens whose images have these slots."""
    g = torch.Generator().manual_seed(seed)
    k, v, q = (torch.randn(h, n, 8, generator=g) for h in (kv_heads, kv_heads, heads))
    slots = tuple(tuple(i) for i in images)
    return CachedLayer(k, v, q, tuple(torch.tensor(s) for s in slots), slots, 0.3)


def attention(x, query_head):
    """[N, N] causal attention of a query head in float64."""
    group = len(x.queries) // len(x.keys)
    q, k = x.queries[query_head].double(), x.keys[query_head // group].double()
    rows = []
    for i in range(len(q)):
        row = torch.zeros(len(k), dtype=torch.float64)
        row[: i + 1] = (k[: i + 1] @ q[i] * x.scale).softmax(0)
        rows.append(row)
    return torch.stack(rows)


def best(scores, k):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def snapkv():
    x = layer(20, [range(2, 12)])
    stage = registry.stage("snapkv")

    def scores(window, kernel, pool):
        out = []
        for h in range(2):
            each = []
            for q in (2 * h, 2 * h + 1):
                mean = attention(x, q)[-window:].mean(0)[:-window].tolist()
                half, padded = kernel // 2, []
                for i in range(len(mean)):
                    near = mean[max(0, i - half) : i + half + 1]
                    padded.append(sum(near) / kernel if pool == "avg" else max(near))
                each.append(padded)
            out.append([(a + b) / 2 for a, b in zip(*each, strict=True)])
        return out

    for kernel, pool, window in ((5, "avg", 4), (3, "max", 8), (1, "avg", 1), (5, "avg", 32)):
        found = stage(keep=4, window=window, kernel=kernel, pooling=pool).compress(x)
        want = scores(min(window, 8), kernel, pool)  # eight words stand behind the image
        for h in range(2):
            image = best(want[h][2:12], 4)
            assert found.index[h].tolist() == [0, 1, *(2 + i for i in image), *range(12, 20)]
        assert found.counts == (4,) and found.into is None
        if window <= 8:
            whole = stage(keep=11, window=window, kernel=kernel, pooling=pool, text=True).compress(x)
            for h in range(2):
                assert whole.index[h].tolist() == [*best(want[h], 11 - window), *range(20 - window, 20)]
    assert stage(keep=10).compress(x).index.tolist() == [list(range(20))] * 2
    assert stage(keep=3, text=True).compress(x).index.tolist() == [[17, 18, 19]] * 2, "the window takes its own"
    ends = layer(8, [range(1, 4), range(4, 8)])
    assert stage(keep=2).compress(ends).index[:, -1].tolist() == [7, 7], "a prompt that ends in a picture"
    assert stage(keep=4).slots(100, (60, 3)) == 37 + 4 + 3 and stage(keep=40, text=True).slots(100, (60,)) == 40
    assert stage(keep=4, window=8).cost(100, (60,), 4, 2, 8) == 2 * 8 * 100 * 4 * 8


def pyramidkv():
    """Counts worked out by hand, and at every layer what snapkv keeps at that count."""
    assert [narrowed(10, 40, 5, r, 5) for r in range(5)] == [18, 14, 10, 6, 2]
    assert [narrowed(10, 15, 5, r, 5) for r in range(5)] == [15, 13, 10, 7, 5], "no layer has more than there is"
    assert [narrowed(7, 9, 20, r, 4) for r in range(4)] == [9, 8, 6, 5]
    assert [narrowed(3, 3, 20, r, 4) for r in range(4)] == [3] * 4 and narrowed(6, 9, 20, 0, 1) == 6
    x = layer(20, [range(2, 12)])
    pyramid, snap = registry.stage("pyramidkv"), registry.stage("snapkv")
    for at, counts in (((), (8, 6, 4, 2)), ((1, 3, 6), (8, 5, 2))):
        for r, count in enumerate(counts):
            where = {"layer": at[r] if at else r, "depth": 8 if at else 4, "attending": at}
            found = pyramid(keep=5, beta=2).compress(replace(x, **where))
            want = snap(keep=count).compress(x)
            assert found.counts == want.counts == (count,) and torch.equal(found.index, want.index)
    for r, count in enumerate((3 + 3, 3 + 3, 3 + 1, 3 + 1)):
        found = pyramid(keep=5, window=3, text=True).compress(replace(x, layer=r, depth=4))
        assert torch.equal(found.index, snap(keep=count, window=3, text=True).compress(x).index)
    assert pyramid(keep=5).slots(100, (60, 3)) == 37 + 5 + 3 and pyramid(keep=40, text=True).slots(100, (60,)) == 40


def lookm():
    x, stage = layer(20, [range(2, 8), range(9, 14)]), registry.stage("lookm")
    total = [sum(attention(x, q).sum(0) for q in (2 * h, 2 * h + 1)).tolist() for h in range(2)]
    images = [*range(2, 8), *range(9, 14)]
    # 40 % of 20 is 8; older than the last 2 are 7 words, so one visual token of all stays.
    found = stage(important="40%", merge="none").compress(x)
    for h in range(2):
        one = images[best([total[h][i] for i in images], 1)[0]]
        assert found.index[h].tolist() == sorted({0, 1, 8, *range(14, 20), one})
    assert found.counts is None, "which image it is of depends on the head"
    none = stage(merge="none").compress(x)
    assert none.index.tolist() == [[0, 1, 8, *range(14, 20)]] * 2, "text stays whatever the budget"
    strict = stage(important="20%", merge="none", text=True).compress(x)
    words = [0, 1, 8, *range(14, 18)]
    for h in range(2):
        assert strict.index[h].tolist() == [*(words[i] for i in best([total[h][i] for i in words], 4)), 18, 19]
    kept = stage(keep=2, merge="none").compress(x)
    for h in range(2):
        want = [best([total[h][i] for i in image], 2) for image in (range(2, 8), range(9, 14))]
        assert kept.index[h].tolist() == [0, 1, *(2 + i for i in want[0]), 8, *(9 + i for i in want[1]), *range(14, 20)]
    assert kept.counts == (2, 2)
    recent = stage(keep=2, recent="50%", merge="none").compress(x)
    assert all({10, 11} <= set(index) for index in recent.index.tolist()), "recent ones first, ties to the lower index"
    everything = stage(important="50%", recent="50%").compress(x)
    assert everything.index.tolist() == [list(range(20))] * 2 and everything.into is None
    for seed in range(4):
        the_merges(layer(20, [range(2, 8), range(9, 14)], seed=seed), stage)
    # 40 visual tokens, 60 words behind them: 100 is 10 newest, 50 older words; 90 % leave room for 40 visual tokens at
    # most.
    assert stage().slots(100, (40,)) == 60 and stage(important="60%").slots(100, (40,)) == 70
    assert stage(text=True).slots(100, (40,)) == 20 and stage(keep=5).slots(100, (40,)) == 65
    assert stage(merge="none").cost(100, (40,), 4, 2, 8) == 2 * 8 * 4 * 100 * 100
    assert stage().cost(100, (40,), 4, 2, 8) == 2 * 8 * (4 * 100 * 100 + 2 * 40 * 60)


def the_merges(x, stage):
    for merge in ("averaged", "pivotal", "weighted"):
        found = stage(keep=2, merge=merge).compress(x)
        for values, got in zip((x.keys, x.values), found.apply(x.keys, x.values), strict=True):
            for h in range(2):
                kept = found.index[h].tolist()
                near = {}
                for e in sorted(set(range(20)) - set(kept)):
                    alike = [
                        float(torch.cosine_similarity(x.keys[h, e].double(), x.keys[h, t].double(), dim=0))
                        for t in kept
                    ]
                    near[e] = max(alike), alike.index(max(alike))
                mean = sum(a for a, _ in near.values()) / len(near)
                for slot, t in enumerate(kept):
                    own = values[h, t].double()
                    mine = [(e, a) for e, (a, s) in near.items() if s == slot and (merge == "pivotal" or a >= mean)]
                    more = {
                        "averaged": [values[h, e].double() for e, _ in mine],
                        "pivotal": [(values[h, e].double() + own) / 2 for e, _ in mine],
                        "weighted": [a * values[h, e].double() for e, a in mine],
                    }[merge]
                    torch.testing.assert_close(
                        got[h, slot].double(), torch.stack([own, *more]).mean(0), atol=1e-5, rtol=1e-5
                    )


def kvpress():
    """Budgets and refusals that need no kvpress; test_kvpress.py runs presses."""
    stage = registry.stage("kvpress")
    assert stage(press="KnormPress", compression_ratio=0.9).slots(150, (100, 5)) == 45 + 10 + 1
    assert stage(press="KnormPress", compression_ratio=0.5, text=True).slots(150, (100,)) == 75
    assert stage(press="KnormPress").slots(150, (100,)) == 150
    with pytest.raises(ValueError, match="less than 1"):
        stage(press="KnormPress", compression_ratio=1.0)


def streaming_cache():
    """Slots and heads by hand; tests/hooks/cache/test_head_classes.py generates with them."""
    x, cls = layer(20, [range(2, 8), range(9, 14)]), registry.stage("streaming_cache")

    def told(decision):
        return [(c.heads.tolist(), c.stay.tolist(), c.latest.tolist(), c.window) for c in decision.classes]

    # Visual are 2 to 7 and 9 to 13; of these the first three stay, and the latest four for now.
    text = [0, 1, 8, *range(14, 20)]
    assert told(cls(sink=3, recent=4).compress(x)) == [
        ([0, 1], [sorted([*text, 2, 3, 4])], [[10, 11, 12, 13]], 4),
    ]
    assert told(cls(sink=3, recent=4, text=False).compress(x)) == [([0, 1], [[0, 1, 2]], [[16, 17, 18, 19]], 4)]
    later = replace(x, classes=(torch.tensor([0, 1]),))
    assert told(cls(sink=3, recent=4).compress(later)) == [([0, 1], [text], [[10, 11, 12, 13]], 4)]
    assert told(cls(sink=9, recent=4).compress(x)) == [([0, 1], [[*range(12), *range(14, 20)]], [[12, 13]], 4)]
    assert told(cls(sink=0, recent=50, text=False).compress(x)) == [([0, 1], [[]], [list(range(20))], 50)]
    # Two of four heads have the lowest gates: both of layer 0, by the tie.
    gates = ((0.1, 0.2), (0.2, 0.9))
    assert told(cls(sink=0, recent=2, gates=gates).compress(x)) == [([0, 1], [text], [[12, 13]], 2)]
    assert told(cls(sink=0, recent=2, gates=gates, sparsity=0.25).compress(x)) == [
        ([1], [list(range(20))], [[]], None),
        ([0], [text], [[12, 13]], 2),
    ]
    deep = replace(x, layer=1)
    assert told(cls(sink=0, recent=2, gates=gates).compress(deep)) == [([0, 1], [list(range(20))], [[]], None)]
    one = cls(sink=3, recent=4, gates=gates, sparsity=0.75, compensate=True)
    assert [c.compensated for c in one.compress(deep).classes] == [False, True]
    # 100 tokens, 60 and 20 of them visual: 20 of text, 3 and 4; with 9 more nothing grows, three heads of four stream.
    assert (
        one.slots_of_head(100, (60, 20)) == one.slots_of_head(100, (60, 20), 9) == 27
        and one.slots_of_head(24, (4,)) == 24
    )
    assert one.slots(100, (60, 20)) == round((3 * 27 + 100) / 4)
    at = LayerSize(1, (0, 1), 100, (60, 20), 9, 2, 8, 2)
    assert one.cache_bytes(at) == (109 + 27) * 2 * 8 * 2 + 2 * 8 * 4, "one head of layer 1 streams, its means in fp32"
    assert cls(sink=3, recent=4, text=False).slots_of_head(100, (60, 20)) == 7


def adakv():
    """Head by head and token by token, in float64; budgets of heads by counting."""
    s = registry.stage("adakv")
    assert (s(keep=1).kernel, s(keep=1).pooling, s(keep=1).floor, s(keep=1).window) == (7, "max", 0.2, 32)
    plain = torch.tensor([[9.0, 8, 7, 6, 5, 0], [1.0, 0, 0, 0, 0, 0]])
    drawn = [among_highest(plain, mean).tolist() for mean in (0, 3, 6)]
    assert drawn == [[0, 0], [5, 1], [6, 6]] and among_highest(torch.zeros(2, 4), 2).tolist() == [4, 0]
    shares = {floor: s(keep=1, floor=floor).shares([5, 1], 3) for floor in (0, 0.2, 0.5, 1)}
    assert shares == {0: [5, 1], 0.2: [5, 1], 0.5: [4, 2], 1: [3, 3]}, "at 0.2: 0.8 * 5 + 0.6 and 0.8 + 0.6"
    assert s(keep=1).shares([6, 6], 6) == [6, 6] and s(keep=1).shares([0, 0], 0) == [0, 0]
    assert s(keep=1, floor=0.5).shares([2, 1, 0], 1) == [2, 1, 0], "1.5, 1 and 0.5"
    x = layer(24, [range(2, 12), range(13, 19)], heads=12, kv_heads=6)
    for options in ({"keep": 4}, {"keep": "50%", "floor": 0.0}, {"keep": 13, "text": True}, {"keep": 9, "floor": 0.6}):
        stage = s(window=4, kernel=3, **options)
        scores = []
        for head in range(6):
            row = torch.stack([attention(x, 2 * head + g)[-4:, :20].mean(0) for g in range(2)]).mean(0)
            scores.append([float(row[max(0, i - 1) : i + 2].max()) for i in range(20)])
        spans = [range(20)] if stage.text else [range(2, 12), range(13, 19)]
        means = [9] if stage.text else stage.left(24, (10, 6))
        kept = [set(range(20, 24)) | (set() if stage.text else {0, 1, 12, 19}) for _ in range(6)]
        for span, mean in zip(spans, means, strict=True):
            ranked = sorted((-scores[h][i], h) for h in range(6) for i in span)[: 6 * mean]
            drawn = [sum(head == h for _, head in ranked) for h in range(6)]
            wanted = [(1 - stage.floor) * c + stage.floor * mean for c in drawn]
            counts = [int(w + 1e-6) for w in wanted]
            for h in sorted(range(6), key=lambda h: (round(counts[h] - wanted[h], 6), h))[: 6 * mean - sum(counts)]:
                counts[h] += 1
            for h in range(6):
                kept[h] |= set(sorted(span, key=lambda i: (-scores[h][i], i))[: counts[h]])
        found = stage.compress(x).classes
        assert [each.heads.tolist() for each in found] == [[h] for h in range(6)]
        assert [each.stay[0].tolist() for each in found] == [sorted(each) for each in kept]
        assert all(each.latest.numel() == 0 and each.window is None for each in found)
    assert s(keep=5).slots(100, (60, 3)) == 37 + 5 + 3 and s(keep=40, text=True).slots(100, (60,)) == 40


def task_kv():
    """Head by head and token by token, in float64."""
    s = registry.stage("task_kv")
    assert [s(keep=1, beta=0.25, least=4).whole(32, r, 5) for r in range(5)] == [9, 8, 7, 6, 5]
    assert [s(keep=1, beta=0.3, least=1).whole(8, r, 4) for r in range(4)] == [3, 3, 2, 2], "2.4, 1.9, 1.5, 1 and one"
    assert [s(keep=1, beta=0.5, least=0).whole(2, r, 3) for r in range(3)] == [2, 2, 1] and s(keep=1).whole(
        1, 0, 1
    ) == 1
    # Six heads, two of which keep all 10: (6 * 4 - 2 * 10) / 4 = 1; and (6 * 6 - 20) / 4 = 4.
    some = {"beta": 0.0, "least": 1}
    assert s(keep=4, **some).others(20, (10,), 6, (3, 4)) == (1,) and s(keep=6, **some).others(
        20, (10,), 6, (3, 4)
    ) == (4,)
    assert s(keep=2, **some).others(20, (10,), 6, (3, 4)) == (1,), "a budget that cannot be met"
    assert s(keep="50%", text=True, sink=1, recent=2, **some).others(20, (10,), 6, (3, 4)) == (5,)
    assert s(keep=1, text=True, **some).others(20, (10,), 6, (3, 4)) == (20,), "sinks and recent tokens are all"
    x = replace(layer(20, [range(2, 12)], heads=12, kv_heads=6), layer=2, depth=3)
    for options in ({"keep": 6}, {"keep": 9, "text": True, "sink": 1, "recent": 2}, {"keep": 6, "top": 3, "kernel": 3}):
        stage = s(beta=0.0, least=1, window=5, **options)
        attended, vectors = [], []
        for head in range(6):
            rows = torch.stack([attention(x, 2 * head + g)[-5:].mean(0) for g in range(2)])
            reach = stage.kernel // 2
            pooled = [rows[:, max(0, i - reach) : i + reach + 1].sum(1).mean() / stage.kernel for i in range(20)]
            attended.append([float(c) for c in pooled])
            chosen = best(attended[-1], stage.top)
            vectors.append(sum(attended[-1][i] * x.values[head, i].double() for i in chosen))
        distance = [float((v - sum(vectors) / 6).norm()) for v in vectors]
        order = sorted(range(6), key=lambda h: -distance[h])
        full, rest = stage.compress(x).classes
        assert full.heads.tolist() == sorted([order[0], order[-1]]) and rest.heads.tolist() == sorted(order[1:-1])
        assert full.stay.tolist() == [list(range(20))] and full.latest.numel() == rest.latest.numel() == 0
        (count,) = stage.others(20, (10,), 6, (2, 3))
        for row, head in enumerate(rest.heads.tolist()):
            always = [0, 18, 19] if stage.text else [0, 1, *range(12, 20)]
            rivals = [i for i in range(20) if i not in always]
            room = count - len(always) if stage.text else count
            kept = sorted(rivals, key=lambda i: (-attended[head][i], i))[:room]
            assert rest.stay[row].tolist() == sorted(always + kept)
        assert rest.window is full.window is None
    again = stage.compress(replace(x, classes=(torch.tensor([5, 1]), torch.tensor([4, 0, 3, 2]))))
    assert [c.heads.tolist() for c in again.classes] == [[5, 1], [4, 0, 3, 2]], "a later turn has no say in the heads"
    assert s(keep=5).slots(100, (60, 3)) == 37 + 5 + 3 and s(keep=40, text=True).slots(100, (60,)) == 40
