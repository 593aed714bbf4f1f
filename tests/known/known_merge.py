"""Known answers of ToMe, DToMe and DToMe-post: by hand, and against a definition on lists in float64 that compares
everything with everything."""

from __future__ import annotations

from math import cos, radians, sin

import torch
from packing import tokens

from vtoken import registry
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.stages import Fact, Keep, VisualTokens, image_of

ANGLES = (0, 10, 90, 95, 200, 230)  # of six keys: neighbours are 10, 80, 5, 105 and 30 degrees apart


def step(groups, keys, limit, cls):
    """One match in one picture.

    Args:
        groups: lists of members, in the order of the last match; the first member of each is the one that stands for
            it.
        keys: representative -> key.
        limit: similarity of the pairs, best first -> how many merge.

    Returns:
        the groups that are left, in the order of the next match.
    """
    sequence = ([None] if cls else []) + groups
    n = len(sequence)
    unit = [None if g is None else keys[g[0]].double() / keys[g[0]].double().norm() for g in sequence]
    every = torch.full((n, n), -torch.inf, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if sequence[i] is not None and sequence[j] is not None and i % 2 == 0 and j % 2 == 1:
                every[i, j] = unit[i] @ unit[j]
    best = {i: max(range(1, n, 2), key=lambda j: (every[i, j], -j)) for i in range(0, n, 2) if n > 1}
    real = [i for i in best if sequence[i] is not None]
    ranked = sorted(real, key=lambda i: (-every[i, best[i]], i))
    count = min(limit([every[i, best[i]].item() for i in ranked]), len(groups) // 2)
    if not count:
        return groups
    joined = {j: list(sequence[j]) for j in range(1, n, 2)}
    for i in ranked[:count]:
        joined[best[i]] += sequence[i]
    left = sorted(ranked[count:]) if cls else ranked[count:]
    return [sequence[i] for i in left] + [joined[j] for j in range(1, n, 2)]


def layers(stage, lengths, cls, depth, seed=0):
    """Runs a stage layer by layer on random keys, as a tower does, and after every layer holds it against `step`,
    picture by picture."""
    generator = torch.Generator().manual_seed(seed)
    lineage = TokenHistory(lengths, torch.cat([torch.arange(n) for n in lengths]), lengths)
    groups, memory = [[[k] for k in range(n)] for n in lengths], {}
    x = everything = torch.randn(sum(lengths), 3, generator=generator).double()
    counts = []
    for layer in range(depth):
        every = torch.randn(sum(lengths), 4, generator=generator) + 0.6
        start = torch.tensor([0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()])
        image = image_of(lineage.lengths, x.device)
        found = VisualTokens.pack(
            x,
            lineage.lengths,
            [((1, 1, n),) for n in lengths],
            range(len(lengths)),
            lineage.raster_index,
            facts={Fact("mean_key"): every[start[image] + lineage.raster_index]},
            layer=layer,
            memory=memory,
            size=lineage.size,
            lead=int(cls),
        )
        keep = stage.select(found)
        x, lineage = keep.apply(x), lineage.advance(keep)
        homes = lineage.into() or [torch.arange(n) for n in lengths]
        for i, keys in enumerate(every.split(list(lengths))):
            groups[i] = step(groups[i], keys, lambda s, at=layer: rule(stage, s, at), cls)
            want = sorted((g[0], sorted(g)) for g in groups[i])
            assert lineage.kept()[i].tolist() == [first for first, _ in want]
            got = [(homes[i] == first).nonzero()[:, 0].tolist() for first, _ in want]
            assert got == [members for _, members in want]
            members = everything.split(list(lengths))[i]
            means = torch.stack([members[sorted(g)].mean(0) for _, g in want])
            torch.testing.assert_close(x[lineage_rows(lineage, i)], means, atol=1e-5, rtol=1e-5)
        counts.append(lineage.lengths)
    return counts


def lineage_rows(lineage, image):
    start = sum(lineage.lengths[:image])
    return slice(start, start + lineage.lengths[image])


def rule(stage, similarities, layer):
    if hasattr(stage, "r"):
        return stage.schedule(9)[layer]
    return sum(s > stage.thresholds[layer] for s in similarities)


def circle(lead, **more):
    keys = torch.tensor([[cos(radians(a)), sin(radians(a))] for a in ANGLES]) * torch.arange(1, 7)[:, None]
    found = tokens(mean_key=keys, **more)
    return VisualTokens(**{**vars(found), "lead": lead, "memory": {}})


def same(keep, index, into):
    assert keep.index.tolist() == index and keep.into.tolist() == into and keep.lengths == (len(index),)


def tome():
    cls = registry.stage("tome")
    # Sides 0 2 4 and 1 3 5: 2 joins 3, then 0 joins 1. Behind CLS sides 1 3 5 and 0 2 4: 3 joins 2, then 1 joins 0.
    same(cls(r=1).select(circle(0)), [0, 1, 3, 4, 5], [0, 1, 2, 2, 3, 4])
    same(cls(r=2).select(circle(0)), [1, 3, 4, 5], [0, 0, 1, 1, 2, 3])
    same(cls(r=1).select(circle(1)), [0, 1, 2, 4, 5], [0, 1, 2, 2, 3, 4])
    same(cls(r=9).select(circle(1)), [0, 2, 4], [0, 0, 1, 1, 2, 2])
    # The order of the next layer is 0 4 1 3 5 (4 was less similar than 0): sides 0 1 5 and 4 3; 5 joins 4.
    first = circle(0)
    keep = cls(r=1).select(first)
    left = {"mean_key": first.fact("mean_key")[keep.index]}
    after = VisualTokens(
        **{
            **vars(tokens(torch.ones(5, 2), (5,), ((1, 2, 3),), raster_index=keep.index, **left)),
            "memory": first.memory,
        }
    )
    same(cls(r=1).select(after), [0, 1, 2, 3], [0, 1, 2, 3, 3])
    assert cls(r=0).select(circle(0)).into is None
    assert cls(r=10, inflection=-1).schedule(5) == (20, 15, 10, 5, 0) and cls(r=(3, 1)).schedule(4) == (3, 1, 0, 0)
    assert cls(r=8, inflection=0.5).schedule(3) == (4, 8, 12)
    for with_cls in (False, True):
        assert layers(cls(r=(2, 0, 3, 1)), (16, 9, 1, 7), with_cls, 4)[-1] == (10, 3, 1, 2)


def dtome():
    cls = registry.stage("dtome")
    near, nearer = cos(radians(20)), cos(radians(7))
    same(cls(thresholds=(near,)).select(circle(0)), [1, 3, 4, 5], [0, 0, 1, 1, 2, 3])
    same(cls(thresholds=(nearer,)).select(circle(1)), [0, 1, 2, 4, 5], [0, 1, 2, 2, 3, 4])
    assert cls(thresholds=(1.01,)).select(circle(0)).into is None
    both = torch.tensor([[1.0, 0], [1, 0]])
    assert cls(thresholds=(1.0,)).select(tokens(torch.ones(2, 2), (2,), ((1, 1, 2),), mean_key=both)).into is None
    for with_cls in (False, True):
        counts = layers(cls(thresholds=(0.8, 0.9, 0.5, 0.7)), (16, 9, 1, 7, 12), with_cls, 4)
        assert len(set(counts[0])) > 2, "pictures lose different numbers"


def dtome_post():
    """Rounds on a picture of two frames: keys are means over members, and frames do not mix."""
    cls = registry.stage("dtome_post")
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(26, 4, generator=generator).double() + 0.6
    lengths, segment = (16, 10), torch.tensor([0] * 8 + [1] * 8 + [0] * 10)
    found = tokens(torch.ones(26, 2), lengths, ((2, 2, 4), (1, 2, 5)), segment=segment, mean_key=keys)
    limits = (0.85, 0.8, 0.6)
    keep = cls(thresholds=limits).select(found)
    want = []
    for start, n in ((0, 8), (8, 8), (16, 10)):
        groups = [[k] for k in range(n)]
        for limit in limits:
            means = {g[0]: keys[start:][g].mean(0) for g in groups}
            groups = step(groups, means, lambda s, t=limit: sum(v > t for v in s), cls=False)
        want += sorted((start + g[0], sorted(start + k for k in g)) for g in groups)
    assert keep.index.tolist() == [first for first, _ in want] and sum(keep.lengths) == len(want) < 20
    assert [(keep.into == slot).nonzero()[:, 0].tolist() for slot in range(len(want))] == [g for _, g in want]
    assert isinstance(keep, Keep) and keep.lengths[1] == sum(first >= 16 for first, _ in want)
