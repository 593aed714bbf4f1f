"""Inside towers that hold pictures row by row and keep them apart by bounds, held against a naive one: picture by
picture, patches token by token, attention written out."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor

from vtoken.hooks.state.context import Context
from vtoken.hooks.vision.grids_tower import GridsTower
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens

families = pytest.mark.parametrize("family", tiny.families(by_grids=True))
GRIDS = [(1, 6, 10), (1, 4, 4), (1, 2, 8)]
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


class Cut(Compressor):
    """Keeps a different number of tokens of each picture after chosen layers; none of `empty`. No paper."""

    site: ClassVar[Site] = "encoder"
    at: tuple[int, ...] = (1,)
    empty: int = -1
    merge: bool = False

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

    def select(self, tokens: VisualTokens) -> Keep:
        index, into, start = [], [], 0
        for i, norm in enumerate(tokens.x.norm(dim=-1).split(tokens.lengths)):
            stay = (norm >= norm.mean()) & torch.tensor(i != self.empty)
            if self.merge:
                stay[0] = True
            into.append(stay.cumsum(0) - 1 + sum(map(len, index)))
            index.append(stay.nonzero()[:, 0] + start)
            start += len(norm)
        return Keep(torch.cat(index), tuple(map(len, index)), torch.cat(into) if self.merge else None)


class Hooked:
    """A tiny model with the tower's hooks on, and what they found in the last call."""

    def __init__(self, family: str, attn: str = "sdpa", wanted: Any = (), stages: tuple[Any, ...] = ()) -> None:
        self.model = tiny.make(family, attn)
        context = Context(tiny.adapter(self.model), stages=stages, read=frozenset(Fact(*w) for w in wanted))
        self.run = context.run
        GridsTower(context)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: Tensor) -> Tensor:
        return torch.cat(list(self.model.model.get_image_features(pixels, grid, return_dict=True).pooler_output))


def pictures() -> tuple[Tensor, Tensor]:
    patches = sum(h * w for _, h, w in GRIDS)
    return torch.randn(patches, 3, 14, 14, generator=torch.Generator().manual_seed(0)), torch.tensor(GRIDS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def places(grid: tuple[int, int, int]) -> Tensor:
    """[P, 2] row and column of each patch, token by token."""
    _, rows, columns = grid
    square = [(i, j) for i in range(2) for j in range(2)]
    return torch.tensor(
        [(2 * r + i, 2 * c + j) for r in range(rows // 2) for c in range(columns // 2) for i, j in square]
    )


@torch.no_grad()
def naive(family: str, pixels: Tensor, grid: tuple[int, int, int], cuts: dict[int, Any]) -> dict[str, Any]:
    """One picture. `cuts` layer -> (kept, into) of its tokens; into None drops, else means."""
    model: Any = tiny.make(family)
    tower, at = model.model.visual.vision_model, places(grid)
    embedded = tower.embeddings(pixels[None], grid_thw=torch.tensor([grid]))
    h = embedded[at[:, 0] * grid[2] + at[:, 1]]
    # The stock tower's own angles, of its first layer.
    seen: dict[str, Any] = {}
    hook = tower.encoder.layers[0].register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    tower(pixels[None], grid_thw=torch.tensor([grid]))
    hook.remove()
    cos, sin = (x[at[:, 0] * grid[2] + at[:, 1]] for x in seen["position_embeddings"])
    token, total = torch.arange(len(at) // 4), len(at) // 4
    out: dict[str, Any] = {"received": [], "keys": []}
    for number, layer in enumerate(tower.encoder.layers):
        a, x = layer.self_attn, layer.layer_norm1(h)
        q, k, v = (p(x).unflatten(1, (a.num_heads, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        scores = torch.einsum("qhd,khd->hqk", rotate(q, cos, sin), rotate(k, cos, sin)) * a.head_dim**-0.5
        weights = scores.softmax(-1)
        out["received"].append(spread(weights.mean((0, 1)).unflatten(0, (-1, 4)).mean(1), token, total))
        out["keys"].append(spread(k.flatten(1).unflatten(0, (-1, 4)).mean(1), token, total))
        h = h + a.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        h = h + layer.mlp(layer.layer_norm2(h))
        if number in cuts:
            kept, into = cuts[number]
            groups, left = h.unflatten(0, (-1, 4)), torch.isin(token, kept)
            if into is None:
                groups = groups[left]
            else:
                groups = torch.stack([groups[into[token] == n].mean(0) for n in kept])
            h, rows = groups.flatten(0, 1), left.repeat_interleave(4)
            cos, sin, token = cos[rows], sin[rows], token[left]
    h = tower.post_layernorm(h)
    p = model.model.projector
    joined = p.pre_norm(h).unflatten(0, (-1, 4)).flatten(1)
    out["features"] = spread(h.unflatten(0, (-1, 4)).mean(1), token, total)
    out["tokens"] = spread(p.linear_2(p.act(p.linear_1(joined))), token, total)
    return out


def spread(rows: Tensor, token: Tensor, total: int) -> Tensor:
    out = rows.new_zeros(total, *rows.shape[1:])
    out[token] = rows
    return out


def each(family: str, pixels: Tensor, cuts: list[dict[int, Any]]) -> list[dict[str, Any]]:
    parts = pixels.split([h * w for _, h, w in GRIDS])
    return [naive(family, part, grid, cut) for part, grid, cut in zip(parts, GRIDS, cuts, strict=True)]


@families
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_facts_equal_a_naive_tower(family: str, attn: str) -> None:
    wanted = [("received_attention", 1), ("received_attention", 3), ("keys", 0), ("features",), ("pixels",)]
    hooked, (pixels, grid) = Hooked(family, attn, wanted), pictures()
    out, found = hooked(pixels, grid), each(family, pixels, [{}] * 3)
    facts = hooked.run.tower.facts
    torch.testing.assert_close(out, torch.cat([f["tokens"] for f in found]), **CLOSE)
    for layer in (1, 3):
        got = facts[Fact("received_attention", layer)]
        torch.testing.assert_close(got, torch.cat([f["received"][layer] for f in found]), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(facts[Fact("keys", 0)], torch.cat([f["keys"][0] for f in found]), **CLOSE)
    torch.testing.assert_close(facts[Fact("features")], torch.cat([f["features"] for f in found]), **CLOSE)
    rows = [
        part[at[:, 0] * grid[2] + at[:, 1]]
        for part, grid, at in zip(pixels.split([h * w for _, h, w in GRIDS]), GRIDS, map(places, GRIDS), strict=True)
    ]
    assert torch.equal(facts[Fact("pixels")], torch.cat(rows).flatten(1).unflatten(0, (-1, 4)).flatten(1))


CUTS = {
    "once": (Cut(),),
    "one is emptied": (Cut(empty=1),),
    "twice": (Cut(at=(0, 2)),),
    "merge": (Cut(merge=True),),
    "merge, then drop": (Cut(at=(0,), merge=True), Cut(at=(2,))),
}


@families
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("stages", CUTS)
def test_what_is_left_runs_as_a_naive_tower_of_it(family: str, stages: str, attn: str) -> None:
    hooked = Hooked(family, attn, [("received_attention", 3), ("features",)], CUTS[stages])
    pixels, grid = pictures()
    ran: list[int] = []
    hooked.model.model.visual.vision_model.encoder.layers[3].register_forward_hook(
        lambda m, a, out: ran.append(len(out[0] if isinstance(out, tuple) else out))
    )
    out, tower = hooked(pixels, grid), hooked.run.tower
    assert ran == [4 * sum(tower.history.counts)] and ran[0] < len(pixels)
    cuts = [
        {t.layer: (t.kept[i], None if t.into is None else t.into[i]) for t in tower.traces} for i in range(len(GRIDS))
    ]
    found, live = each(family, pixels, cuts), tower.alive()
    torch.testing.assert_close(out[live], torch.cat([f["tokens"] for f in found])[live], **CLOSE)
    assert not out[~live].any()
    for name, key in (("features", None), ("received_attention", 3)):
        want = torch.cat([f["features"] if key is None else f["received"][key] for f in found])
        torch.testing.assert_close(tower.facts[Fact(name, key)][live], want[live], **CLOSE)


@families
def test_bounds_are_those_of_what_is_left(family: str) -> None:
    """Also the longest, where the model says it (flash attention)."""
    hooked, (pixels, grid) = Hooked(family, stages=(Cut(empty=1),)), pictures()
    given: list[Any] = []
    layers = hooked.model.model.visual.vision_model.encoder.layers
    layers[0].register_forward_pre_hook(lambda m, a, k: (a, {**k, "max_seqlen": 60}), with_kwargs=True)
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "max_seqlen": 60}), with_kwargs=True, prepend=True)
        layer.register_forward_pre_hook(lambda m, a, k: given.append(k), with_kwargs=True)
    hooked(pixels, grid)
    left = [4 * n for n in hooked.run.tower.history.counts if n]
    assert len(left) == 2
    for k in given[1:]:
        assert k["cu_seqlens"].diff().tolist() == left and k["max_seqlen"] == max(left)
        assert k["cu_seqlens"].dtype == torch.int32
