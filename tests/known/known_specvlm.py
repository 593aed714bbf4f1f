"""Known answer of SpecVLM."""

from __future__ import annotations

import torch

from vtoken import registry
from vtoken.stages import Fact, VisualTokens


def looked_at(score, lengths, layer=None):
    facts = {Fact("target_attention", layer): torch.as_tensor(score, dtype=torch.float32)}
    parts, row = [((1, 1, n),) for n in lengths], range(len(lengths))
    index = torch.cat([torch.arange(n) for n in lengths])
    return VisualTokens.pack(torch.zeros(sum(lengths), 2), lengths, parts, tuple(row), index, facts=facts)


def literal(score, k, p):
    """With plain lists."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    taken, held = [], 0.0
    while p > 0 and len(taken) < k and held < p * sum(score):
        taken.append(order[len(taken)])
        held += score[taken[-1]]
    rest, places = [i for i in range(len(score)) if i not in taken], k - len(taken)
    step = (len(rest) - 1) / (places - 1) if places > 1 else 0
    return sorted(taken + [rest[int(i * step + 1e-9)] for i in range(places)])


def specvlm():
    stage = registry.stage("specvlm")
    score = [2, 6, 2, 6, 1, 1, 1, 1]  # of 20
    one = looked_at(score, (8,))
    # 40 % are 8: 1 and 3, with 12. Of 0 2 4 5 6 7 the first and the last.
    assert stage(keep="50%").select(one).index.tolist() == [0, 1, 3, 7]
    # 30 % are 6: 1 alone, the earlier of two equals. Of 0 2 3 4 5 6 7 the first, the middle and the last.
    assert stage(keep="50%", p=0.3).select(one).index.tolist() == [0, 1, 4, 7]
    assert stage(keep="50%", p=1.0).select(one).index.tolist() == [0, 1, 2, 3], "by rank alone"
    assert stage(keep="50%", p=0.0).select(one).index.tolist() == [0, 2, 4, 7], (
        "0, 7/3, 14/3 and 7, cut to whole numbers"
    )
    assert stage(keep=1).select(one).index.tolist() == [1] and stage(keep=1, p=0.0).select(one).index.tolist() == [0]
    assert stage(keep=3).select(one).index.tolist() == [0, 1, 3], "one place is left, for the first of the rest"
    two = looked_at([*score, *reversed(score)], (8, 8))
    assert stage(keep=4).select(two).index.tolist() == [0, 1, 3, 7, 8, 12, 14, 15], "each by its own sum"
    late = looked_at(score, (8,), -7)
    assert stage(keep=4, first=-7).select(late).index.tolist() == [0, 1, 3, 7]
    g = torch.Generator().manual_seed(0)
    for n, k, p in ((9, 4, 0.4), (64, 6, 0.4), (64, 63, 0.1), (31, 30, 0.9), (30, 29, 0.0), (576, 58, 0.4)):
        drawn = torch.randint(1, 2000, (n,), generator=g).double()
        kept = stage(keep=k, p=p).select(looked_at(drawn, (n,))).index.tolist()
        assert kept == literal(drawn.tolist(), k, p)
