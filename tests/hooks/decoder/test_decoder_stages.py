"""Stages inside the LLM on every family: equal to recomputation over the kept tokens, alone, in chains and in all
modes."""

from __future__ import annotations

import flash_stand_in
import gates
import oracle
import pytest
import tiny
import torch
from against_oracle import compare
from batches import rows_for
from modes import alone, attending, greedy
from probes import Inside
from usual import runs
from watchers import ATTENTION, Watcher

import vtoken
from vtoken.errors import UnsupportedError

STAGES = {
    "fastv": [{"fastv": {"keep": 5}}],
    "pyramiddrop": [{"pyramiddrop": {}}],
    "sparsevlm": [{"sparsevlm": {"keep": 8, "layer": 1}}, {"sparsevlm": {"keep": 4}}],
    "dart": [{"dart": {"keep": 6, "image_pivots": 1, "text_pivots": 2}}],
    "vtw": [{"vtw": {}}],
    "dyvte": [{"dyvte": {"gates": gates.file(seed=18)}}],
    "todre_exit": [{"todre_exit": {"threshold": 0.8, "at": (2, 3)}}],
    "attention_exit": [{"attention_exit": {"threshold": 0.65, "first": 1, "window": 2, "sinks": 10}}],
    "flowcut_late": [{"flowcut_late": {"keep": {"total": 6}}}],
    "vflowopt_late": [{"vflowopt_late": {"keep": "60%", "layer": 1}}, {"vflowopt_late": {"keep": "50%", "layer": 3}}],
    "fitprune": [{"fitprune": {"table": (5, 2, 4), "tokens": 16}}],
    "cmai": [{"cmai": {"keep": 5}}],
    "dpn": [{"dpn": {"at": (1, 3), "sizes": (2, 2), "least": 4}}],
}
CASES = [(family, stages) for family in tiny.FAMILIES for stages in STAGES if runs(family, STAGES[stages])]
cases = pytest.mark.parametrize(("family", "stages"), CASES)


@cases
@pytest.mark.parametrize("batch", ["one", "ragged", "video and image"])
def test_equals_recomputation(family, stages, batch):
    if rows_for(family, batch) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    trace = compare(model, tiny.build(model, rows_for(family, batch), seed=3), {"stages": STAGES[stages]})
    assert trace.layers[0] == trace.visual_tokens and sum(trace.layers[-1]) < sum(trace.visual_tokens)
    for stage in trace.stages:
        assert trace.layers[stage.layer] == stage.tokens_out and trace.layers[stage.layer - 1] == stage.tokens_in


@pytest.mark.parametrize(("family", "stages"), [case for case in CASES if case[0] in tiny.families(mrope=False)])
def test_compact_and_eager(family, stages):
    model = tiny.make(family, "eager")
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    compare(model, batch, {"positions": "compact", "stages": STAGES[stages]})


@cases
def test_modes_agree(family, stages):
    """Static caches, drafts and single rows give what plain generation of the batch gives."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    with vtoken.wrapped(model, STAGES[stages]):
        plain = greedy(model, batch)
        kept = vtoken.trace(model).kept
        assert torch.equal(greedy(model, batch, cache_implementation="static"), plain)
        one = alone(model, batch, 0)
        assert torch.equal(greedy(model, one)[0, -6:], plain[0, -6:])
        assert torch.equal(vtoken.trace(model).kept[0], kept[0])
        if model._is_stateful:
            return  # transformers takes no drafts there
        one.pop("attention_mask")
        assert torch.equal(greedy(model, one, prompt_lookup_num_tokens=3)[0, -6:], plain[0, -6:])
        assert torch.equal(vtoken.trace(model).kept[0], kept[0])


CHAIN = [
    Inside(at=(1,)),
    {"random": {"keep": "80%"}},
    {"sparsevlm": {"keep": 12, "layer": 1}},
    {"fastv": {"keep": "75%"}},
    {"dart": {"keep": 6, "image_pivots": 2, "text_pivots": 1}},
    {"pyramiddrop": {"at": (3,), "keep": 2}},
]


@attending
@pytest.mark.parametrize("last", ["pyramiddrop", "vtw"])
@pytest.mark.parametrize("batch", ["ragged", "video and image"])
def test_a_chain_through_all_sites(family, batch, last):
    """Encoder, tokens, and four or five stages inside the decoder, two at one layer: equal to recomputation, and the
    trace adds up."""
    if rows_for(family, batch) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    chain = [*CHAIN, {"vtw": {"layer": 3}}] if last == "vtw" else CHAIN
    trace = compare(model, tiny.build(model, rows_for(family, batch), seed=3), {"stages": chain})
    assert [(s.site, s.layer) for s in trace.stages[2:]] == [("decoder", k) for k in (1, 2, 2, 3, 3)[: len(chain) - 2]]
    assert trace.stages[0].tokens_in == trace.visual_tokens and trace.stages[-1].tokens_out == trace.tokens_out
    for before, after in zip(trace.stages, trace.stages[1:], strict=False):
        assert after.tokens_in == before.tokens_out
        for one, more in zip(after.kept, before.kept, strict=True):
            assert set(one.tolist()) <= set(more.tolist())
    by_layer = {s.layer: s.tokens_out for s in trace.stages}
    assert trace.layers == [trace.stages[1].tokens_out, *(by_layer[k] for k in (1, 2, 3))]
    assert trace.average_tokens == sum(map(sum, trace.layers)) / 4
    assert last == "pyramiddrop" or not sum(trace.layers[3])


@attending
def test_recycled_tokens_equal_recomputation(family):
    """The oracle's hidden states of the centres are replaced by the means that the trace tells of, before layer 3."""
    model, new = tiny.make(family), 4
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [{"sparsevlm": {"keep": 5, "recycle": True}}]):
        out = greedy(model, batch, new, return_dict_in_generate=True, output_logits=True)
        (stage,) = vtoken.trace(model).stages
    calls = 0

    def merge(module, args, hidden):
        nonlocal calls
        row, calls = calls // new, calls + 1
        rank = p.mask[row].cumsum(0) - 1
        merged = hidden.clone()
        for image, kept, into in zip(p.images, stage.kept, stage.into, strict=True):
            at = rank[image.columns[~p.newline[image.row, image.columns]]]
            for k in kept.tolist() if image.row == row else ():
                merged[0, at[k]] = hidden[0, at[into == k]].mean(0)
        return merged

    assert any(int((into >= 0).sum()) > len(kept) for into, kept in zip(stage.into, stage.kept, strict=True))
    hook = model.get_decoder().layers[2].register_forward_hook(merge)
    tokens, logits = oracle.generate(model, p, p.mask, new, layer_keep={3: oracle.keep_mask(p, stage.kept)})
    hook.remove()
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=3e-4, rtol=1e-4)
    assert torch.equal(out.sequences[:, -new:], tokens)


@attending
def test_beams_decide_alike(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    stages = [STAGES["sparsevlm"][0], {"pyramiddrop": {"at": (2,)}}, {"dart": {"keep": 2, "layer": 3}}]
    with vtoken.wrapped(model, stages):
        greedy(model, batch)
        single = vtoken.trace(model).kept
        greedy(model, batch, num_beams=3)
        assert [k.tolist() for k in vtoken.trace(model).kept] == [single[0].tolist()] * 3


def test_gradients_flow_through_what_is_kept():
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMG, -100)
    labels[:, :-2] = -100
    with vtoken.wrapped(
        model, [STAGES["sparsevlm"][0], {"pyramiddrop": {"at": (2,)}}, {"dart": {"keep": 2, "layer": 3}}]
    ):
        model(**batch, labels=labels).loss.backward()
    assert all(layer.self_attn.k_proj.weight.grad.abs().sum() > 0 for layer in model.get_decoder().layers)


def test_what_cannot_be_foretold_is_refused():
    """OLMo 2 norms queries of all heads together and has no norm in front of its attention."""
    model = tiny.llava(text="olmo2")
    with pytest.raises(UnsupportedError, match=r"next_query_attention.*last_query_attention"):
        vtoken.wrap(model, [{"pyramiddrop": {"at": (2,)}}])
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    with vtoken.wrapped(model, [{"fastv": {"keep": 3}}]):
        greedy(model, batch)
        assert vtoken.trace(model).tokens_out == [3]


def test_layers_and_facts_are_checked():
    model = tiny.make("llava")
    for stages, message in (
        ([{"vtw": {"layer": 4}}], "1 to 3"),
        ([{"pyramiddrop": {"at": (2, 9)}}], "1 to 3"),
        ([{"fastv": {"keep": "0%"}}], "above 0%"),
        ([Watcher(asks=("features",))], "features"),
    ):
        with pytest.raises((UnsupportedError, ValueError), match=message):
            vtoken.wrap(model, stages)
    vtoken.wrap(model, "none")


@cases
def test_backends_of_the_flash_kind(family, stages):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    if tiny.family(family).both_ways:  # which flash attention cannot have, in the stock model either
        del batch[tiny.family(family).types]
    options = {"return_dict_in_generate": True, "output_logits": True}
    with vtoken.wrapped(model, STAGES[stages]):
        want = greedy(model, batch, **options)
    model.get_decoder().config._attn_implementation_internal = flash_stand_in.NAME
    with vtoken.wrapped(model, STAGES[stages]):
        got = greedy(model, batch, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)


@attending
def test_bfloat16(family):
    model = tiny.make(family).to(torch.bfloat16)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    batch |= {k: v.bfloat16() for k, v in batch.items() if k.startswith("pixel_values")}
    watcher = Watcher(at=(2,), seen={})
    stages = [STAGES["sparsevlm"][0], watcher, {"dart": {"keep": 6}}, {"pyramiddrop": {"at": (3,)}}]
    with vtoken.wrapped(model, stages), torch.inference_mode():
        greedy(model, batch, 2)
        counts = vtoken.trace(model).stages
    assert [c.name for c in counts][::2] == ["sparsevlm", "dart"] and max(counts[-1].tokens_out) == 3
    assert all(watcher.seen[2].fact(name).dtype == torch.float32 for name in ATTENTION)
