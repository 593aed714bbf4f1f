"""Inside packed towers (Qwen): facts, and stages that drop or merge between blocks, against a naive tower."""

from __future__ import annotations

from typing import ClassVar

import pytest
import tiny
import torch
from hooked_tower import IMAGES, VIDEOS, Hooked, pictures
from naive_tower import each, group, stock

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.stages import Compressor, Fact, Keep, Site

FAMILIES = tiny.families(grouped=True)
FULL = 1  # a block with full attention in every family


def received(found, layer):
    weights, sees = found.maps[layer]
    return group(weights.sum(0) / sees.sum(0))


class Cut(Compressor):
    """Keeps a different number of tokens of each image after chosen blocks, or folds each into the kept one before it.
    No paper."""

    site: ClassVar[Site] = "encoder"
    at: tuple[int, ...] = (0,)
    merge: bool = False
    asks: tuple[tuple[str, int | None], ...] = ()
    one: bool = False
    seen: list = []

    def layers(self, depth):
        return self.at

    def needs(self):
        return tuple(Fact(*ask) for ask in self.asks)

    def select(self, tokens):
        self.seen.append(tokens)
        index, into, start = [], [], 0
        for i, norm in enumerate(tokens.x.norm(dim=-1).split(tokens.lengths)):
            stay = norm >= norm.mean()
            stay[0] = True
            stay |= torch.tensor(self.one and i > 0)
            into.append(stay.cumsum(0) - 1 + sum(map(len, index)))
            index.append(stay.nonzero()[:, 0] + start)
            start += len(norm)
        return Keep(torch.cat(index), tuple(map(len, index)), torch.cat(into) if self.merge else None)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("grids", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_facts_equal_a_naive_tower(family, grids, attn):
    layers = {"received_attention": (FULL, 3), "keys": (0, 3), "values": (2,)}
    wanted = [(name, layer) for name, some in layers.items() for layer in some] + [("features",), ("pixels",)]
    hooked, (pixels, grid) = Hooked(family, attn, wanted), pictures(grids)
    hooked(pixels, grid, "video" if grids is VIDEOS else "image")
    facts, found = hooked.run.tower.facts, each(family, pixels, grid)
    assert set(facts) == {Fact(*w) for w in wanted}

    def same(name, layer, expected):
        torch.testing.assert_close(facts[Fact(name, layer)], torch.cat(expected), atol=2e-5, rtol=1e-4)

    for layer in (FULL, 3):
        same("received_attention", layer, [received(f, layer) for f in found])
    for layer in (0, 3):
        same("keys", layer, [group(f.keys[layer]) for f in found])
    same("values", 2, [group(f.values[2]) for f in found])
    same("features", None, [f.last for f in found])
    assert torch.equal(facts[Fact("pixels")], pixels.view(-1, 4 * pixels.shape[1]))
    assert hooked.run.tower.history.full == tuple(layout.tokens for layout in hooked.adapter.rasters(grid.tolist()))


CUTS = {
    "one block": [Cut(at=(0,))],
    "two blocks": [Cut(at=(0, 2))],
    "two stages": [Cut(at=(1,)), Cut(at=(1, 2))],
    "merge": [Cut(at=(0, 1), merge=True)],
    "merge, then drop": [Cut(at=(0,), merge=True), Cut(at=(2,))],
    "one image only": [Cut(at=(1,), one=True)],
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("grids", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize("stages", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_a_naive_tower(family, stages, grids, attn):
    hooked, (pixels, grid) = Hooked(family, attn, [("features",), ("keys", 3)], CUTS[stages]), pictures(grids)
    rows = []
    hooked.model.model.visual.blocks[3].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    out, tower = hooked(pixels, grid), hooked.run.tower
    cuts = [
        {t.layer: (t.kept[i], None if t.into is None else t.into[i]) for t in tower.traces} for i in range(len(grid))
    ]
    found = each(family, pixels, grid, cuts)
    close = {"atol": 2e-4, "rtol": 1e-3}
    torch.testing.assert_close(out, torch.cat([f.features for f in found]), **close)
    torch.testing.assert_close(tower.facts[Fact("features")], torch.cat([f.last for f in found]), **close)
    for index, tap in enumerate(hooked.taps):
        torch.testing.assert_close(tap, torch.cat([f.taps[index] for f in found]), **close)
    assert len(hooked.taps) == tiny.family(family).deepstack
    assert rows == [4 * sum(tower.history.lengths)] and rows[0] < len(pixels)
    gone = ~tower.alive()
    assert gone.sum() == len(pixels) // 4 - rows[0] // 4 and not tower.facts[Fact("keys", 3)][gone].any()
    for before, after in zip(tower.traces, tower.traces[1:], strict=False):
        assert after.tokens_in == before.tokens_out


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_alone_gives_what_it_gives_in_a_batch(family):
    hooked = Hooked(family, wanted=[("received_attention", FULL)], stages=[Cut(at=(0, 2))])
    pixels, grid = pictures(IMAGES)
    together, tower = hooked(pixels, grid), hooked.run.tower
    tokens, start = (grid.prod(-1) // 4).tolist(), 0
    for i, part in enumerate(pixels.split(grid.prod(-1).tolist())):
        alone, rows = hooked(part, grid[i : i + 1]), slice(start, start + tokens[i])
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-4)
        assert torch.equal(hooked.run.tower.history.kept()[0], tower.history.kept()[i])
        for fact, value in hooked.run.tower.facts.items():
            torch.testing.assert_close(value, tower.facts[fact][rows], atol=1e-6, rtol=1e-4)
        start += tokens[i]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_stage_sees(family):
    """Facts of its own block and of earlier ones, hidden states and places, all in token order, after an earlier
    drop."""
    asks = (("cls_attention", None), ("received_attention", FULL), ("keys", 0))
    stage = Cut(at=(1,), asks=asks, seen=[])
    hooked, (pixels, grid) = Hooked(family, stages=[Cut(at=(0,)), stage]), pictures(VIDEOS)
    hooked(pixels, grid)
    (seen,) = stage.seen
    tower = hooked.run.tower
    kept = tower.traces[0].kept
    cuts = [{0: (k, None)} for k in kept]
    found = each(family, pixels, grid, cuts)
    live = torch.cat([k + start for k, start in zip(kept, (0, 18), strict=True)])
    assert torch.equal(seen.raster_index, torch.cat(kept)) and seen.lengths == tuple(map(len, kept))
    assert seen.parts == (((3, 2, 3),), ((1, 3, 2),)) and seen.layer == 1 and seen.row == (0, 1)
    assert torch.equal(seen.segment, torch.cat([kept[0] // 6, torch.zeros_like(kept[1])]))
    expected = torch.cat([received(f, 1) for f in found])
    for name, layer in asks[:2]:
        torch.testing.assert_close(seen.fact(name, layer), expected, atol=1e-5, rtol=1e-4)
    keys = torch.cat([group(f.keys[0]) for f in found])
    torch.testing.assert_close(seen.fact("keys", 0), keys[live], atol=1e-5, rtol=1e-4)
    assert tower.traces[1].substitutes == {"cls_attention": "received_attention"}


def test_longest_segments_follow():
    """What flash attention is told besides the bounds, for windows and for whole images."""
    hooked, (pixels, grid) = Hooked("qwen2_5_vl", stages=[Cut(at=(0,))]), pictures(IMAGES)
    seen = []
    for block in hooked.model.model.visual.blocks:
        block.register_forward_pre_hook(
            lambda m, a, kw: seen.append((kw["cu_seqlens"], kw["max_seqlen"])), with_kwargs=True
        )
    hooked.model.model.visual(pixels, grid_thw=grid, max_seqlen=60, max_window_seqlen=16)
    assert [longest for _, longest in seen[:1]] == [16]
    assert [int(bounds.diff().max()) for bounds, _ in seen[1:]] == [longest for _, longest in seen[1:]]
    assert all(bounds.dtype == torch.int32 and bounds[-1] == seen[1][0][-1] < len(pixels) for bounds, _ in seen[1:])
    assert len(seen[1][0]) == 4 and len(seen[2][0]) > 4
    assert all(bool((bounds.diff() > 0).all()) for bounds, _ in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_release_leaves_nothing(family):
    hooked, (pixels, grid) = Hooked(family, wanted=[("features",)], stages=[Cut(at=(0,))]), pictures(IMAGES)
    with torch.no_grad():
        before = stock(family).model.get_image_features(pixels, grid, return_dict=True)
    assert not hooked(pixels, grid).any(-1).all(), "rows of zeros for what was dropped"
    hooked.handle.release()
    assert torch.equal(hooked(pixels, grid), torch.cat(list(before.pooler_output)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hooked.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_asked_nothing_installed(family):
    hooked = Hooked(family)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hooked.model.modules())


class Bad(Cut):
    """Drops everything. No paper."""

    def select(self, tokens):
        return Keep(torch.arange(0), (0,) * len(tokens.lengths))


def test_refusals():
    with pytest.raises(
        UnsupportedError, match=r"received_attention of encoder layer 2.*within windows.*1, 3: name one"
    ):
        Hooked("qwen2_5_vl", wanted=[("received_attention", 2)])
    with pytest.raises(UnsupportedError, match=r"stage .* needs cls_attention of encoder layer 0, where"):
        Hooked("qwen2_5_vl", stages=[Cut(at=(0,), asks=(("cls_attention", None),))])
    Hooked("qwen2_5_vl", wanted=[("keys", 2)])
    hooked = Hooked("qwen2_vl", stages=[Bad()])
    with pytest.raises(ValueError, match="dropped every visual token inside the vision tower"):
        hooked(*pictures(IMAGES))
    with pytest.raises(ValueError, match="dropped every"):
        hooked(*pictures(IMAGES))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter(family):
    model = tiny.make(family)
    adapter = registry.adapter(family)(model)
    pixels, grid = pictures(VIDEOS)
    first, second = adapter.layouts("video", {"pixel_values_videos": pixels, "video_grid_thw": grid})
    assert first.parts == ((3, 2, 3),) and first.segment.tolist() == [f for f in range(3) for _ in range(6)]
    assert second.parts == ((1, 3, 2),) and second.segment is None and second.length == 6
    assert adapter.placeholders == {kind: tiny.family(family).marker(kind) for kind in ("image", "video")}
    full = tiny.family(family).full_attention
    assert (adapter.encoder.full_attention, adapter.encoder.attention_layer, adapter.encoder.unit) == (full, 3, 4)
    assert len(adapter.projectors) == 1 + tiny.family(family).deepstack
    with pytest.raises(ValueError, match="pass what its processor returns"):
        adapter.layouts("image", {"pixel_values": pixels})
    with pytest.raises(ValueError, match="holds 95 patches, but image_grid_thw tells of 96"):
        adapter.layouts("image", {"pixel_values": pixels[1:], "image_grid_thw": grid})
    with pytest.raises(UnsupportedError, match="language-model head"):
        registry.adapter(family)(model.model)


def test_a_window_order_given_by_the_caller_is_the_one_undone():
    adapter = registry.adapter("qwen2_5_vl")(tiny.make("qwen2_5_vl"))
    given = {"window_index": torch.tensor([1, 0, 3, 2]), "cu_window_seqlens": torch.tensor([0, 16])}
    assert adapter.order(torch.tensor([[1, 4, 4]]), given).tolist() == [1, 0, 3, 2] and len(given) == 2
