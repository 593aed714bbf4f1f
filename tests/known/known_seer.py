"""Known answers of SeerAttention: rotations as complex numbers, one block pair at a time, in float64."""

from __future__ import annotations

import cmath
from dataclasses import replace

import gates
import pytest
import torch
from known_sparse import heads_of, prompt, stage
from pydantic import ValidationError
from safetensors.torch import load_file

from vtoken.compressors.attention._seer import chosen


def seerattention():
    seen = 0
    for n, heads, size, threshold, last, factor in (
        (300, (4, 2), 16, 0.02, 2, 1.0),
        (301, (4, 4), 32, 0.08, 0, 1.0),
        (320, (6, 2), 16, 0.05, 1, 1.3),
        (250, (4, 2), 64, 0.2, 0, 1.0),
    ):
        p, file = scattered(n, heads, factor), gates.seer(n, 2, heads, 16, size)
        matrices = load_file(file)["1"].double()
        found = stage("seerattention", gates=file, threshold=threshold, last=last).reads(p)
        assert found.size == size
        for h, q, k in heads_of(p):
            rows = shares(p, q, k, matrices[h], size)
            for r, row in enumerate(rows):
                assert all(abs(share - threshold) > 1e-6 for share in row), "no draws"
                want = {c for c, share in enumerate(row) if share > threshold or r >= len(rows) - last} | {0, r}
                assert set(found.blocks[h, r].nonzero()[:, 0].tolist()) == want, (n, h, r)
                seen += len(want) < r + 1
    assert seen > 60, "most rows leave something out"
    by_hand()
    p, file = prompt(500), gates.seer(width=16)
    for options in ([{"threshold": x} for x in (0.3, 0.05, 0.01, 0.0)], [{"share": x} for x in (0.1, 0.4, 0.8, 1.0)]):
        dense = [float(stage("seerattention", gates=file, last=0, **each).reads(p).density()) for each in options]
        assert dense == sorted(dense) and dense[0] < 0.5 and dense[-1] == 1
    with pytest.raises(ValidationError, match="no file 'nowhere'"):
        stage("seerattention", gates="nowhere")


def scattered(n, heads, factor):
    """A prompt of layer 1 with the gaps of pruning, and every pair of channels at positions of its own, as M-RoPE has
    them."""
    p = prompt(n, heads, seed=n, layer=1)
    place = torch.randint(0, 4, (n, 8), generator=torch.Generator().manual_seed(n)).cumsum(0)
    angles = place * 100.0 ** (-torch.arange(8) / 8)
    cos, sin = (factor * x.repeat(1, 2) for x in (angles.cos(), angles.sin()))
    return replace(p, rope=replace(p.rope, cos=cos, sin=sin))


def shares(p, q, k, matrix, size):
    """Row by row the softmax over the key blocks up to it."""
    turns = torch.complex(p.rope.cos.double(), p.rope.sin.double())[:, :8]

    def whole(x, by):
        z = torch.complex(x[:8], x[8:]) * by
        return torch.cat([z.real, z.imag])

    q, k = ([whole(x, 1 / turn) for x, turn in zip(each, turns, strict=True)] for each in (q, k))
    starts = range(0, len(q), size)
    means, keys = [], []
    for at in starts:
        means.append(whole(sum(q[at : at + size]) / len(q[at : at + size]), turns[at]))
        block = torch.stack(k[at : at + size])
        side = [torch.tensor([f(c) for c in block.T.tolist()]).double() for f in (max, min, lambda c: sum(c) / len(c))]
        keys.append(whole(torch.cat(side) @ matrix, turns[at]))
    out = []
    for r, mean in enumerate(means):
        powers = [cmath.exp(float(mean @ keys[c]) / 4).real for c in range(r + 1)]
        out.append([x / sum(powers) for x in powers])
    return out


def by_hand():
    """Five blocks; what a share of 0.64 leaves: 40 % of the columns, two of them, at equal shares the first."""
    row = [[1.0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0], [0.1, 0.5, 0.4, 0, 0], [0.25] * 4 + [0], [0.0, 0.1, 0.6, 0.2, 0.1]]
    table = torch.tensor([row])
    read = chosen(table, 0.0, 0.64, 0)[0].int().tolist()
    assert read == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 1, 1]]
    assert chosen(table, 0.2, None, 1)[0].int().tolist()[2:] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5]
    assert chosen(table, 0.25, None, 0)[0].int().tolist()[3] == [1, 0, 0, 1, 0], "above it, not from it on"
    assert chosen(table, 0.0, 1e-9, 0)[0].int().tolist()[4] == [1, 0, 1, 0, 1], "one at least"
