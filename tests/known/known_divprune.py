"""Known answers of the methods that look for diversity: DivPrune, CDPruner."""

from __future__ import annotations

from math import cos, radians, sin

import torch
from packing import tokens

from vtoken import registry


def on_circle(*degrees):
    return torch.tensor([[cos(radians(d)), sin(radians(d))] for d in degrees])


def unit(x):
    x = x.double()
    return x / x.norm(dim=1, keepdim=True)


def max_min(x, k):
    """Greedy max-min over the whole distance matrix, float64."""
    distance = 1 - unit(x) @ unit(x).T
    chosen = [int(distance.sort(dim=0).values[1].argmax())]
    while len(chosen) < k:
        others = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(others, key=lambda i: (float(distance[i, chosen].min()), -i)))
    return sorted(chosen)


def divprune():
    stage = registry.stage("divprune")
    five = tokens(on_circle(0, 10, 90, 95, 200), (5,), ((1, 1, 5),))
    assert stage(keep=1).select(five).index.tolist() == [4], "its neighbour is 105 degrees away"
    assert stage(keep=2).select(five).index.tolist() == [1, 4], "10 is 170 degrees from 200"
    assert stage(keep=3).select(five).index.tolist() == [1, 3, 4], "95 is 85 degrees from 10, 90 only 80"
    lengths = tokens(on_circle(0, 10, 90, 95, 200) * torch.tensor([[1.0], [9], [1], [0.1], [1]]), (5,), ((1, 1, 5),))
    assert stage(keep=3).select(lengths).index.tolist() == [1, 3, 4], "lengths do not matter"
    same = tokens(torch.ones(6, 3), (6,), ((1, 2, 3),))
    assert stage(keep=4).select(same).index.tolist() == [0, 1, 2, 3], "four different tokens even of duplicates"
    x = torch.randn(40 + 1100, 16, generator=torch.Generator().manual_seed(0))
    # One far from all the others, beyond the first block of the search for the first token.
    x[40:] += 4
    x[-9] -= 12
    keep = stage(keep=9).select(tokens(x, (40, 1100), ((1, 5, 8), (1, 44, 25))))
    assert keep.index.tolist() == max_min(x[:40], 9) + [40 + i for i in max_min(x[40:], 9)]


def most_volume(x, relevance, k):
    """Greedy determinants, each computed afresh in float64."""
    kernel = relevance[:, None] * (unit(x) @ unit(x).T) * relevance
    chosen = []
    while len(chosen) < k:
        others = [i for i in range(len(x)) if i not in chosen]
        sets = {i: [*chosen, i] for i in others}
        volume = {i: float(torch.linalg.slogdet(kernel[sets[i]][:, sets[i]]).logabsdet) for i in others}
        chosen.append(max(others, key=lambda i: (round(volume[i], 9), -i)))
    return sorted(chosen)


def relevance(x, text, sign):
    likeness = sign * (unit(x) @ unit(text.double().mean(0, keepdim=True)).T)[:, 0]
    return (likeness - likeness.min() + 1e-6) / (likeness.max() - likeness.min())


def cdpruner():
    stage = registry.stage("cdpruner")
    x = torch.tensor([[0.0, 1], [3, 0], [1, 0], [1, 0.2]])
    text = [torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.5]])]
    four = tokens(x, (4,), ((1, 2, 2),), text=text)
    # The text points to (1, .5): (1, .2) is nearest; what the others add is r^2 sin^2 of the angle to it, r of (0, 1)
    # being 0.
    assert stage(keep=1).select(four).index.tolist() == [3]
    assert stage(keep=2).select(four).index.tolist() == [1, 3], "the same direction twice: the lower index"
    assert stage(keep=1, negate=True).select(four).index.tolist() == [0]
    g = torch.Generator().manual_seed(3)
    x, words = torch.randn(30 + 17, 12, generator=g), [torch.randn(n, 12, generator=g) for n in (4, 1)]
    for negate, sign in ((False, 1), (True, -1)):
        batch = tokens(x, (30, 17), ((1, 5, 6), (1, 17, 1)), row=(1, 0), text=words)
        keep = stage(keep=8, negate=negate).select(batch)
        first = most_volume(x[:30], relevance(x[:30], words[1], sign), 8)
        second = most_volume(x[30:], relevance(x[30:], words[0], sign), 8)
        assert keep.index.tolist() == first + [30 + i for i in second], "each image with the text of its row"
    silent = tokens(x, (30, 17), ((1, 5, 6), (1, 17, 1)), text=[torch.zeros(0, 12)] * 2)
    index = stage(keep=8).select(silent).index.tolist()
    assert index[:8] == most_volume(x[:30], torch.ones(30).double(), 8), "no text: diversity alone"
    last = tokens(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), (3,), ((1, 1, 3),), text=[torch.tensor([[1, 0.5]])])
    assert stage(keep=2).select(last).index.tolist() == [0, 2], "the least relevant adds more than a duplicate"
    copies = tokens(x[:3].repeat(8, 1), (24,), ((1, 4, 6),), text=[words[0]])
    index = stage(keep=12).select(copies).index.tolist()
    assert set(range(9)) <= set(index) and len(index) == 12, "rounding errors do not choose"
    twins = torch.eye(3).repeat(4, 1)
    low_rank = tokens(twins, (12,), ((1, 3, 4),), text=[torch.ones(1, 3)])
    assert stage(keep=3).select(low_rank).index.tolist() == [0, 1, 2]
    assert stage(keep=7).select(low_rank).index.tolist() == list(range(7)), "beyond the rank the lowest indices"
