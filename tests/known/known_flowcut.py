"""FlowCut against a case worked by hand, the published formula's numbers, and a definition in plain float64 loops."""

from __future__ import annotations

from math import log, sqrt

import torch
from packing import tokens

from vtoken import registry
from vtoken.stages import Fact, VisualTokens


def flowcut():
    stage = registry.stage("flowcut")
    by_hand(stage)
    numbers_of_the_formula(stage)
    chain(stage(keep=3).for_depth(8), stage(keep=3))
    chain(stage(keep="25%", relevance=False, momentum=0.25).for_depth(8), stage(keep="25%"))


def by_hand(stage):
    """attention / 0.8 + relevance / 0.4, times |value|_1: 0.25 * 4 + 0.5 * 4 = 3, 0.5 * 2 + 0, 0.25 * 6 + 0.5 * 6 =
    4.5, 0 + 0."""
    facts = {
        "global_attention": torch.tensor([0.2, 0.4, 0.2, 0.0]),
        "value_attention": torch.tensor([0.2, 0.0, 0.2, 0.0]),
        "mean_value": torch.tensor([[1.0, -3], [2, 0], [-6, 0], [50, 50]]),
    }
    four = tokens(lengths=(4,), grid=((1, 2, 2),), **facts)
    assert stage(keep=2).select(four).index.tolist() == [0, 2]
    assert stage(keep=1).select(four).index.tolist() == [2]
    assert stage(keep=1, relevance=False).select(four).index.tolist() == [2], "1, 1, 1.5, 0"
    assert stage(keep=3, relevance=False).select(four).index.tolist() == [0, 1, 2]


def numbers_of_the_formula(stage):
    """CLIP-L, 576 patches after layer 1: how many go, by the normalised entropy of the attention."""
    for keep, gone in ((64, (0, 5, 11, 22, 41)), (192, (0, 3, 8, 16, 31))):
        for h, r in zip((1.0, 0.98, 0.95, 0.9, 0.8), gone, strict=True):
            given = with_facts(of_entropy(h, 576), torch.ones(576), torch.ones(576, 1), 1)
            assert stage(keep=keep).for_depth(24).select(given).lengths == (576 - r,)


def of_entropy(h, n):
    """Shares whose entropy is h log n."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        p = (torch.linspace(0, 1, n, dtype=torch.float64) * middle).softmax(0)
        low, high = (middle, high) if -float((p * p.log()).sum()) > h * log(n) else (low, middle)
    return p.float()


def with_facts(attention, relevance, values, layer, raster_index=None, memory=None, lengths=None, side=24):
    lengths = lengths or (len(attention),)
    raster_index = torch.arange(len(attention)) if raster_index is None else raster_index
    facts = {Fact("global_attention"): attention, Fact("value_attention"): relevance, Fact("mean_value"): values}
    parts = (((1, side, side),),) * len(lengths)
    memory = {} if memory is None else memory
    return VisualTokens.pack(
        values, lengths, parts, range(len(lengths)), raster_index, facts=facts, layer=layer, memory=memory
    )


def chain(stage, plain):
    """Three pictures through six layers, each against its own float64 run; the last cut always meets the target."""
    generator = torch.Generator().manual_seed(5)
    n, images, memory = 36, 3, {}
    kept = [list(range(n))] * images
    past = [{} for _ in range(images)]
    target = plain.keep.counts((n,), (0,))[0]
    for layer in range(6):
        a = torch.rand(images, n, generator=generator) ** torch.tensor([2.0, 4.0, 8.0])[:, None]
        m, v = torch.rand(images, n, generator=generator), torch.randn(images, n, 4, generator=generator)
        rows = [torch.tensor(k) for k in kept]
        packed = [torch.cat([x[i, r] for i, r in enumerate(rows)]) for x in (a, m, v)]
        given = with_facts(*packed, layer, torch.cat(rows), memory, tuple(map(len, kept)), 6)
        keep = stage.select(given)
        left = given.raster_index[keep.index].split(keep.lengths)
        before = kept
        kept = [one(stage, k, past[i], target, 5 - layer, a[i], m[i], v[i]) for i, k in enumerate(kept)]
        assert [part.tolist() for part in left] == kept
        assert layer % 2 or kept == before
        assert layer != 3 or len({len(k) for k in kept}) == images, "pictures differ in what they can lose"
    assert [len(k) for k in kept] == [target] * images


def one(stage, live, past, target, ahead, a, m, v):
    """One layer of one picture. `past` holds the cumulated score of every patch."""
    a, m, v = (x.double().tolist() for x in (a, m, v))
    total_a, total_m = sum(a[j] for j in live), sum(m[j] for j in live)
    for j in live:
        score = a[j] / total_a + (m[j] / total_m if stage.relevance else 0)
        score *= sum(abs(x) for x in v[j])
        past[j] = stage.momentum * past[j] + (1 - stage.momentum) * score if j in past else score
    if ahead % 2:
        return live
    gone = len(live) - target
    if ahead:
        h = sum(-a[j] / total_a * log(a[j] / total_a) for j in live) / log(len(live))
        gone = min(gone, round(gone / sqrt(ahead) * (1 - h**2)))
    losers = sorted(live, key=lambda j: past[j])[:gone]
    return [j for j in live if j not in losers]
