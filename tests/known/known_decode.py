"""Known answers of the stages that choose what a generated token reads, and of the op that reads it: by hand."""

from __future__ import annotations

import pytest
import torch

from vtoken import registry
from vtoken.kernels import attend_slots as attend
from vtoken.stages.decode import DecodeStep


def step(queries, keys, visual, budget, layer=2, before=-1, memory=None, shared=None):
    """One row, one key head: queries [H][d], keys [S][d]."""
    q, k = torch.tensor(queries, dtype=torch.float32), torch.tensor(keys, dtype=torch.float32)
    slots = torch.tensor([visual])
    memory, shared = ({} if given is None else given for given in (memory, shared))
    return DecodeStep(
        q[None], k[None, None], slots, (len(visual),), (budget,), None, 1.0, layer, before, memory, shared
    )


def places(choice):
    return choice.index[0, 0].tolist()


def quest():
    """Slots 1 to 7 are visual: pages (1, 2), (3, 4), (5, 6), and 7, which fills none."""
    keys = [[9, 9], [1, 0], [-1, 0], [0, 3], [0, -3], [2, -2], [2, 2], [0, 0], [5, 5]]
    visual = [1, 2, 3, 4, 5, 6, 7]
    stage = registry.stage("quest")(keep=3, size=2, min_len=0)
    # [1, 0] can reach 1, 0 and 2; [0, 1] reaches 0, 3 and 2; [0, -1] 0, 3 and 2.
    assert places(stage.choose(step([[1, 0]], keys, visual, 3))) == [4, 5, 6]
    for query in ([0, 1], [0, -1]):
        assert places(stage.choose(step([query], keys, visual, 3))) == [2, 3, 6]
    # Of two query heads the one that could gain more decides: 2 of the third page, or 1.5 of the second.
    assert places(stage.choose(step([[1, 0], [0, 0.5]], keys, visual, 3))) == [4, 5, 6]
    assert places(stage.choose(step([[1, 0], [0, 0.7]], keys, visual, 3))) == [2, 3, 6]
    # What fills no page counts as one: of three pages, two are left to 5 or 6 tokens; 7 are all there are.
    for budget in (5, 6):
        assert places(stage.choose(step([[1, 0]], keys, visual, budget))) == [0, 1, 4, 5, 6]
    assert stage.choose(step([[1, 0]], keys, visual, 7)) is None
    # Pages of four. The second one's bound for [1, 1] is 4 + 4, of parts of two 4 + 0; the first one's is 3.5 + 1.5.
    eight = [[0, 0], *[[3.5, 1.5]] * 4, [4, 0], [0, -9], [0, 4], [-9, 0], [7, 7]]
    for chunks, want in ((1, [4, 5, 6, 7]), (2, [0, 1, 2, 3])):
        parts = registry.stage("quest")(keep=4, size=4, chunks=chunks, min_len=0)
        assert places(parts.choose(step([[1, 1]], eight, list(range(1, 9)), 4))) == want
    # A choice stands for two tokens.
    twice, memory = registry.stage("quest")(keep=3, size=2, every=2, min_len=0), {}
    asked = [[1, 0], [0, 1], [0, 1], [1, 0]]
    grown = [keys, [*keys, [0, 0]], [*keys, *[[0, 0]] * 2], [*keys, *[[0, 0]] * 3]]
    found = [places(twice.choose(step([q], k, visual, 3, memory=memory))) for q, k in zip(asked, grown, strict=True)]
    assert found == [[4, 5, 6], [4, 5, 6], [2, 3, 6], [2, 3, 6]]
    assert stage.layers(4) == (2, 3) and registry.stage("quest")(keep=3, dense_layers=(-1,)).layers(4) == (0, 1, 2)
    assert [
        registry.stage("quest")(keep=4096, size=64, least=3)._pages(n, k) for n, k in ((6400, 64), (6401, 128))
    ] == [3, 2]
    with pytest.raises(ValueError, match="no multiple"):
        registry.stage("quest")(keep=4, size=16, chunks=3)


def tidal():
    """Mean of two query heads over keys 1, 2 and 3; what layer 2 chose, layers 3 and 4 read; layer 9 chooses anew."""
    keys = [[9, 9], [4, 0], [0, 3], [3, 3], [5, 5]]
    stage, shared = registry.stage("tidal")(keep=2, min_len=0), {}
    assert stage.layers(12) == tuple(range(2, 12))
    assert stage.choose(step([[1, 0], [0, 0]], keys, [1, 2, 3], 2, 2, -1, shared=shared)) is None
    assert places(stage.choose(step([[0, 9], [0, 9]], keys, [1, 2, 3], 2, 3, 2, shared=shared))) == [0, 2]
    assert stage.choose(step([[0, 1], [0, 1]], keys, [1, 2, 3], 2, 9, 8, shared=shared)) is None
    assert places(stage.choose(step([[1, 0], [1, 0]], keys, [1, 2, 3], 2, 10, 9, shared=shared))) == [1, 2]
    # A decoder without attention in layer 9 chooses in the next with; a cut makes the layer behind it choose.
    assert stage.choose(step([[1, 0], [1, 0]], keys, [1, 2, 3], 2, 11, 7, shared=shared)) is None
    assert stage.choose(step([[1, 0], [1, 0]], keys, [1, 3], 1, 5, 4, shared=shared)) is None
    assert places(stage.choose(step([[0, 0], [0, 0]], keys, [1, 3], 1, 6, 5, shared=shared))) == [0]
    with pytest.raises(ValueError, match="after layer 2"):
        registry.stage("tidal")(correction=2)
    assert "layers 0 to 2" in stage.incompatibility(3, 8) and not stage.incompatibility(4, 8)


def recycled():
    """The highest attention of either query head: [10, 0] is sure of key 1, [0, 1] prefers 2 to 3."""
    keys = [[0, 0], [1, 0], [0, 1], [0, 0.5], [0, 0]]
    stage, memory = registry.stage("recycled")(keep=2, every=3, min_len=0), {}
    grown = [keys + [[0, 0]] * n for n in range(6)]

    def at(n, queries):
        found = stage.choose(step(queries, grown[n], [1, 2, 3], 2, memory=memory))
        return found if found is None else places(found)

    assert at(0, [[10, 0], [0, 1]]) is None
    assert at(1, [[0, 9], [0, 9]]) == at(2, [[0, 9], [0, 9]]) == [0, 1]
    assert at(3, [[0, 9], [0, 9]]) is None and at(4, [[9, 0], [9, 0]]) == [1, 2]
    memory["last"] -= 1  # as if another token had come in between
    assert at(5, [[0, 9], [0, 9]]) is None
    # Queries that turn away: a cosine of 0.41, seen at every second token.
    stage, memory = registry.stage("recycled")(keep=2, every=9, similarity=0.6, check=2, min_len=0), {}
    turned = [[0.5, -(3**0.5) / 2]]
    assert at(0, [[1, 0.1]]) is None and at(1, turned) == [0, 1] and at(2, turned) is None
    assert at(3, turned) == [0, 2] and at(4, [[0.6, -0.8]]) == [0, 2]


def attend_slots():
    """Two keys of equal logits: their values' mean; -1 is nothing."""
    k = torch.tensor([[[[1.0, 0], [0, 1], [5, 5]]]])
    v = torch.tensor([[[[2.0, 0], [4, 6], [9, 9]]]])
    index = torch.tensor([[[0, -1, 1]]])
    assert attend(torch.tensor([[[1.0, 1.0]]]), k, v, index, 1.0).tolist() == [[[3.0, 3.0]]]
    assert attend(torch.tensor([[[1.0, 1.0]]]), k, v, index.fill_(-1), 1.0).tolist() == [[[0.0, 0.0]]]
