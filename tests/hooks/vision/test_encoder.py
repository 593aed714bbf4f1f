"""Encoder-site stages and facts: later layers run on fewer tokens, results do not depend on the batch, facts are
exact."""

from __future__ import annotations

from typing import ClassVar

import oracle
import pytest
import tiny
import torch
from plain_runs import BATCHES, NEW, run
from probes import Deep, Inside, InsideOne, Ragged, Recorder

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.stages import Keep, Site


@torch.no_grad()
def encode(model, pixels, drops):
    """One image [1, 3, H, W] through the tower, dropping patches by hand; returns its features and their places."""
    tower = model.model.vision_tower
    clip = model.config.vision_config.model_type == "clip_vision_model"
    nested = getattr(tower, "vision_model", tower)
    h = nested.embeddings(pixels)
    h = nested.pre_layrnorm(h) if clip else h
    place, cls = torch.arange(tiny.TOKENS), int(clip)
    layers = nested.encoder.layers
    for index, layer in enumerate(layers[: len(layers) - cls]):
        h = layer(h, None)
        if index in drops:
            stay = torch.isin(place, drops[index])
            h, place = torch.cat([h[:, :cls], h[:, cls:][:, stay]], 1), place[stay]
    # LLaVA on SigLIP takes hidden_states[-1], which is the last layer's output before the final norm on some versions.
    return model.model.multi_modal_projector(h[:, cls:])[0], place


STAGES = {
    "one layer": [Inside(at=(0,))],
    "two layers": [Inside(at=(0, 1))],
    "equal counts": [Inside(at=(1,), uniform=True)],
    "first image only": [InsideOne(at=(1,))],
    "chain": [Inside(at=(0,)), Ragged(), Deep()],
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["one", "ragged"])
@pytest.mark.parametrize("stages", STAGES)
def test_equals_a_manual_tower(stages, rows, attn):
    model = tiny.llava(attn)
    batch = tiny.build(model, BATCHES[rows], seed=3)
    p = oracle.prompt(model, batch)
    widths = []
    with vtoken.wrapped(model, STAGES[stages]):
        last = model.model.vision_tower.encoder.layers[2]
        hook = last.register_forward_hook(lambda m, a, o: widths.append(o.shape[1]))
        out, trace = run(model, batch), vtoken.trace(model)
        hook.remove()
    inside = [s for s in trace.stages if s.site == "encoder"]
    line, column = p.visual.nonzero(as_tuple=True)
    for i in range(len(trace.visual_tokens)):
        features, place = encode(model, batch["pixel_values"][i : i + 1], {s.layer: s.kept[i] for s in inside})
        assert torch.equal(place, inside[-1].kept[i])
        at = i * tiny.TOKENS + place
        p.embeds[line[at], column[at]] = features
    entry = [s for s in trace.stages if s.site != "decoder"][-1]
    inner = {s.layer: oracle.keep_mask(p, s.kept, tiny.TOKENS) for s in trace.stages if s.site == "decoder"}
    tokens, logits = oracle.generate(model, p, oracle.keep_mask(p, entry.kept, tiny.TOKENS), NEW, False, inner)
    assert torch.equal(out.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=2e-4, rtol=1e-4)
    assert widths[0] == 1 + max(inside[-1].tokens_out)
    assert sum(inside[-1].tokens_out) < sum(trace.visual_tokens)
    for before, after in zip(trace.stages, trace.stages[1:], strict=False):
        assert after.tokens_in == before.tokens_out


def test_siglip():
    model = tiny.llava(tower="siglip")
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    with vtoken.wrapped(model, [Inside(at=(0, 2))]):
        together, kept = run(model, batch), vtoken.trace(model).kept
        for i in range(3):
            alone = tiny.build(model, [["img", 2]], seed=3)
            alone["pixel_values"] = batch["pixel_values"][i : i + 1]
            run(model, alone)
            assert torch.equal(vtoken.trace(model).kept[0], kept[i])
    assert together.sequences.shape[0] == 3


def test_beams_take_the_same_road():
    model = tiny.llava()
    batch = tiny.build(model, BATCHES["padded"], seed=3)
    with vtoken.wrapped(model, [Inside(at=(0,)), {"fastervlm": {"keep": 3}}]):
        run(model, batch)
        kept = vtoken.trace(model).kept
        model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=2)
        assert [k.tolist() for k in vtoken.trace(model).kept] == [k.tolist() for k in kept for _ in range(2)]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_attention_facts_equal_full_attention(tower):
    """Against the whole eager attention map, for an explicit layer and for the layer the features come from."""
    model = tiny.llava(tower=tower)
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    eager = tiny.llava("eager", tower=tower)
    maps = eager.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions
    cls = int(tower == "clip")
    asks = [
        ("received_attention", None),
        ("received_attention", 1),
        ("keys", 0),
        ("values", -1),
        ("features", None),
        ("text", None),
    ]
    asks += [("cls_attention", None), ("cls_attention", 1)] if cls else []
    seen: list = []
    with vtoken.wrapped(model, [Recorder(asks=tuple(asks), seen=seen)]):
        with torch.no_grad():
            model(**batch)
    (tokens,) = seen
    default = 2 if cls else 3
    for layer, index in ((None, default), (1, 1)):
        full = maps[index].mean(1)
        torch.testing.assert_close(
            tokens.fact("received_attention", layer), full.mean(1)[:, cls:].flatten(), atol=1e-6, rtol=1e-4
        )
        if cls:
            torch.testing.assert_close(
                tokens.fact("cls_attention", layer), full[:, 0, 1:].flatten(), atol=1e-6, rtol=1e-4
            )
    projected = model.model.multi_modal_projector(tokens.fact("features"))
    torch.testing.assert_close(projected, tokens.x, atol=1e-5, rtol=1e-4)
    assert tokens.fact("keys", 0).shape == (48, 32) and tokens.fact("values", -1).shape == (48, 32)
    real = batch["attention_mask"].bool() & (batch["input_ids"] != tiny.IMG)
    assert [len(t) for t in tokens.fact("text")] == real.sum(1).tolist()


def test_no_fact_without_a_stage_that_asks():
    model = tiny.llava()
    with vtoken.wrapped(model, "random:4"):
        tower = [m for m in model.model.vision_tower.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not tower


@pytest.mark.parametrize(
    "stage, message",
    [
        (Inside(at=(2,)), "encoder layers"),
        (Inside(at=()), "encoder layers"),
        (Deep(at=(0,)), "decoder layers"),
        (Deep(at=(9,)), "decoder layers"),
        (Inside(fact="text"), "does not exist yet"),
        (Recorder(asks=(("last_query_attention", None),)), "does not exist yet"),
        (Recorder(asks=(("colour", None),)), "unknown fact"),
    ],
)
def test_what_a_stage_may_ask(stage, message):
    model = tiny.llava()
    with pytest.raises(UnsupportedError, match=message):
        vtoken.wrap(model, [stage])
    vtoken.unwrap(vtoken.wrap(model, "none"))


def test_missing_fact_is_replaced_by_the_documented_one():
    model = tiny.llava(tower="siglip")
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    with vtoken.wrapped(model, "fastervlm:4"):
        run(model, batch)
        trace = vtoken.trace(model)
    assert trace.stages[0].substitutes == {"cls_attention": "received_attention"}

    class ByAttention(Inside):
        site: ClassVar[Site] = "tokens"

        def layers(self, depth):
            return ()

        def select(self, tokens):
            score = tokens.fact("received_attention")
            best = [s.topk(4).indices.sort().values for s in score.split(tokens.lengths)]
            return Keep(torch.cat([b + 16 * i for i, b in enumerate(best)]), (4,) * len(best))

    with vtoken.wrapped(model, [ByAttention()]):
        run(model, batch)
        for a, b in zip(vtoken.trace(model).kept, trace.kept, strict=True):
            assert torch.equal(a, b)
