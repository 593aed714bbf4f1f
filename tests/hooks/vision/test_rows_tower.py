"""Inside Pixtral towers, held against a naive one: image by image, patches token by token, attention written out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AttentionInterface

from vtoken import registry
from vtoken.hooks.state.context import Context
from vtoken.hooks.vision.rows_tower import RowsTower
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens

# LLaVA's class takes such a tower, too: every patch is a token there.
ROWS = (*tiny.families(by_rows=True), "llava")
SIZES = [(84, 140), (56, 56), (28, 112)]  # two of them are padded in the batch
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def made(family: str, attn: str = "sdpa") -> Any:
    return tiny.make(family, attn, **({} if tiny.family(family).by_rows else {"tower": "pixtral"}))


def side_of(model: Any) -> int:
    return getattr(model.config, "spatial_merge_size", 1)


def pictures(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(SIZES), 3, 84, 140, generator=generator), torch.tensor(SIZES)


@dataclass
class Naive:
    """Of one image: per layer the attention map [P, P] (head mean) and keys [P, D], and what the projector makes."""

    maps: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None
    projected: Tensor | None = None


@torch.no_grad()
def naive(model: Any, pixels: Tensor, size: Tensor, cut: tuple[int, Tensor] | None = None) -> Naive:
    """`cut` = (layer, kept): the tokens that are left after a layer; the others are 0 in what comes out."""
    tower, side, out = model.model.vision_tower, side_of(model), Naive()
    height, width = size.tolist()
    rows, columns = height // 14, width // 14
    at = torch.tensor(
        [
            (side * r + i, side * c + j)
            for r in range(rows // side)
            for c in range(columns // side)
            for i in range(side)
            for j in range(side)
        ]
    )
    patches = tower.patch_conv(pixels[None, :, :height, :width])[0]
    h = tower.ln_pre(torch.stack([patches[:, r, c] for r, c in at.tolist()]))
    cos, sin = tower.patch_positional_embedding(h[None], at)
    tokens, live = len(at) // side**2, torch.arange(len(at) // side**2)
    for index, layer in enumerate(tower.transformer.layers):
        a, x = layer.attention, layer.attention_norm(h)
        q, k, v = (p(x).unflatten(1, (a.num_heads, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        out.keys.append(k.flatten(1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q, cos, sin), rotate(k, cos, sin)) * a.head_dim**-0.5
        weights = scores.softmax(-1)
        out.maps.append(weights.mean(0))
        h = h + a.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        h = h + layer.feed_forward(layer.ffn_norm(h))
        if cut is not None and index == cut[0]:
            left = torch.isin(live, cut[1]).repeat_interleave(side**2)
            h, cos, sin, live = h[left], cos[left], sin[left], live[torch.isin(live, cut[1])]
    out.features = spread(group(h, side), live, tokens)
    p = model.model.multi_modal_projector
    if side > 1:
        joined = p.norm(h).unflatten(0, (-1, side**2)).transpose(1, 2).flatten(1)
        h = p.patch_merger.merging_layer(joined)
    out.projected = spread(p.linear_2(p.act(p.linear_1(h))), live, tokens)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def group(patches: Tensor, side: int) -> Tensor:
    return patches.unflatten(0, (-1, side**2)).mean(1)


def spread(rows: Tensor, live: Tensor, tokens: int) -> Tensor:
    out = rows.new_zeros(tokens, rows.shape[1])
    out[live] = rows
    return out


class Cut(Compressor):
    """Keeps a different number of tokens of each image after a layer. No paper."""

    site: ClassVar[Site] = "encoder"
    at: int = 1
    asks: tuple[tuple[str, int | None], ...] = ()
    empty: int = -1
    seen: list[Any] = []

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.at,)

    def needs(self) -> tuple[Fact, ...]:
        return tuple(Fact(*ask) for ask in self.asks)

    def select(self, tokens: VisualTokens) -> Keep:
        self.seen.append(tokens)
        index, start = [], 0
        for i, norm in enumerate(tokens.x.norm(dim=-1).split(tokens.lengths)):
            stay = (norm >= norm.mean()) & torch.tensor(i != self.empty)
            index.append(stay.nonzero()[:, 0] + start)
            start += len(norm)
        return Keep(torch.cat(index), tuple(map(len, index)))


class Hooked:
    """A tiny model with the tower's hooks on, and what they found in the last call."""

    def __init__(self, family: str, attn: str = "sdpa", wanted: Any = (), stages: tuple[Any, ...] = ()) -> None:
        self.model = made(family, attn)
        context = Context(registry.adapter(family)(self.model), stages=stages, read=frozenset(Fact(*w) for w in wanted))
        self.run = context.run
        RowsTower(context)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        out = self.model.model.get_image_features(pixels, image_sizes=sizes, return_dict=True)
        return torch.cat(list(out.pooler_output))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ROWS)
def test_facts_equal_a_naive_tower(family: str, attn: str) -> None:
    wanted = [("received_attention", 1), ("received_attention", 3), ("keys", 0), ("features",), ("pixels",)]
    hooked, (pixels, sizes) = Hooked(family, attn, wanted), pictures()
    out = hooked(pixels, sizes)
    side, facts = side_of(hooked.model), hooked.run.tower.facts
    found = [naive(made(family), p, s) for p, s in zip(pixels, sizes, strict=True)]
    torch.testing.assert_close(
        out, torch.cat([f.projected for f in found if f.projected is not None]), atol=2e-4, rtol=2e-3
    )

    def same(name: str, layer: int | None, expected: list[Tensor]) -> None:
        torch.testing.assert_close(facts[Fact(name, layer)], torch.cat(expected), **CLOSE)

    for layer in (1, 3):
        same("received_attention", layer, [group(f.maps[layer].mean(0)[:, None], side)[:, 0] for f in found])
    same("keys", 0, [group(f.keys[0], side) for f in found])
    same("features", None, [f.features for f in found if f.features is not None])
    edge = 14 * side
    tiles = [
        p[:, r : r + edge, c : c + edge]
        for p, (height, width) in zip(pixels, sizes.tolist(), strict=True)
        for r in range(0, height, edge)
        for c in range(0, width, edge)
    ]
    # Patch by patch, then by channel.
    cells = [t.unflatten(1, (side, 14)).unflatten(3, (side, 14)).permute(1, 3, 0, 2, 4).flatten() for t in tiles]
    assert torch.equal(facts[Fact("pixels")], torch.stack(cells))


@pytest.mark.parametrize("empty", [-1, 1], ids=["all", "one is emptied"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ROWS)
def test_what_is_left_runs_as_a_naive_tower_of_it(family: str, attn: str, empty: int) -> None:
    """Later facts and the features are those of the tokens that are left, 0 elsewhere."""
    stage = Cut(at=1, empty=empty, asks=(("received_attention", None),))
    stage.seen.clear()
    hooked, (pixels, sizes) = Hooked(family, attn, [("received_attention", 3), ("features",)], (stage,)), pictures()
    out, tower = hooked(pixels, sizes), hooked.run.tower
    side, kept = side_of(hooked.model), tower.history.kept()
    assert len(kept) == len(SIZES) and all(len(k) < n for k, n in zip(kept, tower.history.full, strict=True))
    assert bool(len(kept[1])) == (empty < 0)
    stock = made(family)
    found = [naive(stock, p, s, (1, k)) for p, s, k in zip(pixels, sizes, kept, strict=True)]
    live = tower.alive()
    expected = torch.cat([f.projected for f in found if f.projected is not None])
    torch.testing.assert_close(out[live], expected[live], **CLOSE)
    assert not out[~live].any()
    features = torch.cat([f.features for f in found if f.features is not None])
    torch.testing.assert_close(tower.facts[Fact("features")], features, **CLOSE)
    received = [
        spread(group(f.maps[3].mean(0)[:, None], side), k, n)[:, 0]
        for f, k, n in zip(found, kept, tower.history.full, strict=True)
        if len(k)
    ]
    parts = tower.facts[Fact("received_attention", 3)].split(tower.history.full)
    given = [part for part, k in zip(parts, kept, strict=True) if len(k)]
    torch.testing.assert_close(torch.cat(given), torch.cat(received), **CLOSE)
    (seen,) = stage.seen
    before = torch.cat([group(f.maps[1].mean(0)[:, None], side)[:, 0] for f in found])
    torch.testing.assert_close(seen.facts[Fact("received_attention", None)], before, **CLOSE)


@pytest.mark.parametrize("family", ROWS)
def test_a_single_image_needs_no_mask(family: str) -> None:
    stage = Cut(at=0)
    hooked, (pixels, sizes) = Hooked(family, stages=(stage,)), pictures()
    masks: list[Any] = []
    for layer in hooked.model.model.vision_tower.transformer.layers:
        layer.register_forward_hook(lambda module, args, out: masks.append(args[1]))
    hooked(pixels[:1], sizes[:1])
    assert masks[0] is not None and masks[1:] == [None] * 3
    masks.clear()
    hooked(pixels, sizes)
    left = 4 * sum(hooked.run.tower.history.counts) if side_of(hooked.model) > 1 else None
    assert left in (None, masks[-1].shape[-1])


@pytest.mark.parametrize("family", ROWS)
def test_flash_attention_is_told_where_images_end(family: str) -> None:
    """By the lengths of what is left of each, instead of a mask."""
    hooked, (pixels, sizes) = Hooked(family, stages=(Cut(at=1, empty=1),)), pictures()
    expected = hooked(pixels, sizes)
    attending: list[Any] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        attending.append(kwargs.get("cu_seq_lens_q"))
        if attending[-1] is None:  # up to 5.17 the model does not say it
            ends = torch.tensor([0, *(torch.tensor(SIZES) // 14).prod(1).cumsum(0).tolist()])
        else:
            assert torch.equal(attending[-1], kwargs["cu_seq_lens_k"]) and attending[-1].dtype == torch.int32
            assert int(attending[-1].diff().max()) == kwargs["max_length_q"] == kwargs["max_length_k"]
            ends = attending[-1]
        image = torch.repeat_interleave(ends.diff())
        scores = (q @ k.transpose(-1, -2) * kwargs["scaling"]).masked_fill(image[:, None] != image, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("flash_of_images", attend)
    hooked.model.model.vision_tower.config._attn_implementation_internal = "flash_of_images"
    torch.testing.assert_close(hooked(pixels, sizes), expected, **CLOSE)
    unit = side_of(hooked.model) ** 2
    left = [n * unit for n in hooked.run.tower.history.counts if n]
    assert len(left) == 2 and [e.diff().tolist() for e in attending[2:]] == [left] * 2
