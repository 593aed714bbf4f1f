"""Known answers of TransPrune."""

from __future__ import annotations

import math

import torch
from packing import tokens

from vtoken import config, registry
from vtoken.hooks.decoder.blocks import change
from vtoken.stages import Fact


def literally(given, out):
    """One row, token by token."""
    lengths = [(math.dist(a, [0] * len(a)), math.dist(b, [0] * len(b))) for a, b in zip(given, out, strict=True)]
    weight = [
        math.exp(1 - sum(x * y for x, y in zip(a, b, strict=True)) / (m * n))
        for a, b, (m, n) in zip(given, out, lengths, strict=True)
    ]
    return [n / m * w / sum(weight) for (m, n), w in zip(lengths, weight, strict=True)]


def transprune():
    # Turned by a quarter, kept, turned round: weights e, 1 and e^2; lengths doubled, kept, halved.
    given = torch.tensor([[1.0, 0], [0, 1], [2, 0]])
    out = torch.tensor([[0.0, 2], [0, 1], [-1, 0]])
    total = 1 + math.e + math.e**2
    want = [2 * math.e / total, 1 / total, 0.5 * math.e**2 / total]
    real = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(change(given[None], out[None], real)[0], torch.tensor(want))
    g = torch.Generator().manual_seed(0)
    given, out = torch.randn(1, 9, 5, generator=g), torch.randn(1, 9, 5, generator=g)
    real = torch.arange(9)[None] >= 4
    got = change(given, out, real)[0]
    assert not got[:4].any(), "padding weighs nothing and is given no weight"
    torch.testing.assert_close(got[4:], torch.tensor(literally(given[0, 4:].tolist(), out[0, 4:].tolist())))

    # Shares of 8 and of 4: (2, 1, 1, 0) / 4 + (1, 5, 1, 1) / 8 = (5, 7, 3, 1) / 8, whatever stands in the other image.
    two = tokens(
        lengths=(4, 2),
        grid=((1, 2, 2), (1, 1, 2)),
        next_text_attention=torch.tensor([1.0, 5, 1, 1, 900, 1]),
    )
    two.facts[Fact("transition")] = torch.tensor([2.0, 1, 1, 0, 1, 1000])
    stage = registry.stage("transprune")
    kept = stage(keep="50%").select(two)
    assert kept.index.tolist() == [0, 1, 5] and kept.lengths == (2, 1)
    torch.testing.assert_close(stage(keep=1).score(two)[:4], torch.tensor([5.0, 7, 3, 1]) / 8)
    # Nobody behind the image asks: transitions alone decide.
    two.facts[Fact("next_text_attention")] = torch.zeros(6)
    assert stage(keep=1).select(two).index.tolist() == [0, 5]

    assert stage(keep=1).layers(32) == (7,) and stage(keep=1, layer=9).layers(32) == (9,)
    counts, cuts = [576], config.load("transprune-236").stages
    for cut in cuts:
        counts += cut.expected_counts(counts[-1:], (((1, 24, 24),),), (0,))
    assert counts == [576, 504, 360, 72] == [int(576 * share) for share in (1, 0.875, 0.625, 0.125)]
    layers = [0, *(cut.layers(32)[0] for cut in cuts), 32]
    assert round(sum(n * (b - a) for n, a, b in zip(counts, layers, layers[1:], strict=False)) / 32) == 236
