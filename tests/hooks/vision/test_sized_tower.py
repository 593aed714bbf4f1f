"""Inside towers whose crops have sizes of their own, held against a naive one: crop by crop without padding, patches
token by token, attention written out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import tiny
import torch
from batches import rows_for
from modes import alone
from plain_runs import run
from probes import Inside, InsideMerge
from torch import Tensor

import vtoken
from vtoken import registry
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.parted import side_by_side
from vtoken.hooks.vision.sized_tower import SizedTower
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens

FAMILIES = tiny.families(crops_sized=True)
families = pytest.mark.parametrize("family", FAMILIES)
CROPS = [(6, 8), (8, 8), (2, 10), (8, 8)]  # rows and columns of patches; all rows of a batch are 64 or 70 long
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def pictures(length: int = 64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(CROPS)
    mask = (torch.arange(length) < sizes.prod(1)[:, None]).int()
    pixels = torch.randn(len(CROPS), length, 3 * 14**2, generator=generator)
    return {"pixel_values": pixels, "spatial_shapes": sizes, "pixel_attention_mask": mask}


@dataclass
class Naive:
    """Of one crop: per layer the attention map [P, P] (head mean), keys and values [P, D], and what the projector
    makes."""

    maps: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    pixels: Tensor | None = None
    features: Tensor | None = None
    projected: Tensor | None = None


@torch.no_grad()
def naive(model: Any, pixels: Tensor, size: Tensor, cuts: dict[int, tuple[Tensor, Tensor | None]]) -> Naive:
    """`cuts[layer]` = (kept, into): tokens that are left after a layer; into None drops, else means of equal weight."""
    tower, out, (rows, columns) = model.model.vision_tower, Naive(), size.tolist()
    order = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten()
    pixels = pixels[: rows * columns]
    out.pixels = pixels[order].unflatten(0, (-1, 4)).flatten(1)
    h = tower.embeddings(pixels[None], size[None])[0][order]
    live = torch.arange(len(h) // 4)
    tokens = len(live)
    for index, layer in enumerate(tower.encoder.layers):
        a, x = layer.self_attn, layer.layer_norm1(h)
        q, k, v = (p(x).unflatten(1, (a.num_heads, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        out.keys.append(k.flatten(1))
        out.values.append(v.flatten(1))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * a.head_dim**-0.5).softmax(-1)
        out.maps.append(weights.mean(0))
        h = h + a.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        h = h + layer.mlp(layer.layer_norm2(h))
        if index in cuts:
            kept, into = cuts[index]
            groups = h.unflatten(0, (-1, 4))
            if into is None:
                groups = groups[torch.isin(live, kept)]
            else:
                groups = torch.stack([groups[into[live] == k].mean(0) for k in kept])
            h, live = groups.flatten(0, 1), kept
    h = tower.post_layernorm(h)
    out.features = spread(group(h), live, tokens)
    p = model.model.multi_modal_projector
    made = p.linear_2(p.act(p.linear_1(p.layer_norm(h.unflatten(0, (-1, 4)).flatten(1)))))
    out.projected = spread(made, live, tokens)
    return out


def group(patches: Tensor) -> Tensor:
    return patches.unflatten(0, (-1, 4)).mean(1)


def spread(rows: Tensor, live: Tensor, tokens: int) -> Tensor:
    out = rows.new_zeros(tokens, rows.shape[1])
    out[live] = rows
    return out


class Cut(Compressor):
    """Keeps a different number of tokens of each crop after layers. No paper."""

    site: ClassVar[Site] = "encoder"
    at: tuple[int, ...] = (1,)
    asks: tuple[tuple[str, int | None], ...] = ()
    empty: int = -1
    seen: Any = []

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

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
        self.model = tiny.make(family, attn)
        context = Context(registry.adapter(family)(self.model), stages=stages, read=frozenset(Fact(*w) for w in wanted))
        self.run = context.run
        SizedTower(context)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat(list(self.model.model.get_image_features(**inputs, return_dict=True).pooler_output))


def each(model: Any, inputs: dict[str, Tensor], cuts: Any = None) -> list[Naive]:
    rows = zip(inputs["pixel_values"], inputs["spatial_shapes"], strict=True)
    return [naive(model, pixels, size, cuts[i] if cuts else {}) for i, (pixels, size) in enumerate(rows)]


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@families
def test_facts_equal_a_naive_tower(family: str, attn: str, length: int) -> None:
    wanted = [("received_attention", 1), ("received_attention", 3), ("keys", 0), ("values", 2), ("features",)]
    hooked, inputs = Hooked(family, attn, [*wanted, ("pixels",)]), pictures(length)
    out, facts = hooked(inputs), hooked.run.tower.facts
    assert torch.equal(out, torch.cat(list(tiny.make(family, attn).get_image_features(**inputs).pooler_output)))
    found = each(tiny.make(family), inputs)
    torch.testing.assert_close(out, torch.cat([f.projected for f in found]), **CLOSE)
    for layer in (1, 3):
        want = torch.cat([group(f.maps[layer].mean(0)[:, None])[:, 0] for f in found])
        torch.testing.assert_close(facts[Fact("received_attention", layer)], want, **CLOSE)
    torch.testing.assert_close(facts[Fact("keys", 0)], torch.cat([group(f.keys[0]) for f in found]), **CLOSE)
    torch.testing.assert_close(facts[Fact("values", 2)], torch.cat([group(f.values[2]) for f in found]), **CLOSE)
    torch.testing.assert_close(facts[Fact("features")], torch.cat([f.features for f in found]), **CLOSE)
    assert torch.equal(facts[Fact("pixels")], torch.cat([f.pixels for f in found]))


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("empty", [-1, 1], ids=["all", "one is emptied"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@families
def test_what_is_left_runs_as_a_naive_tower_of_it(family: str, attn: str, empty: int, length: int) -> None:
    """Later facts and the features are those of the tokens that are left, 0 elsewhere; no row is longer than that of
    the fullest crop."""
    stage = Cut(at=(0, 1), empty=empty, asks=(("received_attention", None),))
    stage.seen.clear()
    hooked = Hooked(family, attn, [("received_attention", 3), ("features",)], (stage,))
    widths: list[int] = []
    for layer in hooked.model.model.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda m, args, out: widths.append(out.shape[1]))
    inputs = pictures(length)
    out, tower = hooked(inputs), hooked.run.tower
    first, second = tower.traces
    assert widths == [length, *(4 * max(t.tokens_out) for t in (first, second, second))]
    assert len(second.kept[1]) == (0 if empty == 1 else second.tokens_out[1]) and sum(second.tokens_out) < 40
    cuts = [{0: (a, None), 1: (b, None)} for a, b in zip(first.kept, second.kept, strict=True)]
    stock = tiny.make(family)
    filled = [i for i, kept in enumerate(second.kept) if len(kept)]
    inside = [cut if len(cut[1][0]) else {} for cut in cuts]
    found = each(stock, inputs, inside)
    live = tower.alive()
    parts = live.split(tower.history.full)
    for name, given in (("projected", out), ("features", tower.facts[Fact("features")])):
        for i, (mine, stay) in enumerate(zip(given.split(tower.history.full), parts, strict=True)):
            if i in filled:
                torch.testing.assert_close(mine[stay], getattr(found[i], name)[stay], **CLOSE)
            assert not mine[~stay].any()
    received = tower.facts[Fact("received_attention", 3)].split(tower.history.full)
    for i in filled:
        want = spread(group(found[i].maps[3].mean(0)[:, None]), second.kept[i], len(parts[i]))[:, 0]
        torch.testing.assert_close(received[i], want, **CLOSE)
    before = torch.cat([group(f.maps[0].mean(0)[:, None])[:, 0] for f in each(stock, inputs)])
    torch.testing.assert_close(stage.seen[0].facts[Fact("received_attention", None)], before, **CLOSE)


@families
def test_merged_tokens_are_means(family: str) -> None:
    hooked, inputs = Hooked(family, stages=(InsideMerge(at=(0, 2)),)), pictures()
    out, traces = hooked(inputs), hooked.run.tower.traces
    cuts = [{t.layer: (t.kept[i], t.into[i]) for t in traces} for i in range(len(CROPS))]
    want = torch.cat([f.projected for f in each(tiny.make(family), inputs, cuts)])
    torch.testing.assert_close(out, want, **CLOSE)


@families
def test_the_projector_sees_what_is_left(family: str) -> None:
    hooked, entering = Hooked(family, stages=(Cut(),)), []
    hooked.model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: entering.append(args[0].shape))
    hooked(pictures())
    assert [rows * columns // 4 for _, rows, columns, _ in entering] == list(hooked.run.tower.history.counts)


@families
def test_crops_of_a_picture_are_told_of_the_picture(family: str) -> None:
    """Stages inside see crops; the trace, facts and stages behind the tower see the picture that the prompt tells."""
    model, seen = tiny.make(family), []
    batch = tiny.build(model, [[2, ("img", (300, 150)), 3, "img", 1]], seed=3)
    cut_inside = Cut(seen=seen)
    with vtoken.wrapped(model, [InsideMerge(at=(0,)), cut_inside, {"uniform": {"keep": "100%"}}]), torch.no_grad():
        model(**batch)
        trace = vtoken.trace(model)
    parts = ((1, 4, 4), (1, 4, 4), (1, 5, 2))
    assert trace.parts == [parts, ((1, 3, 4),)] and trace.visual_tokens == [42, 12]
    assert [tokens.parts for tokens in seen] == [((parts[0],), (parts[1],), (parts[2],), ((1, 3, 4),))]
    merged, cut, behind = trace.stages
    assert merged.tokens_in == [42, 12] and cut.tokens_in == merged.tokens_out
    for entry in (merged, cut):
        assert [len(k) for k in entry.kept] == entry.tokens_out
        assert all(k.tolist() == sorted(set(k.tolist())) for k in entry.kept)
    for into, kept in zip(merged.into, merged.kept, strict=True):
        assert torch.equal(into[kept], kept) and set(into.tolist()) == set(kept.tolist())
        bounds = torch.tensor([0, 16, 32, 42, 1000])
        assert torch.equal(
            torch.bucketize(into, bounds, right=True), torch.bucketize(torch.arange(len(into)), bounds, right=True)
        )
    assert [k.tolist() for k in behind.kept] == [k.tolist() for k in cut.kept]


SQUARE, WIDE, HIGH = (1, 2, 2), (1, 1, 3), (1, 3, 1)


@pytest.mark.parametrize(
    ("crops", "prompt", "pictures"),
    [
        ([SQUARE, WIDE], "..vvvv.vvv.", [(SQUARE,), (WIDE,)]),  # two crops are cut alike
        ([SQUARE, SQUARE, WIDE], ".vvvv.vvvv.vvv..", [(SQUARE, SQUARE, WIDE)]),
        ([SQUARE, SQUARE, WIDE], "vvvvvvvvvvv", [(SQUARE, SQUARE, WIDE)]),
        ([SQUARE, SQUARE, WIDE, HIGH], ".vvvv.vvvv.vvv..vvv", [(SQUARE, SQUARE, WIDE), (HIGH,)]),
        ([SQUARE, SQUARE, WIDE, SQUARE], ".vvvv.vvvv.vvv.vvvv", [(SQUARE,), (SQUARE,), (WIDE,), (SQUARE,)]),
        ([SQUARE, SQUARE], ".vvvv.vvvv", [(SQUARE, SQUARE)]),
        ([SQUARE, SQUARE, WIDE], ".vv.vv.vvvv.vvv", [(SQUARE,), (SQUARE,), (WIDE,)]),  # not whole
        ([SQUARE, WIDE], "vvvv", [(SQUARE,), (WIDE,)]),  # not these
    ],
)
def test_which_crops_are_of_one_picture(crops: Any, prompt: str, pictures: Any) -> None:
    kinds = torch.tensor([[int(c == "v") for c in prompt]])
    assert side_by_side(crops, kinds) == pictures
    assert side_by_side(crops, None) == [(crop,) for crop in crops]


def test_pictures_of_two_rows_are_apart() -> None:
    kinds = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert side_by_side([SQUARE, SQUARE], kinds) == [(SQUARE,), (SQUARE,)]


@pytest.mark.parametrize("stage", [Inside(at=(0, 2)), InsideMerge(at=(1,))], ids=["dropped", "merged"])
@families
def test_a_row_of_a_batch_is_what_it_is_alone(family: str, stage: Any) -> None:
    model = tiny.make(family)
    rows = [*rows_for(family, "ragged"), [2, ("img", (300, 150)), 3]]
    batch = tiny.build(model, rows, seed=3)
    with vtoken.wrapped(model, [stage, {"fastervlm": {"keep": "60%"}}]):
        out, trace = run(model, batch), vtoken.trace(model)
        for row in sorted(set(trace.row)):
            single = run(model, alone(model, batch, row))
            assert torch.equal(out.sequences[row, -8:], single.sequences[0, -8:])
            mine = [k.tolist() for k, r in zip(trace.kept, trace.row, strict=True) if r == row]
            assert [k.tolist() for k in vtoken.trace(model).kept] == mine


@families
def test_what_does_not_fit_is_refused(family: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, [[2, "img", 3]], seed=3)
    with vtoken.wrapped(model, [{"uniform": {"keep": 2}}]):
        for name, given, message in (
            ("spatial_shapes", torch.tensor([[8, 10]]), "do not hold crops"),
            ("spatial_shapes", torch.tensor([[3, 16]]), "not whole numbers of 2 patches"),
            ("pixel_attention_mask", None, "pass what its processor returns"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**{**batch, name: given})
        model(**batch)
