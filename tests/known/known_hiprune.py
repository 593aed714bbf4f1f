"""Known answers of HiPrune and MMR."""

from __future__ import annotations

import torch
from known_divprune import on_circle, unit
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens.hiprune import neighbours
from vtoken.stages import Fact, VisualTokens


def two_layers(middle, last, lengths, parts, segment=None, raster_index=None):
    """Received attention of layer 8 and of the layer of the features."""
    x = torch.zeros(sum(lengths), 2)
    index = torch.cat([torch.arange(n) for n in lengths]) if raster_index is None else raster_index
    facts = {Fact("received_attention", 8): middle, Fact("received_attention"): last}
    row = tuple(range(len(lengths)))
    return VisualTokens.pack(x, lengths, parts, row, index, segment=segment, facts=facts)


def by_hand(middle, last, width, height, k, alpha):
    """HiPrune of one raster with plain sets."""
    order = sorted(range(len(middle)), key=lambda i: (-float(middle[i]), i))
    anchors = order[: round(k * alpha / 5)]
    near = {
        (y + dy) * width + x + dx
        for y, x in (divmod(i, width) for i in anchors)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))
        if 0 <= y + dy < height and 0 <= x + dx < width
    } - set(anchors)
    rank = {i: 2 if i in anchors else int(i in near) for i in range(len(last))}
    return sorted(sorted(rank, key=lambda i: (-rank[i], -float(last[i]), i))[:k])


def hiprune():
    stage = registry.stage("hiprune")
    middle, last = torch.zeros(12), torch.linspace(0.01, 0.12, 12)
    middle[4] = 0.5  # first of the second row of a 3 x 4 raster
    one = two_layers(middle, last, (12,), (((1, 3, 4),),))
    # One anchor, 4; beside it 0, 5 and 8; the others by the last layer.
    assert stage(keep=5, alpha=1.0).select(one).index.tolist() == [0, 4, 5, 8, 11]
    assert stage(keep=5, alpha=1.0, wrapped=True).select(one).index.tolist() == [0, 3, 4, 5, 8], "3 ends the row above"
    assert stage(keep=3, alpha=1.0).select(one).index.tolist() == [4, 5, 8], "of the neighbours the least attended goes"
    assert stage(keep=5, alpha=0.4).select(one).index.tolist() == [7, 8, 9, 10, 11], "no anchor"
    pruned = two_layers(middle[1:], last[1:], (11,), (((1, 3, 4),),), raster_index=torch.arange(1, 12))
    assert stage(keep=4, alpha=1.0).select(pruned).index.tolist() == [3, 4, 7, 10], "0 has left before"
    frames = torch.arange(2).repeat_interleave(6)
    middle = torch.zeros(12)
    middle[3], middle[8] = 0.5, 0.5
    clip = two_layers(middle, last, (12,), (((2, 2, 3),),), frames)
    # In frame 0 around place 3: 0 and 4. In frame 1 around its place 2: 1 and 5.
    kept = stage(keep={"per_frame": 3}, alpha=1.0).select(clip).index.tolist()
    assert kept == [0, 3, 4, 7, 8, 11], "no neighbours in the other frame"
    assert neighbours((((1, 1, 2)), (1, 2, 1))).tolist() == [
        [-1, 1, -1, -1],
        [0, -1, -1, -1],
        [-1, -1, -1, 3],
        [-1, -1, 2, -1],
    ]
    g = torch.Generator().manual_seed(2)
    middle, last = torch.rand(42 + 60, generator=g), torch.rand(42 + 60, generator=g)
    batch = two_layers(middle, last, (42, 60), (((1, 6, 7),), ((1, 12, 5),)))
    for k, alpha in ((20, 0.5), (11, 1.0), (30, 0.1)):
        want = by_hand(middle[:42], last[:42], 7, 6, k, alpha)
        want += [42 + i for i in by_hand(middle[42:], last[42:], 5, 12, k, alpha)]
        assert stage(keep=k, alpha=alpha).select(batch).index.tolist() == want


def greedy(x, importance, k, balance):
    """MMR with plain lists, float64."""
    cosine = (unit(x) @ unit(x).T).tolist()
    low, high = float(importance.min()), float(importance.max())
    worth = [(float(i) - low) / (high - low + 1e-6) for i in importance]
    chosen = [max(range(len(x)), key=lambda i: (worth[i], -i))]
    while len(chosen) < k:
        gain = {
            i: balance * worth[i] - (1 - balance) * max(cosine[i][j] for j in chosen)
            for i in range(len(x))
            if i not in chosen
        }
        chosen.append(max(gain, key=lambda i: (gain[i], -i)))
    return sorted(chosen)


def mmr():
    stage = registry.stage("mmr")
    attention = torch.tensor([0.9, 0.8, 0.1, 0.0])
    four = tokens(on_circle(0, 5, 90, 180), (4,), ((1, 2, 2),), cls_attention=attention)
    assert stage(keep=2).select(four).index.tolist() == [0, 3], "0.5 of opposite directions; 1 resembles 0"
    assert stage(keep=2, balance=0.9).select(four).index.tolist() == [0, 1]
    assert stage(keep=3, balance=1.0).select(four).index.tolist() == [0, 1, 2], "attention alone"
    assert stage(keep=3, balance=0.0).select(four).index.tolist() == [0, 2, 3], "the farthest first"
    same = tokens(torch.ones(5, 3), (5,), ((1, 1, 5),), cls_attention=torch.full((5,), 0.2))
    assert stage(keep=3).select(same).index.tolist() == [0, 1, 2]
    g = torch.Generator().manual_seed(7)
    x, attention = torch.randn(40 + 23, 8, generator=g), torch.rand(63, generator=g)
    batch = tokens(x, (40, 23), ((1, 5, 8), (1, 23, 1)), cls_attention=attention)
    for balance in (0.0, 0.3, 0.5, 1.0):
        want = greedy(x[:40], attention[:40], 9, balance)
        want += [40 + i for i in greedy(x[40:], attention[40:], 9, balance)]
        assert stage(keep=9, balance=balance).select(batch).index.tolist() == want
