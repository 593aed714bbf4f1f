"""Known answers of VFlowOpt: by hand, and by a definition in float64 that grows the pool token by token."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from packing import tokens as packed

from vtoken import registry
from vtoken.hooks.vision import encoder_facts as facts
from vtoken.stages import Fact, size_of


def tokens(*args, received_attention, pixels=None, threshold=34.76, **options):
    """Packed tokens with the attention received from the queries above the threshold."""
    given = packed(*args, **options)
    found = {Fact("received_attention", above=threshold): received_attention, Fact("pixels"): pixels}
    return replace(given, facts=found)


def cell_of(raster_index, parts, side):
    """(raster, frame, row of cells, column of cells) of an unpruned token."""
    for number, (t, h, w) in enumerate(parts):
        if raster_index < t * h * w:
            return (
                number,
                raster_index // (h * w),
                math.floor(raster_index // w % h / side),
                math.floor(raster_index % w / side),
            )
        raster_index -= t * h * w
    raise IndexError(raster_index)


def by_recycling(importance, cells, k=None, size=None):
    """{token that stays: what it takes in} when the pool grows until k are left, or to a size."""
    order = sorted(range(len(importance)), key=lambda i: (importance[i], -i))

    def groups(pool):
        members = {}
        for i in pool:
            members.setdefault(cells[i], []).append(i)
        return [(max(m, key=lambda i: (importance[i], -i)), sorted(m)) for m in members.values()]

    for grown in range(len(order) + 1) if size is None else [min(size, len(order))]:
        pool = order[:grown]
        out = {i: [i] for i in order[grown:]} | dict(groups(pool))
        if k is not None and len(out) == k:
            break
    best = sorted(out, key=lambda i: (-importance[i], i))[: k if k is not None else None]
    return {i: out[i] for i in sorted(best)}


def follows(keep, want, x, weight, first=0, before=0):
    """Holds a decision about one image, whose packed rows begin at `first` and kept slots at `before`, against
    `by_recycling`."""
    index = keep.index[before : before + len(want)] - first
    assert index.tolist() == list(want)
    merged = keep.apply(x)[before : before + len(want)].double()
    for slot, members in enumerate(want.values()):
        rows, w = x[first:].double()[members], torch.tensor([weight[i] for i in members]).double()[:, None]
        torch.testing.assert_close(merged[slot], (rows * w).sum(0) / w.sum(), rtol=1e-5, atol=1e-5)
    taken = {i: slot + before for slot, members in enumerate(want.values()) for i in members}
    assert keep.into[first : first + len(weight)].tolist() == [taken.get(i, -1) for i in range(len(weight))]


def vflowopt():
    stage = registry.stage("vflowopt")
    calibration(stage)
    by_hand(stage)
    recycling(stage)
    entropy(stage)
    with pytest.raises(ValueError, match="one pool per image, so per_frame does not fit"):
        stage(keep={"per_frame": 2})


def calibration(stage):
    # Two segments, the second without a query above the threshold: its most received one counts alone.
    g, held, heads = torch.Generator().manual_seed(1), (7, 5), 2
    q, k = (torch.randn(12, heads, 4, generator=g) * 2 for _ in range(2))
    for cls in (False, True):
        for above in (0.0, 1.2, 50.0):
            layer = facts.EncoderLayer({"q": q, "k": k}, held, 0.5, cls)
            got = facts.compute(Fact("received_attention", above=above), layer)
            for start, n in ((0, 7), (7, 5)):
                a = torch.stack([(q[start : start + n, h].double() @ k[start : start + n, h].double().T * 0.5).softmax(1) for h in range(heads)]).mean(0)  # fmt: skip
                mean = a.mean(0).tolist()
                patches = range(int(cls), n)
                level = above * sum(mean[i] for i in patches) / len(patches)
                rows = [i for i in patches if mean[i] > level] or [max(patches, key=lambda i: mean[i])]
                rows = list(range(n)) if not above else rows
                torch.testing.assert_close(
                    got[start : start + n], a[rows].mean(0).float(), msg=str((cls, above, start))
                )
    assert stage(keep=3).needs() == (Fact("received_attention", above=34.76),)
    assert stage(keep=3, threshold=0).needs() == (Fact("received_attention"),)


def by_hand(stage):
    # One row of 6 in cells of 3: a pool of {4, 1} leaves all six, {4, 1, 0} five, {4, 1, 0, 5} four.
    received = torch.tensor([0.3, 0.1, 0.9, 0.8, 0.0, 0.7])
    x = torch.tensor([[4.0], [8.0], [1.0], [2.0], [3.0], [5.0]])
    given = tokens(x, (6,), ((1, 1, 6),), received_attention=received)
    keep = stage(keep=5, cell=3).select(given)
    assert keep.index.tolist() == [0, 2, 3, 4, 5] and keep.into.tolist() == [0, 0, 1, 2, 3, 4]
    torch.testing.assert_close(keep.apply(x)[0, 0], torch.tensor((0.3 * 4 + 0.1 * 8) / 0.4))
    four = stage(keep=4, cell=3).select(given)
    assert four.index.tolist() == [0, 2, 3, 5] and four.into.tolist() == [0, 0, 1, 2, 3, 3]
    assert stage(keep=1, cell=3).select(given).into.tolist() == [0, 0, 0, -1, -1, -1], "the best cell alone"
    assert stage(keep=4, cell=None).select(given).index.tolist() == [0, 2, 3, 5]
    # round(6 * 0.5) + int(6 / 3^2) = 3 are pooled: 4, 1 and 0, in two cells.
    assert stage(keep="50%", cell=3, exact=False).select(given).index.tolist() == [0, 2, 3, 4, 5]
    low = torch.tensor([0.1, 0.1, 0.9, 0.9])
    both = tokens(lengths=(4, 6), grid=((1, 1, 4), (1, 1, 6)), received_attention=torch.cat([low, received]))
    assert stage(keep=4, cell=1.2, exact=False).select(both).lengths[0] == 4, "fits, so nothing is pooled"
    # round(6 * (1 - 0.25)) + int(6 / 2^2) = 4 + 1 are pooled; cells of two.
    pooled = stage(keep="25%", cell=2, exact=False).select(given)
    assert pooled.index.tolist() == [0, 2, 3, 5] and pooled.into.tolist() == [0, 0, 1, 2, 3, 3]


def recycling(stage):
    for seed, (parts, side, k) in enumerate(
        [
            (((1, 7, 9),), 3.0, 30),
            (((1, 7, 9),), 2.6, 16),
            (((1, 7, 9),), 1.5, 11),
            (((1, 5, 5), (1, 8, 10)), 3.7, 40),
            (((1, 5, 5), (1, 8, 10)), 3.7, 14),
            (((3, 4, 4),), 2.5, 20),
            (((1, 6, 6),), 1.0, 13),
        ]
    ):
        n, g = size_of(parts), torch.Generator().manual_seed(seed)
        weight = (torch.rand(n, generator=g) * 20).round() / 20 + 0.05  # with ties
        x = torch.randn(n, 3, generator=g)
        cells = [cell_of(i, parts, side) for i in range(n)]
        given = tokens(x, (n,), parts=(parts,), received_attention=weight)
        want = by_recycling(weight.tolist(), cells, k)
        assert len(want) == k
        follows(stage(keep=k, cell=side).select(given), want, x, weight.tolist())
        want = by_recycling(weight.tolist(), cells, size=n - k + int(n / side**2))
        follows(stage(keep=k, cell=side, exact=False).select(given), want, x, weight.tolist())

        # The same image behind one that keeps all, in a batch, and thinned out.
        both = tokens(
            torch.cat([torch.ones(4, 3), x]),
            (4, n),
            parts=(((1, 2, 2),), parts),
            received_attention=torch.cat([torch.ones(4), weight]),
        )
        whole = by_recycling(weight.tolist(), cells, k)
        follows(stage(keep=k, cell=side).select(both), whole, both.x, weight.tolist(), 4, 4)
        raster_index = torch.arange(0, n, 2)
        thin = tokens(
            x[raster_index],
            (len(raster_index),),
            parts=(parts,),
            raster_index=raster_index,
            received_attention=weight[raster_index],
        )
        want = by_recycling(weight[raster_index].tolist(), [cells[i] for i in raster_index], k // 2)
        follows(stage(keep=k // 2, cell=side).select(thin), want, x[raster_index], weight[raster_index].tolist())


def bits(values):
    return -sum(c / len(values) * math.log2(c / len(values)) for c in Counter(values).values())


def entropy(stage):
    """Six tokens of 2 x 2 pixels in three colours, of two crops."""
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 4, (6, 3, 4), generator=g) * 60
    levels[0], levels[1] = 255, torch.tensor([0, 0, 30, 30])
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    normal = (levels / 255 - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    grey = [[round(sum(c) / 3) for c in zip(*token, strict=True)] for token in levels.tolist()]
    want = [bits(values) for values in grey]
    assert want[:2] == [0, 1]
    options = {"keep": 3, "alpha": -0.5, "mean": mean, "std": std}
    torch.testing.assert_close(stage(**options).entropy(normal.flatten(1)), torch.tensor(want))
    pairs = stage(**options, merge=2).entropy(normal.reshape(3, 24))
    torch.testing.assert_close(pairs, torch.tensor([bits(grey[i] + grey[i + 1]) for i in (0, 2, 4)]))
    assert "write merge: 4" in stage(**options, merge=3).tower_incompatibility(32, 4)

    received, segment = torch.rand(6, generator=g), torch.tensor([0, 0, 1, 1, 1, 1])
    crops = [want[:2], want[2:]]
    soft = [math.exp(h) / sum(map(math.exp, crop)) for crop in crops for h in crop]
    facts = {"received_attention": received, "pixels": normal.flatten(1)}
    given = tokens(lengths=(6,), parts=(((1, 1, 2), (1, 1, 4)),), segment=segment, **facts)
    assert stage(**options).needs() == (Fact("received_attention", above=34.76), Fact("pixels"))
    torch.testing.assert_close(stage(**options).score(given), received - 0.5 * torch.tensor(soft))
    pair = tokens(lengths=(2, 4), parts=(((1, 1, 2),), ((1, 1, 4),)), **facts)
    torch.testing.assert_close(stage(**options).score(pair), received - 0.5 * torch.tensor(soft))
    assert torch.equal(stage(keep=3).score(given), received)
    # Importance 0.1 and -0.09: a mean with such weights would lie far outside.
    mixed = {
        "received_attention": torch.tensor(soft) + torch.tensor([0.1, -0.09, 0, 0, 0, 0]),
        "pixels": facts["pixels"],
    }
    given = tokens(lengths=(6,), parts=(((1, 1, 2), (1, 1, 4)),), segment=segment, **mixed)
    keep = stage(**{**options, "keep": 2, "alpha": -1.0}).select(given)
    assert keep.index.tolist()[0] == 0 and keep.into[1] == 0
    torch.testing.assert_close(keep.apply(given.x)[0], given.x[0])
