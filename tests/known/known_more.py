"""FoPru, ToDRE, VMTC, TextMonkey's filter and the two outlier filters: by hand, and against definitions written another
way."""

from __future__ import annotations

from dataclasses import replace

import torch
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens.vmtc import condense, k_means
from vtoken.stages import Fact

CROPS = ((1, 2, 2), (1, 2, 4))  # two crops of 2 x 2 side by side, and the whole
SEGMENT = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2])


def stage(name, **options):
    return registry.stage(name)(**options)


def directions(*degrees):
    """Unit vectors in the plane."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1).float()


def anyres(x=None, **facts):
    return tokens(torch.zeros(12, 2) if x is None else x, (12,), parts=(CROPS,), segment=SEGMENT, **facts)


def fopru():
    scores = torch.tensor([1.0, 9, 1, 3, 3, 3, 2, 2, 8])  # means of the rows: 11/3, 3, 4
    grid = {"lengths": (9,), "grid": ((1, 3, 3),), "received_attention": scores}
    assert stage("fopru", keep=3).select(tokens(**grid)).index.tolist() == [1, 3, 8], (
        "single tokens, ties to the lower index"
    )
    kept = [stage("fopru", keep=k, strategy="row").select(tokens(**grid)).index.tolist() for k in range(1, 9)]
    order = [8, 6, 7, 1, 0, 2, 3, 4]  # rows 2, 0, 1
    assert kept == [sorted(order[:k]) for k in range(1, 9)]
    raster_index = torch.tensor([3, 4, 5, 8])
    thinned = tokens(
        lengths=(4,), grid=((1, 3, 3),), raster_index=raster_index, received_attention=scores[raster_index]
    )
    assert stage("fopru", keep=2, strategy="row").select(thinned).index.tolist() == [0, 3], "means, not sums"
    equal = tokens(lengths=(4,), grid=((1, 2, 2),), received_attention=torch.tensor([1.0, 9, 5, 5]))
    assert stage("fopru", keep=2, strategy="row").select(equal).index.tolist() == [0, 1], "rows are not mixed"
    video = torch.tensor([5.0, 1, 2, 2, 7, 7, 0, 0])
    two = tokens(lengths=(8, 4), grid=((2, 2, 2), (1, 2, 2)), received_attention=torch.cat([video, torch.arange(4.0)]))
    keep = stage("fopru", keep=3, strategy="row").select(two)
    assert keep.index.tolist() == [0, 4, 5, 9, 10, 11] and keep.lengths == (3, 3), "frames have rows of their own"
    crops = anyres(received_attention=torch.tensor([1.0, 2, 3, 4, 9, 9, 1, 2, 0, 0, 8, 0]))
    keep = stage("fopru", keep={"per_crop": 2}, strategy="row").select(crops)
    assert keep.index.tolist() == [2, 3, 4, 5, 10, 11], "a row ends where its crop ends"
    whole = stage("fopru", keep=4, strategy="row").select(crops)
    assert whole.index.tolist() == [4, 5, 6, 7], "the first row of the stitched crops"


def max_sum(x, first, k):
    """Greedy by brute force in float64."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    taken = [first]
    while len(taken) < k:
        rest = [i for i in range(len(x)) if i not in taken]
        taken.append(min(rest, key=lambda i: float(sum(x[i] @ x[j] for j in taken))))
    return taken


def k_center(x, first, k):
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    taken = [first]
    while len(taken) < k:
        rest = [i for i in range(len(x)) if i not in taken]
        taken.append(max(rest, key=lambda i: float(min(1 - x[i] @ x[j] for j in taken))))
    return taken


def todre():
    last = Fact("cls_attention", -1)
    # From 0 degrees: 180 is opposite. Then the sums are 0 everywhere but k-center takes 90; lengths do not matter.
    x = directions(0, 10, 90, 170, 180) * torch.tensor([[1.0], [5], [1], [5], [1]])
    v = replace(tokens(x, (5,), ((1, 1, 5),)), facts={last: torch.tensor([0.5, 0.1, 0.1, 0.1, 0.2])})
    assert stage("todre", keep=2).select(v).index.tolist() == [0, 4]
    assert stage("todre", keep=3, strategy="k_center").select(v).index.tolist() == [0, 2, 4]
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x, attention = torch.randn(40, 5, generator=g), torch.rand(40, generator=g)
        v = replace(tokens(x, (40,), ((1, 5, 8),)), facts={last: attention})
        for name, greedy in (("max_sum", max_sum), ("k_center", k_center)):
            want = greedy(x, int(attention.argmax()), 17)
            assert stage("todre", keep=17, strategy=name).select(v).index.tolist() == sorted(want), (name, seed)
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    attention = torch.tensor([0.1, 0.2, 0.4, 0.3, 0, 0, 0, 0, 0.9, 0, 0.8, 0])
    v = replace(anyres(x), facts={last: attention})
    assert stage("todre", keep=1).select(v).index.tolist() == [2], "the pivot is one of the whole"
    assert stage("todre", keep=5).select(v).index.tolist() == sorted(max_sum(x, 2, 5))
    each = stage("todre", keep={"per_crop": 2}).select(v).index.tolist()
    pools = [[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11]]
    want = [p[i] for p, first in zip(pools, (2, 2, 2), strict=True) for i in max_sum(x[p], first, 2)]
    assert each == sorted(want), "a pool per crop, with a pivot of its own"
    same = replace(tokens(torch.ones(6, 2)), facts={last: torch.tensor([0.0, 0, 0, 1, 0, 0])})
    assert stage("todre", keep=3).select(same).index.tolist() == [0, 1, 3], "never the same token twice"


def textmonkey():
    x = directions(0, 80, 0, 81, 200, 40)
    # Highest cosine to a later token, as an angle: 0 (token 2), 1 (token 3), 40, 41, 160, none.
    kept = [stage("textmonkey", keep=k).select(tokens(x)).index.tolist() for k in range(1, 6)]
    assert kept == [[5], [4, 5], [3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]]
    # With earlier ones too: 0, 1, 0, 1, 119, 40.
    assert stage("textmonkey", keep=2, symmetric=True).select(tokens(x)).index.tolist() == [4, 5]
    assert stage("textmonkey", keep=4, symmetric=True).select(tokens(x)).index.tolist() == [1, 3, 4, 5]
    big = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))  # more rows than one piece of the map
    unit = torch.nn.functional.normalize(big.double(), dim=-1)
    cosine = unit @ unit.T - 2 * torch.ones(1500, 1500, dtype=torch.float64).tril()  # as the paper masks it
    want = cosine.max(1).values.argsort()[:700].sort().values
    both = tokens(torch.cat([big[:3], big]), (3, 1500), ((1, 1, 3), (1, 30, 50)))
    assert torch.equal(stage("textmonkey", keep=700).select(both).index, torch.cat([torch.arange(3), want + 3]))
    for length in (1.0, 100.0):
        assert stage("textmonkey", keep=3).select(tokens(x * length)).index.tolist() == kept[2]


def clusters_by_loops(x, seeds, rounds):
    """Spherical k-means in float64, token by token."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    centres = [x[s] for s in seeds]
    for _ in range(rounds + 1):
        member = [max(range(len(centres)), key=lambda c: float(t @ centres[c])) for t in x]
        sums = [sum((t for t, m in zip(x, member, strict=True) if m == c), 0 * x[0]) for c in range(len(centres))]
        centres = [s / s.norm() if s.any() else s for s in sums]
    return member


def vmtc():
    # Primary: tokens 5 and 6. Seeds: tokens 1 and 3, from which k-means finds {0, 2, 4} and {1, 3}.
    x = directions(0, 90, 10, 100, 5, 45, 45) * torch.tensor([[2.0], [1], [1], [1], [1], [1], [1]])
    attention = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.1, 0.9, 0.8])
    v = tokens(x, (7,), ((1, 1, 7),), cls_attention=attention)
    keep = stage("vmtc", keep=4, one_in=2).select(v)
    assert keep.index.tolist() == [1, 2, 5, 6] and keep.into.tolist() == [1, 0, 1, 0, 1, 2, 3]
    mean = (0.1 * x[0] + 0.3 * x[2] + 0.1 * x[4]) / 0.5
    torch.testing.assert_close(keep.apply(x), torch.stack([0.8 * x[1] + 0.2 * x[3], mean, x[5], x[6]]))
    keep = stage("vmtc", keep=1).select(v)
    assert keep.index.tolist() == [5] and torch.equal(keep.apply(x), x[5:6]), "a single token absorbs nothing"

    g = torch.Generator().manual_seed(0)
    x, attention = torch.randn(60, 4, generator=g), torch.rand(60, generator=g)
    keep = stage("vmtc", keep=24, one_in=3, iterations=4).select(
        tokens(x, (60,), ((1, 6, 10),), cls_attention=attention)
    )
    primary = attention.argsort(descending=True)[:16].tolist()
    rest = [i for i in range(60) if i not in primary]
    member = clusters_by_loops(x[rest], [(2 * c + 1) * 44 // 16 for c in range(8)], 4)
    groups = [[i for i, m in zip(rest, member, strict=True) if m == c] for c in range(8)]
    want = {i: x[i].double() for i in primary}
    for group in groups:
        weight = attention[group].double()
        want[group[int(weight.argmax())]] = (weight[:, None] * x[group]).sum(0) / weight.sum()
    assert keep.index.tolist() == sorted(want)
    torch.testing.assert_close(
        keep.apply(x).double(), torch.stack([want[i] for i in sorted(want)]), atol=1e-6, rtol=1e-5
    )
    early = clusters_by_loops(x[rest], [(2 * c + 1) * 44 // 16 for c in range(8)], 0)
    assert early != member, "the rounds matter"

    assert k_means(directions(0, 0, 180, 0), 2, 1).tolist() == [0, 0, 1, 0], "an empty cluster draws the odd one"
    equal = tokens(torch.ones(9, 3), (9,), ((1, 3, 3),), cls_attention=torch.zeros(9))
    keep = stage("vmtc", keep=6, one_in=2).select(equal)
    assert keep.lengths == (6,) and torch.equal(keep.apply(torch.ones(9, 3)), torch.ones(6, 3)), (
        "empty clusters, no attention"
    )
    kept, into = condense(torch.tensor([0, 0, 0, 2]), torch.tensor([0.1, 0.3, 0.2, 0.0]), 3)
    assert sorted(kept.tolist()) == [1, 2, 3] and into.tolist() == [1, 1, 2, 3], (
        "an empty cluster's place goes to the next best"
    )
    keep = stage("vmtc", keep={"per_crop": 3}, one_in=2).select(
        anyres(torch.randn(12, 3, generator=g), cls_attention=torch.rand(12, generator=g))
    )
    assert torch.bincount(SEGMENT[keep.index]).tolist() == [3, 3, 3]
    assert torch.equal(SEGMENT[keep.index][keep.into], SEGMENT), "nothing leaves its crop"


def var_filter():
    x = torch.full((6, 16), 0.1)
    x[2, 3], x[4, 5] = 30.0, -30.0
    x[5, 7] = 0.5
    v = tokens(x)
    # 30 / sqrt((900 + 15 * 0.01) / 16) = 3.9997 root mean squares; at most 4 in 16 channels.
    assert stage("var_filter", tau=3.9).select(v).index.tolist() == [0, 1, 3, 5]
    assert stage("var_filter", tau=3.9, dims=(3,)).select(v).index.tolist() == [0, 1, 3, 4, 5]
    assert stage("var_filter", tau=3.9, dims=(5, 3)).select(v).lengths == (4,)
    assert stage("var_filter").select(v).lengths == (6,), "20 is out of reach here"
    assert stage("var_filter", tau=2.0).select(v).lengths == (3,)
    pair = tokens(torch.cat([x, x[[2, 4]]]), (6, 2), ((1, 2, 3), (1, 1, 2)))
    keep = stage("var_filter", tau=3.9).select(pair)
    assert keep.index.tolist() == [0, 1, 3, 5, 6] and keep.lengths == (4, 1), "one always stays"
    assert not stage("var_filter", dims=(3, 1415)).incompatibility(4, 1416) and not stage("var_filter").incompatibility(
        4, 16
    )
    assert "channels [3, 1415] of another LLM" in stage("var_filter", dims=(3, 1415)).incompatibility(4, 1415)
    assert not stage("var_filter", dims=(1415, 2533)).incompatibility(32, 4096)
    assert "of LLaMA-2-7B, not" in stage("var_filter", dims=(2533, 1415)).incompatibility(28, 3584)


def damro_filter():
    attention = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.0, 0.2])
    v = tokens(cls_attention=attention)
    assert stage("damro_filter", outliers=3).select(v).index.tolist() == [0, 4, 5]
    assert stage("damro_filter").select(v).index.tolist() == [4], "one always stays"
    assert stage("damro_filter", outliers=1).select(v).index.tolist() == [0, 2, 3, 4, 5], "ties to the lower index"
    # Lengths 1, 2, 3, 4, 5, 100: Q1 = 2.25, Q3 = 4.75, so above 8.5.
    long = tokens(cls_attention=attention, features=torch.tensor([[1.0], [100], [2], [3], [4], [5]]))
    assert stage("damro_filter", outliers=2, high_norm=True).select(long).index.tolist() == [0, 2, 3, 4, 5]
    short = tokens(cls_attention=attention, features=torch.tensor([[100.0], [1], [2], [3], [4], [5]]))
    assert stage("damro_filter", outliers=2, high_norm=True).select(short).lengths == (6,)
    crops = anyres(cls_attention=torch.tensor([0.9, 0, 0, 0.8, 0, 0, 0.1, 0, 0, 0.7, 0, 0.6]))
    assert stage("damro_filter", outliers=2).select(crops).index.tolist() == [1, 2, *range(4, 12)]
    each = stage("damro_filter", outliers=1, each_segment=True)
    assert each.select(crops).index.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert each.select(crops).lengths == each.expected_counts((12,), (CROPS,), (0,))
