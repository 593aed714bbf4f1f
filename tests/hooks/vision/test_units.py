"""Padded towers behind which squares of patches are joined to a token: whole units leave, what is left is the model's
own."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import rows_for
from modes import alone
from plain_runs import run
from probes import Inside, InsideMerge, InsideOne, Recorder

import vtoken
from vtoken.hooks.vision.unit_tower import members

UNITS = [name for name in tiny.families(varlen=False, crops_sized=False) if tiny.family(name).unit > 1]
families = pytest.mark.parametrize("family", UNITS)


def rows(family):
    """Pictures of one crop."""
    one = ("img", (0, 0)) if tiny.family(family).split else "img"
    return [[one, 3], [1, one, 2, one, 7], [4]]


def test_members_are_squares() -> None:
    assert members(16, 4, torch.device("cpu")).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    assert members(36, 9, torch.device("cpu"))[1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]


class Plain:
    """The stock tower of a model, its layers one by one on one crop; rows of zeros stand for what was cut."""

    def __init__(self, model) -> None:
        self.model, self.adapter = model, tiny.adapter(model)
        self.cls, self.entering = int(self.adapter.encoder.cls), []

    @torch.no_grad()
    def __call__(self, pixels, cuts):
        """Features [units, D] of the pixels of a crop; cuts: layer -> (kept, into) units, `into` None drops, else means
        of equal weight."""
        e, place, cls = self.adapter.encoder, members(self.adapter.patches, self.adapter.encoder.unit, "cpu"), self.cls
        left = torch.arange(len(place))
        handles = []

        def before(module, args, layer):
            nonlocal left
            h = args[0]
            if layer - 1 in cuts:
                kept, into = cuts[layer - 1]
                groups = torch.zeros(len(place), e.unit, h.shape[-1])
                if h.shape[1] == cls + self.adapter.patches:
                    groups[:] = h[0, cls:][place]
                else:
                    groups[left] = h[0, cls:].unflatten(0, (-1, e.unit))
                if into is not None:
                    groups = torch.stack(
                        [groups[left][into[left] == k].mean(0) if k in kept else groups[k] for k in range(len(place))]
                    )
                left = kept
                h = torch.cat([h[:, :cls], groups[kept].flatten(0, 1)[None]], 1)
            self.entering.append(h.shape[1])
            return (h, *args[1:])

        def behind(module, args, kwargs, out):
            h = out.last_hidden_state
            if cuts:
                whole = torch.zeros(1, self.adapter.patches, h.shape[-1])
                whole[0, place[left].flatten()] = h[0, cls:]
                out.last_hidden_state = torch.cat([h[:, :cls], whole], 1)
            return out

        for layer, module in enumerate(e.layers):
            handles.append(module.register_forward_pre_hook(lambda m, a, k=layer: before(m, a, k)))
        handles.append(self.adapter.tower.register_forward_hook(behind, with_kwargs=True))
        out = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        for handle in handles:
            handle.remove()
        return (out if torch.is_tensor(out) else torch.cat(list(out))).flatten(0, -2)


STAGES = {
    "one layer": [Inside(at=(0,))],
    "two layers": [Inside(at=(0, 2))],
    "equal counts": [Inside(at=(1,), uniform=True)],
    "first crop only": [InsideOne(at=(1,))],
    "merged": [InsideMerge(at=(0, 1))],
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", STAGES)
@families
def test_equals_a_tower_by_hand(family: str, name: str, attn: str) -> None:
    """Units leave; the later layers run on fewer patches, and crops that keep different counts do not see padding."""
    model, stock = tiny.make(family, attn), Plain(tiny.make(family, attn))
    batch = tiny.build(model, rows(family), seed=3)
    widths, seen = [], []
    with vtoken.wrapped(model, [*STAGES[name], Recorder(asks=(), seen=seen)]):
        hook = tiny.adapter(model).encoder.layers[3].register_forward_hook(lambda m, a, o: widths.append(o.shape[1]))
        with torch.no_grad():
            model(**batch)
        hook.remove()
        trace = vtoken.trace(model)
    inside = [stage for stage in trace.stages if stage.site == "encoder"]
    cls, unit = stock.cls, tiny.family(family).unit
    assert widths == [cls + unit * max(inside[-1].tokens_out)] and sum(trace.tokens_out) < sum(trace.visual_tokens)
    left = seen[0].x.split(trace.tokens_out)
    for crop, (pixels, got) in enumerate(zip(batch["pixel_values"].flatten(0, -4), left, strict=True)):
        cuts = {s.layer: (s.kept[crop], None if s.into is None else s.into[crop]) for s in inside}
        want = stock(pixels[(None,) * (batch["pixel_values"].ndim - 3)], cuts)[inside[-1].kept[crop]]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        assert len(want) == inside[-1].tokens_out[crop]


@families
def test_facts_are_means_over_units(family: str) -> None:
    model, eager = tiny.make(family), tiny.make(family, "eager")
    batch = tiny.build(model, rows(family), seed=3)
    adapter, pixels = tiny.adapter(eager), batch["pixel_values"].flatten(0, -4)
    place, cls, e = members(adapter.patches, adapter.encoder.unit, "cpu"), int(adapter.encoder.cls), adapter.encoder
    maps, taps = [], []
    for layer in e.layers:
        attention = getattr(layer, e.attention)
        attention.register_forward_hook(lambda m, a, out: maps.append(out[1].detach()))
        getattr(attention, e.taps["k"]).register_forward_hook(lambda m, a, out: taps.append(out.detach()))
    projected = []
    adapter.projectors[0].register_forward_pre_hook(lambda m, args: projected.append(args[0].detach()))
    eager.get_image_features(batch["pixel_values"], return_dict=True)

    def units(x):
        """[crops, patches, ...] -> [ΣN, ...]."""
        return x[:, place].mean(2).flatten(0, 1)

    asks = [("received_attention", 1), ("keys", 0), ("features", None), ("pixels", None)]
    asks += [("cls_attention", None), ("cls_attention", 1)] if cls else []
    seen: list = []
    with vtoken.wrapped(model, [Recorder(asks=tuple(asks), seen=seen)]), torch.no_grad():
        model(**batch)
    (tokens,) = seen
    near = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(tokens.fact("received_attention", 1), units(maps[1].mean(1).mean(1)[:, cls:]), **near)
    if cls:
        for layer, index in ((None, e.attention_layer), (1, 1)):
            want = units(maps[index].mean(1)[:, 0, 1:])
            torch.testing.assert_close(tokens.fact("cls_attention", layer), want, **near)
    torch.testing.assert_close(tokens.fact("keys", 0), units(taps[0][:, cls:]), **near)
    (given,) = projected
    joined = given.shape[1] != adapter.patches
    want = given.unflatten(-1, (e.unit, -1)).mean(2).flatten(0, 1) if joined else units(given)
    torch.testing.assert_close(tokens.fact("features"), want, **near)
    size = pixels.shape[-1] // int(adapter.patches**0.5)
    patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    torch.testing.assert_close(tokens.fact("pixels"), patches[:, place].flatten(2).flatten(0, 1), **near)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "first crop only"])  # it looks at its neighbours
@families
def test_a_row_of_a_batch_is_what_it_is_alone(family: str, name: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    with vtoken.wrapped(model, [*STAGES[name], {"fastervlm": {"keep": "60%"}}]):
        out, trace = run(model, batch), vtoken.trace(model)
        for row in sorted(set(trace.row)):
            single = run(model, alone(model, batch, row))
            assert torch.equal(out.sequences[row, -8:], single.sequences[0, -8:])
            mine = [k.tolist() for k, r in zip(trace.kept, trace.row, strict=True) if r == row]
            assert [k.tolist() for k in vtoken.trace(model).kept] == mine


@families
def test_the_projector_sees_what_is_left(family: str) -> None:
    """Where it is given units: those that were dropped are not computed."""
    model = tiny.make(family)
    batch, adapter = tiny.build(model, rows(family), seed=3), tiny.adapter(model)
    entering: list = []
    with vtoken.wrapped(model, [Inside(at=(0,))]):
        hook = adapter.projectors[0].register_forward_pre_hook(lambda m, args: entering.append(args[0].shape))
        model(**batch)
        hook.remove()
        left = sum(vtoken.trace(model).tokens_out)
    ((many, each, _),) = entering
    assert many * each == left or each == adapter.patches


@families
def test_facts_are_zero_where_units_left_before(family: str) -> None:
    model, seen = tiny.make(family), []
    batch = tiny.build(model, rows(family), seed=3)
    with vtoken.wrapped(model, [Inside(at=(0,)), Recorder(asks=(("keys", 3), ("features", None)), seen=seen)]):
        model(**batch)
        (stage, _) = vtoken.trace(model).stages
    (tokens,) = seen
    assert len(tokens.fact("keys", 3)) == sum(stage.tokens_out) < sum(stage.tokens_in)
    assert (tokens.fact("keys", 3).abs().sum(1) > 0).all() and (tokens.fact("features").abs().sum(1) > 0).all()
