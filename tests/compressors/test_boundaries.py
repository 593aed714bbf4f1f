"""2D-boundary heads of MMInference: every pair of modalities has its own index, worked out one key and one query at a time."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from known_sparse import heads_of, list_of, prompt, seen_by, stage

from vtoken import registry
from vtoken.compressors.attention import _mminference as parts
from vtoken.evals.calibrate import mminference as search
from vtoken.stages.attention import PrefillQK

# Text, a picture, text, a picture, text; and text in front of and behind one picture.
LAYOUTS = {
    "interleaved": ((40, -1), (130, 0), (90, -1), (150, 1), (70, -1)),
    "one picture": ((10, -1), (260, 0), (150, -1)),
    "ends in a picture": ((75, -1), (100, 0), (120, -1), (90, 1)),
    "text alone": ((300, -1),),
    "short runs at the end": ((50, -1), (100, 0), (60, -1), (30, 1), (20, -1)),
    "pictures alone": ((200, 0), (100, 1)),
}


def mixed(runs, seed=0):
    """A prompt of runs (tokens, image)."""
    image = torch.cat([torch.full((n,), i) for n, i in runs])
    p = prompt(len(image), seed=seed)
    return PrefillQK(p.q, p.k, p.scale, 0, image, torch.where(image < 0, -1, 0), (((1, 1, 150),),) * 2)


def index(q, k, scale, visual, vertical, slash):
    """{(query kind, key kind): (keys, distances)}, kinds False for text and True for images; distances in keys of the
    kind."""
    found, n = {}, len(q)
    for mine in sorted({bool(x) for x in visual}):
        end = max(i for i in range(n) if visual[i] == mine) + 1
        start = max([i for i in range(end) if visual[i] != mine], default=-1) + 1
        rows = range(max(start, end - 64), end)
        for theirs in (False, True):
            keys = [j for j in range(end) if visual[j] == theirs]
            held, near = dict.fromkeys(keys, 0.0), dict.fromkeys(range(len(keys)), 0.0)
            for i in rows:
                share = (k[: i + 1] @ q[i] * scale).softmax(0).tolist()
                before = [j for j in keys if j <= i]
                for j in before:
                    held[j] += share[j]
                for later, j in enumerate(reversed(before)):
                    near[later] += share[j]
            ranked = sorted(keys[30:], key=lambda j: (-held[j], j))
            far = sorted(range(100, len(keys)), key=lambda x: (-near[x], x))
            found[mine, theirs] = set((keys[:30] + ranked)[: max(30, vertical)]), {*range(100), *far[: slash - 100]}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pair_has_its_index(layout):
    p = mixed(LAYOUTS[layout], seed=len(layout))
    visual, n = (p.image >= 0).tolist(), p.length
    before = [[sum(visual[j] == kind for j in range(i + 1)) for i in range(n)] for kind in (False, True)]
    reads = stage("mminference", pattern="2d_boundary", vertical=36, slash=115).reads(p)
    seen, looser = seen_by(reads, n), 0
    for h, q, k in heads_of(p):
        pairs = index(q, k, p.scale, visual, 36, 115)
        for tile in range(-(-n // 64)):
            rows = range(tile * 64, min(n, tile * 64 + 64))
            kinds = {visual[i] for i in rows}
            listed = [j for j in list_of(reads, h, tile).tolist() if j >= 0]
            assert len(listed) == len(set(listed))
            assert set(listed) == set().union(*(pairs[a, b][0] for a in kinds for b in (False, True)))
            for c in range(tile + 1):
                keys = range(c * 64, min(n, c * 64 + 64))
                met, least = False, False
                for a in kinds:
                    for b in {visual[j] for j in keys}:
                        at = [before[b][i] for i in rows if visual[i] == a]
                        distances = {
                            (x, y)
                            for x in range(at[0], at[-1] + 1)
                            for y in (before[b][j] for j in keys if visual[j] == b)
                        }
                        met |= any(x - y in pairs[a, b][1] for x, y in distances)
                        least |= any(x - y in pairs[a, b][1] for x, y in distances if x in at)
                assert bool(reads.blocks[h, tile, c]) == met and met >= least
                looser += met != least
    assert looser <= 2 * p.heads, "between queries of a block that stand apart every distance counts, which is rare"
    assert bool(seen[:, torch.arange(n), torch.arange(n)].all() and seen[:, :, 0].all()), (
        "the token itself and the first"
    )


def test_distances_run_on_across_text():
    """Keys 3 pictures' tokens back, whatever text stands in between; by hand, on blocks of 64."""
    image = torch.tensor([0] * 64 + [-1] * 128 + [0] * 64)
    taken = torch.zeros(1, 128, dtype=torch.bool)
    visual = image >= 0
    for distance, want in ((0, {(0, 0), (3, 3)}), (64, {(3, 0)}), (65, {(3, 0)}), (10, {(0, 0), (3, 0), (3, 3)})):
        (blocks,) = parts.reached(
            taken.index_fill(1, torch.tensor(distance), True), visual, visual.cumsum(0) - 1, visual
        )
        assert set(map(tuple, blocks.nonzero().tolist())) == want
    for distance in (0, 63):
        (blocks,) = parts.reached(
            taken.index_fill(1, torch.tensor(distance), True), ~visual, visual.cumsum(0) - 1, visual
        )
        assert blocks.nonzero().tolist() == [[1, 0], [2, 0]], "all text sees the first picture's last key at distance 0"


def test_text_keys_do_not_compete_with_image_keys():
    """Text that all queries attend to more than to any picture: one index takes text alone, a pair's takes its share of
    each."""
    p = loud_text(200)
    one, two = (
        stage("mminference", pattern=name, vertical=60, slash=100).reads(p).columns[:, 0]
        for name in ("query_boundary", "2d_boundary")
    )
    of_images = [((c >= 80) & (c < 280)).sum(-1) for c in (one, two)]
    assert bool((of_images[1] == 60).all()) and bool((of_images[0] < 30).all())


def test_the_search_finds_the_boundary():
    """Where text drowns the picture in one index, the search takes a pair's; by the share of the attention among image
    tokens."""
    p, found = loud_text(600), {}
    s = registry.stage("mminference")(min_len=0, vertical=60, slash=100)
    assert "2d_boundary" in get_args(type(s).model_fields["pattern"].annotation)
    search.Search(
        candidates=("a_shape", "query_boundary", "2d_boundary"), method=s.model_copy(update={"window": 64}), found=found
    ).reads(p)
    assert found[0][0] == ("2d_boundary",) * 4


def loud_text(pictures):
    """A prompt whose picture stands between texts that all queries attend to most."""
    p = mixed(((80, -1), (pictures, 0), (100, -1)), seed=1)
    k = torch.where((p.image < 0)[:, None], p.q.mean((0, 1)) * 50, p.k)
    k[:, 80 + pictures :] = p.k[:, 80 + pictures :]
    return PrefillQK(
        p.q.abs() * p.q.mean((0, 1)).sign(), k, p.scale, 0, p.image, torch.where(p.image < 0, -1, 0), p.parts
    )
