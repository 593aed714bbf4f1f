"""Towers that run on a part of their patches and estimate the others, against a literal loop over layers."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import rows_for
from flop_counts import CLOSE, counted
from hooked_tower import IMAGES, VIDEOS, Hooked, pictures
from modes import LOGITS, ROWS, alone, greedy
from naive_tower import merged, rotate, stock

import vtoken
from vtoken import config
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account

PACKED = tiny.families(grouped=True)
OPTIONS = {
    "attention over all": {"layer": 1, "keep": "35%", "neighbours": 3, "stabilised": 9},
    "one layer": {"layer": 1, "keep": "35%", "neighbours": 3, "stabilised": 1},
    "kept alone": {"layer": 2, "keep": "40%", "neighbours": 2, "stabilised": 0},
    "few": {"layer": 1, "keep": 2, "neighbours": 10, "stabilised": 1},
}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def chosen(h, before, options):
    """Which patches stay, ascending, and for every other one its nearest."""
    stage = config.load([{"ipcv": options}]).stages[0]
    count = stage.keep.counts((len(h),), (0,))[0]
    stay = sorted(sorted(range(len(h)), key=lambda i: -float((h[i] - before[i]).norm()))[:count])
    near = {}
    for i in set(range(len(h))) - set(stay):
        near[i] = sorted(stay, key=lambda j, i=i: float((h[i] - h[j]).norm()))[: options["neighbours"]]
    return stay, near


def filled(h, origin, near):
    out = h.clone()
    for i, others in near.items():
        out[i] = origin[i] + torch.stack([h[j] - origin[j] for j in others]).mean(0)
    return out


@torch.no_grad()
def literal(model, pixels, grid, options):
    """Visual tokens of one picture and what DeepStack taps, patch by patch in token order."""
    tower, (frames, rows, columns) = model.model.visual, grid.tolist()
    at = torch.tensor(
        [
            (f, 2 * r + i, 2 * c + j)
            for f in range(frames)
            for r in range(rows // 2)
            for c in range(columns // 2)
            for i in range(2)
            for j in range(2)
        ]
    )
    seen = []
    hook = tower.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    tower(pixels, grid_thw=torch.tensor([[1, rows, columns]] * frames))
    hook.remove()
    has_places = hasattr(tower, "pos_embed") or hasattr(tower, "embeddings")
    h = seen[0] if has_places else tower.patch_embed(pixels)
    cos, sin = tower.rotary_pos_emb(h, at[:, 1:])
    full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    window = torch.stack([at[:, 0], at[:, 1] // 4, at[:, 2] // 4], 1)
    stay, near, origin, before, taps = list(range(len(h))), {}, h, h, []
    for index, block in enumerate(tower.blocks):
        if index == options["layer"]:
            stay, near = chosen(h, before, options)
            origin = h.clone()
        before = h
        h = filled(h, origin, near)
        beyond = index >= options["layer"] + options["stabilised"]
        seeing = torch.tensor(stay) if beyond else torch.arange(len(h))
        alike = (at[:, :1] if index in full else window)[seeing]
        sees = (alike[:, None] == alike[None]).all(-1)
        q, k, v = block.attn.qkv(block.norm1(h[seeing])).unflatten(1, (3, block.attn.num_heads, -1)).unbind(1)
        q, k = (rotate(x, cos[seeing], sin[seeing]) for x in (q, k))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        h = h.clone()
        h[seeing] += block.attn.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        h[stay] += block.mlp(block.norm2(h[stay]))
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            taps.append(tower.deepstack_merger_list[len(taps)](filled(h, origin, near)))
    return merged(tower, filled(h, origin, near)), taps


@every
@pytest.mark.parametrize("grids", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_towers_equal_a_literal_loop(family, grids, options):
    (pixels, grid), hooked = pictures(grids), Hooked(family, stages=config.load([{"ipcv": options}]).stages)
    got = hooked(pixels, grid)
    parts = pixels.split(grid.prod(-1).tolist())
    want = [literal(stock(family), p, g, options) for p, g in zip(parts, grid, strict=True)]
    torch.testing.assert_close(got, torch.cat([tokens for tokens, _ in want]), atol=2e-4, rtol=1e-3)
    assert len(hooked.taps) == len(want[0][1])
    for tap, each in zip(hooked.taps, zip(*(taps for _, taps in want), strict=True), strict=True):
        torch.testing.assert_close(tap, torch.cat(each), atol=2e-4, rtol=1e-3)


@every
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_padded_towers_equal_a_literal_loop(tower, options):
    """CLS, where there is one, goes through all layers."""
    model = tiny.llava(tower=tower)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    cls, inner = int(tower == "clip"), model.model.vision_tower
    last = config.load([{"ipcv": options}]).stages[0] and (len(inner.encoder.layers) - (2 if cls else 1))
    seen, want = [], []
    hook = inner.encoder.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        given = model.model.get_image_features(pixels, return_dict=True)
        hook.remove()
        for crop in seen[0]:
            h, stay, near, origin, before = crop, list(range(len(crop) - cls)), {}, crop[cls:], crop[cls:]
            for index, layer in enumerate(inner.encoder.layers[: last + 1]):
                if index == options["layer"]:
                    stay, near = chosen(h[cls:], before, options)
                    origin = h[cls:].clone()
                before = h[cls:]
                h = torch.cat([h[:cls], filled(h[cls:], origin, near)])
                kept = torch.tensor([*range(cls), *(cls + i for i in stay)])
                beyond = index >= options["layer"] + options["stabilised"]
                seeing = kept if beyond else torch.arange(len(h))
                h = h.clone()
                h[seeing] += layer.self_attn(layer.layer_norm1(h[seeing][None]), attention_mask=None)[0][0]
                h[kept] += layer.mlp(layer.layer_norm2(h[kept]))
            want.append(model.model.multi_modal_projector(filled(h[cls:], origin, near)))
        with vtoken.wrapped(model, [{"ipcv": options}]):
            got = model.model.get_image_features(pixels, return_dict=True)
    got, want = (torch.cat(list(x)) for x in (got.pooler_output, want))
    assert got.shape == torch.cat(list(given.pooler_output)).shape
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", tiny.families(crops_sized=True))
def test_towers_of_crops_of_their_own_size_equal_a_literal_loop(family, options):
    """Crop by crop, without padding."""
    model = tiny.make(family)
    stack, projector = model.model.vision_tower.encoder, model.model.multi_modal_projector
    batch = tiny.build(model, rows_for(family, "ragged")[:2], seed=3)
    given = {k: v for k, v in batch.items() if k in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    seen, want = [], []
    hook = stack.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model.model.get_image_features(**given)
        hook.remove()
        for crop, (rows, columns) in zip(seen[0], given["spatial_shapes"].tolist(), strict=True):
            h = before = origin = crop[: rows * columns]
            stay, near = list(range(len(h))), {}
            for index, layer in enumerate(stack.layers):
                if index == options["layer"]:
                    stay, near = chosen(h, before, options)
                    origin = h.clone()
                before, h = h, filled(h, origin, near)
                beyond = index >= options["layer"] + options["stabilised"]
                seeing = torch.tensor(stay) if beyond else torch.arange(len(h))
                h = h.clone()
                h[seeing] += layer.self_attn(layer.layer_norm1(h[seeing][None]), attention_mask=None)[0][0]
                h[stay] += layer.mlp(layer.layer_norm2(h[stay]))
            h = model.model.vision_tower.post_layernorm(filled(h, origin, near))
            want.append(projector(h.view(1, rows, columns, -1)).flatten(0, 2))
        with vtoken.wrapped(model, [{"ipcv": options}]):
            got = model.model.get_image_features(**given, return_dict=True).pooler_output
    torch.testing.assert_close(torch.cat(list(got)), torch.cat(want), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_and_keeping_all(family):
    model = tiny.make(family)
    batches = [tiny.build(model, ROWS, seed=3)]
    batches += [tiny.build(model, rows_for(family, "video"), seed=3)] if family in tiny.VIDEO else []
    for batch in batches:
        dense = greedy(model, batch, **LOGITS).logits
        with vtoken.wrapped(model, [{"ipcv": {"keep": "100%"}}]):
            assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(dense)), "bit for bit"
        for stabilised in (0, 1):
            ipcv = {"layer": 1, "keep": "40%", "stabilised": stabilised}
            with vtoken.wrapped(model, [{"ipcv": ipcv}, {"random": {"keep": 3}}]):
                together = torch.stack(greedy(model, batch, **LOGITS).logits, 1)
                trace = vtoken.trace(model)
                assert [s.name for s in trace.stages] == ["ipcv", "random"] and set(trace.tokens_out) == {3}
                for row in range(len(together)):
                    single = torch.stack(greedy(model, alone(model, batch, row), **LOGITS).logits, 1)
                    torch.testing.assert_close(together[row : row + 1], single, atol=2e-4, rtol=1e-4)
            assert all(s.stood_aside is None for s in trace.stages)
        with vtoken.wrapped(model, [{"ipcv": {"layer": 1, "keep": "40%", "stabilised": 0}}]):
            assert not torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(dense)), "it acts"


@pytest.mark.parametrize("options", [OPTIONS["one layer"], OPTIONS["kept alone"]], ids=["one layer", "kept alone"])
@pytest.mark.parametrize("family", tiny.families(leading=True, anyres=False))
def test_the_account_of_the_tower(family, options):
    model = tiny.make(family)
    (row, *_) = rows_for(family, "ragged")
    batch = tiny.build(model, [row], seed=3)
    pixels = batch["pixel_values"]
    size = (56, 56)
    given = {"image_grid_thw": batch["image_grid_thw"]} if "image_grid_thw" in batch else {}
    if given:
        _, rows, columns = given["image_grid_thw"][0].tolist()
        size = (rows * model.config.vision_config.patch_size, columns * model.config.vision_config.patch_size)
    pipeline = config.load([{"ipcv": options}])
    dense, claimed = (account(model.config, p, image_size=size, new_tokens=1) for p in (None, pipeline))
    whole = counted(lambda: model.model.get_image_features(pixels, **given))
    with vtoken.wrapped(model, pipeline):
        short = counted(lambda: model.model.get_image_features(pixels, **given))
    assert whole == pytest.approx(dense.tower + dense.projector, rel=CLOSE)
    # Distances are no matrix products, so the counter passes over them.
    assert short == pytest.approx(claimed.tower + claimed.projector, rel=CLOSE)
    assert short < whole and claimed.stages > 0 and claimed.visual_tokens == dense.visual_tokens


@pytest.mark.parametrize("family", PACKED)
def test_pictures_that_have_lost_patches_before_are_refused(family):
    """It failed inside the tower. Smaller pictures are whole."""
    model = tiny.make(family)
    with pytest.raises(UnsupportedError, match="needs all patches of a picture"):
        vtoken.wrap(model, [{"pixelprune": {}}, {"ipcv": {}}])
    with vtoken.wrapped(model, [{"resize": {"keep": "50%"}}, {"ipcv": {}}]):
        greedy(model, tiny.build(model, [[3, ("img", (1, 8, 8)), 5]], seed=3))
        assert vtoken.trace(model).tokens_out == vtoken.trace(model).stages[0].tokens_out


def test_what_does_not_go_with_it_is_refused():
    model = tiny.llava()
    with pytest.raises(UnsupportedError, match="needs all patches of a picture"):
        vtoken.wrap(model, [{"ipcv": {}}, {"flowcut": {"keep": 5}}])
    with pytest.raises(UnsupportedError, match="needs all patches of a picture"):
        vtoken.wrap(tiny.make(PACKED[0]), [{"pixelprune": {}}, {"ipcv": {}}])
    with pytest.raises(UnsupportedError, match="cls_attention of encoder layer 2, which sees a part"):
        vtoken.wrap(model, [{"ipcv": {"stabilised": 1}}, {"fastervlm": {"keep": 5}}])
    with vtoken.wrapped(model, [{"ipcv": {}}, {"fastervlm": {"keep": 5}}]):
        greedy(model, tiny.build(model, [[3, "img", 5]], seed=3))
    vtoken.unwrap(vtoken.wrap(model, "none"))
