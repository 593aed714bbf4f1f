"""Known answers of IVC-Prune."""

from __future__ import annotations

import math

import torch
from packing import tokens

from vtoken import registry
from vtoken.stages.budget import Budget


def best(score, count):
    """The places of the highest scores, best first, ties to the lower one."""
    return sorted(range(len(score)), key=lambda j: (-score[j], j))[:count]


def weights(values, asking):
    """Row by row and head by head, in Python's floats: [asking, N] mean over heads of softmax over the image."""
    n, heads, width = values.shape
    rows = []
    for q in asking.double().tolist():
        mean = [0.0] * n
        for h in range(heads):
            dots = [
                math.exp(sum(a * b for a, b in zip(q[h], v[h], strict=True)) / math.sqrt(width))
                for v in values.double().tolist()
            ]
            mean = [m + d / sum(dots) / heads for m, d in zip(mean, dots, strict=True)]
        rows.append(mean)
    return rows


def column_means(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def literally(values, text, cos, sin, keep, coordinates=0.1, foreground=None):
    """The tokens of one image that stay, ascending."""
    n = len(values)
    asked = weights(values, text)
    given = column_means(asked)
    seeds = best(given, max(1, round(0.01 * n)))
    score = column_means(asked + weights(values, values[seeds]))
    count = round(coordinates * n)
    marked = [*seeds, *best(cos, count), *best(sin, count)]
    if foreground is not None:
        return sorted({*marked, *best(score, round(foreground * n))})
    order = [j for pair in zip(best(cos, count), best(sin, count), strict=True) for j in pair]
    taken = list(dict.fromkeys([*seeds, *order, *best(score, n)]))
    return sorted(taken[:keep])


def ivc_prune():
    by_hand()
    g = torch.Generator().manual_seed(3)
    lengths, texts = (40, 25), (6, 1)
    values = [torch.randn(n, 2, 4, generator=g) for n in lengths]
    text = [torch.randn(n, 2, 4, generator=g) for n in texts]
    cos, sin = (torch.rand(sum(lengths), generator=g) for _ in range(2))
    batch = tokens(
        torch.zeros(65, 4),
        lengths,
        ((1, 5, 8), (1, 5, 5)),
        values=torch.cat(values),
        later_values=text,
        mean_cos=cos,
        mean_sin=sin,
    )
    places = list(zip(cos.split(lengths), sin.split(lengths), strict=True))
    for options in (
        {"keep": "50%"},
        {"keep": 3},
        {"keep": 12, "coordinates": 0.2},
        {"foreground": 0.2, "coordinates": 0.05},
    ):
        stage = registry.stage("ivc_prune")(**options)
        counts = Budget(options.get("keep", 1)).counts(lengths, (0, 1))
        more = {k: v for k, v in options.items() if k != "keep"}
        want, start = [], 0
        for v, t, (c, s), k in zip(values, text, places, counts, strict=True):
            want += [start + j for j in literally(v, t, c.tolist(), s.tolist(), k, **more)]
            start += len(v)
        kept = stage.select(batch)
        assert kept.index.tolist() == want, options
        assert sum(kept.lengths) == len(want)


def by_hand():
    """Ten tokens that differ in their values along one axis."""
    values = torch.tensor([0.0, 1, 2, 3, 9, 4, 5, 6, 7, 8])[:, None, None]
    facts = {
        "values": values,
        "mean_cos": torch.tensor([0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        "mean_sin": torch.tensor([0.0, 0.9, 0, 0, 0, 0, 0, 0, 0, 0]),
    }
    ask, other = torch.ones(1, 1, 1), -torch.ones(2, 1, 1)
    stage = registry.stage("ivc_prune")

    def kept(text, **options):
        found = stage(**options).select(tokens(torch.zeros(10, 1), (10,), ((1, 2, 5),), later_values=[text], **facts))
        return found.index.tolist()

    assert kept(ask) == [0, 1, 4, 8, 9], "the seed, a cosine, a sine, then the best foreground"
    assert kept(ask, keep=1) == [4], "seeds come first"
    assert kept(ask, keep=2) == [0, 4], "then coordinate tokens by rank, cosines before sines"
    assert kept(ask, coordinates=0.0) == [4, 6, 7, 8, 9] == kept(torch.cat([other, ask]), coordinates=0.0, skip=2)
    assert kept(other[:1], keep=1) == [0] == kept(other, keep=1, skip=5), "too short a text is asked all the same"
    assert kept(ask[:0], keep=1) == [4], "without text the image's own tokens ask"
    assert kept(ask, foreground=0.1) == [0, 1, 4] and kept(ask, foreground=0.5) == [0, 1, 4, 6, 7, 8, 9]
    assert stage().layers(32) == (16,) and stage(layer=22).layers(36) == (22,)
    assert stage().expected_counts((576,), (((1, 24, 24),),), (0,)) == (288,)
    llava = stage(foreground=0.2, coordinates=0.05)
    assert llava.expected_counts((576,), (((1, 24, 24),),), (0,)) == (164,) and not llava.counts_are_exact()
