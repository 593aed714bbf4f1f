"""Known answers of the stages that act inside the LLM, worked out by hand or by an independent definition in
float64."""

from __future__ import annotations

import pytest
import torch
from packing import tokens
from pydantic import ValidationError

from vtoken import registry


def stage(name, **options):
    return registry.stage(name)(**options)


def fastv():
    scores = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.0, 0.3])
    assert stage("fastv").select(tokens(last_query_attention=scores)).index.tolist() == [1, 3, 5], "half"
    assert stage("fastv", keep=2).select(tokens(last_query_attention=scores)).index.tolist() == [1, 3]
    two = tokens(lengths=(4, 2), grid=((1, 2, 2), (1, 1, 2)), last_query_attention=scores)
    assert stage("fastv").select(two).index.tolist() == [1, 3, 5], "every image keeps its share"
    assert stage("fastv").layers(32) == (2,) and stage("fastv", layer=3).layers(32) == (3,)
    with pytest.raises(ValidationError):
        stage("fastv", layer=0)
    # Published averages over 32 layers, two of them with all 576 tokens.
    for average, keep in ((192, 166), (128, 98), (64, 30)):
        assert round((average * 32 - 2 * 576) / 30) == keep


def pyramiddrop():
    cut, counts = stage("pyramiddrop"), [576]
    assert cut.layers(32) == (8, 16, 24) and cut.layers(28) == (7, 14, 21) and cut.layers(4) == (1, 2, 3)
    for layer in cut.layers(32):
        counts += cut.expected_counts(counts[-1:], (((1, 24, 24),),), (0,), layer)
    assert counts == [576, 288, 144, 72] and sum(counts) * 8 / 32 == 270, "the authors' average"
    scores = torch.tensor([5.0, 1, 4, 2, 3])
    found = cut.select(tokens(lengths=(5,), grid=((1, 1, 5),), next_query_attention=scores))
    assert found.index.tolist() == [0, 2] and found.lengths == (2,)
    assert stage("pyramiddrop", at=(2, 5)).layers(32) == (2, 5)


def vtw():
    whole = tokens(lengths=(4, 2), grid=((1, 2, 2), (1, 1, 2)))
    keep = stage("vtw").select(whole)
    assert keep.lengths == (0, 0) == stage("vtw").expected_counts((4, 2), whole.parts, whole.row) and not len(
        keep.index
    )
    assert keep.index.dtype == torch.long and keep.apply(whole.x).shape == (0, 2)
    assert stage("vtw").layers(32) == (15,) and stage("vtw").layers(28) == (13,) and stage("vtw").layers(2) == (1,)
    assert stage("vtw", layer=20).layers(32) == (20,)


def sparsevlm():
    scores = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.0, 0.3])
    found = stage("sparsevlm", keep=2).select(tokens(text_attention=scores))
    assert found.index.tolist() == [1, 3] and found.into is None, "ties go to the lower index"
    assert stage("sparsevlm", keep=2).layers(32) == (3,) and stage("sparsevlm", keep=2, layer=7).layers(32) == (7,)
    the_raters()
    the_counts()
    the_recycled()
    from vtoken.pruners.decoder.sparsevlm import peaks

    centre, member = peaks(torch.tensor([0.0, 0, 0, 10, 10.5])[:, None], 2)
    assert centre.tolist() == [0, 3] and member.tolist() == [0, 0, 0, 1, 1], "of equals one is the centre"


def the_raters():
    """Image 0: the words have weights a half, a quarter and a quarter. Image 1: all alike, so all rate. Image 2: no
    word behind it."""
    log2 = torch.log(torch.tensor(2.0))
    x = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 0]])
    text = [torch.tensor([[0.0, 5], [log2, 9], [0, 7]]), torch.ones(3, 2), torch.ones(0, 2)]
    image = tokens(x, (2, 1, 1), ((1, 1, 2), (1, 1, 1), (1, 1, 1)), later_text=text)
    assert [r.tolist() for r in stage("sparsevlm", keep=2).query_tokens(image)] == [[1], [0, 1, 2], []]


def the_counts():
    """Published cuts leave 300, 200 and 110 tokens of 576 and recycle into 9, 4 and 3 more."""
    from vtoken.pruners.decoder.sparsevlm import pooled, recycled

    n = 576
    for kept, clusters in ((300, 9), (200, 4), (110, 3)):
        assert int((int(0.3 * (n - kept)) + 1) / 10) + 1 == clusters == recycled(n, kept + clusters)
        n = kept + clusters
    for n in range(2, 60):
        for k in range(1, n):
            c = recycled(n, k)
            assert 0 <= 2 * c <= k and c <= pooled(n - k + c) <= n - k + c, "enough to be merged"


def the_recycled():
    """Of 60 tokens 22 are left: the best 20, and two means of the next 13 (30% of 40 dropped ones, and one)."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(60, generator=generator) * 3
    values[:20], mixed = -1, torch.randperm(60, generator=generator)
    x, score = values[:, None].repeat(1, 4)[mixed], torch.arange(60, 0, -1).float()[mixed]
    sparse = stage("sparsevlm", keep=22, recycle=True)
    found = sparse.select(tokens(x, (60,), ((1, 6, 10),), text_attention=score))
    assert found.lengths == (22,) and found.into is not None and int((found.into >= 0).sum()) == 20 + 13
    got = sorted(found.apply(x)[:, 0].tolist())
    want = sorted(dpc(values[20:33].double()[:, None].repeat(1, 4), 2))
    assert got[:20] == [-1] * 20
    torch.testing.assert_close(torch.tensor(got[20:]), torch.tensor(want).float())
    again = sparse.select(tokens(x, (60,), ((1, 6, 10),), text_attention=score))
    assert torch.equal(found.into, again.into)


def dpc(x, c):
    """First channels of the means of c density-peak clusters of x [N, D], one loop per sentence of the definition."""
    n = len(x)
    distance = [[float((x[i] - x[j]).square().mean().sqrt()) for j in range(n)] for i in range(n)]
    density = [-sum(d * d for d in sorted(row)[:c]) / c for row in distance]
    rank = sorted(range(n), key=lambda i: (-density[i], i))
    gap = [min((distance[i][j] for j in rank[: rank.index(i)]), default=max(map(max, distance))) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-gap[i] * float(torch.tensor(density[i]).exp()), i))[:c]
    home = [i if i in centres else min(centres, key=lambda j: distance[i][j]) for i in range(n)]
    return [float(torch.stack([x[i, 0] for i in range(n) if home[i] == j]).mean()) for j in centres]


def dart():
    angle = torch.tensor([0.0, 10, 80, 90, 100, 170, 180, 45]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    keys = torch.tensor([9.0, 0, 1, 2, 1, 0, -3, 1])[:, None]  # by absolute value: token 0, then 6
    facts = {"keys": keys, "normed": x, "later_keys": [torch.tensor([[1.0], [-2], [0]])]}
    facts["later_normed"] = [torch.tensor([[1.0, 0], [0, -1], [5, 5]])]
    image = tokens(torch.zeros(8, 2), (8,), ((1, 2, 4),), **facts)
    # Pivots: token 0, then the words at -90 and 0 degrees. Token 0 takes 180; -90 takes 90; 0 takes 170.
    options = {"image_pivots": 1, "text_pivots": 2}
    assert stage("dart", keep=4, **options).select(image).index.tolist() == [0, 3, 5, 6]
    assert stage("dart", keep=5, **options).select(image).index.tolist() == [0, 3, 4, 5, 6], "token 0 takes two"
    assert stage("dart", keep=2, image_pivots=4).select(image).index.tolist() == [0, 6], "pivots only"
    alone = stage("dart", keep=3, image_pivots=1, text_pivots=0)
    assert alone.select(image).index.tolist() == [0, 5, 6] and len(alone.needs()) == 2
    for k in range(1, 9):
        assert stage("dart", keep=k).select(image).index.tolist() == by_turns(keys, x, facts, k)
    g = torch.Generator().manual_seed(2)
    lengths, words = (12, 3, 20), (1, 0, 6)  # images with pivots of their own number
    keys, x = torch.randn(35, 4, generator=g), torch.randn(35, 6, generator=g)
    later = [{"keys": torch.randn(n, 4, generator=g), "normed": torch.randn(n, 6, generator=g)} for n in words]
    facts = {"keys": keys, "normed": x, **{f"later_{f}": [each[f] for each in later] for f in ("keys", "normed")}}
    batch = tokens(torch.zeros(35, 2), lengths, tuple((1, 1, n) for n in lengths), **facts)
    for k in (6, 11):
        want, start = [], 0
        for i, n in enumerate(lengths):
            rows, own = slice(start, start + n), {f"later_{f}": [later[i][f]] for f in ("keys", "normed")}
            want += [start + t for t in by_turns(keys[rows], x[rows], own, min(k, n))]
            start += n
        assert stage("dart", keep=k).select(batch).index.tolist() == want
    with pytest.raises(ValidationError, match="per_frame"):
        stage("dart", keep={"per_frame": 3})


def by_turns(keys, x, facts, k):
    """The default of four and four, in float64 and sets."""

    def pivots(values, n):
        return sorted(range(len(values)), key=lambda i: (-float(values[i].abs().sum()), i))[:n]

    first = pivots(keys, min(4, k))
    turns = [x[i] for i in first] + [facts["later_normed"][0][i] for i in pivots(facts["later_keys"][0], 4)]
    taken = set(first)
    for number, pivot in enumerate(turns):
        size = (k - len(first)) // len(turns) + (number < (k - len(first)) % len(turns))
        cosine = torch.nn.functional.cosine_similarity(x.double(), pivot.double()[None])
        taken |= set(sorted((i for i in range(len(x)) if i not in taken), key=lambda i: float(cosine[i]))[:size])
    return sorted(taken)
