"""Virtual unmerging on every family: wrapped generation equals the definition, whatever merged the tokens."""

from __future__ import annotations

import naive_unmerge
import oracle
import pytest
import tiny
import torch
from against_oracle import merge
from batches import inside, rows_for
from modes import LOGITS, attending, greedy
from probes import InsideMerge
from unmerging import MERGERS, Mingled, caches, compare, unmerging

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.session import watched


@attending
@pytest.mark.parametrize("rows", ["ragged", "video and image"])
@pytest.mark.parametrize("merger, cache", [*((m, "expanded") for m in MERGERS), ("mingled", "merged")])
def test_equals_the_definition(family, rows, merger, cache):
    if rows_for(family, rows) is None:
        pytest.skip("takes no video")
    model = tiny.make(family)
    stages = unmerging(merger, cache)
    stages = inside(family, stages)
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    if merger == "merged inside" and tiny.family(family).pooled_videos and "video" in rows:
        with vtoken.wrapped(model, stages), pytest.raises(UnsupportedError, match="interpolates"):
            greedy(model, batch)
        return
    trace = compare(model, batch, stages)
    assert sum(trace.tokens_out) < sum(trace.visual_tokens) and trace.layers[-1] == trace.tokens_out
    entry = trace.stages[-1]
    assert (entry.name, entry.site, entry.stood_aside) == ("vtu", "attention", None)
    assert entry.tokens_in == entry.tokens_out == trace.stages[-2].tokens_out


def test_interpolated_tokens_stand_for_themselves():
    """Where it cannot be told which token absorbed which, `into` names those that are left, and no dropped one."""
    model = tiny.make("llava_onevision")
    batch = tiny.build(model, [[2, "video", 3], [1, "video", 2, "img", 1]], seed=3)
    with vtoken.wrapped(model, [InsideMerge(at=(1,)), {"random": {"keep": "80%"}}]):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
    assert trace.stages[0].into is None and len(trace.kept[2])
    for into, kept in zip(trace.stages[-1].into, trace.kept, strict=True):
        assert set(into.tolist()) - {-1} == set(kept.tolist())


@attending
@caches
def test_eager(family, cache):
    model = tiny.make(family, "eager")
    compare(model, tiny.build(model, rows_for(family, "ragged"), seed=3), unmerging("mingled", cache))


@pytest.mark.parametrize("family", tiny.families(anyres=True))
@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_newline_policies(family, policy):
    model = tiny.make(family)
    compare(model, tiny.build(model, rows_for(family, "ragged"), seed=3), unmerging("mingled"), policy)


@attending
@pytest.mark.parametrize("merger", [[], [{"random": {"keep": 4}}], [{"pool": {"size": 1}}]], ids=str)
@caches
def test_without_merged_tokens_nothing_changes(family, merger, cache):
    """Bit for bit; the trace says so. Groups of one take the long way."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    with vtoken.wrapped(model, merger):
        want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [*merger, {"vtu": {"cache": cache}}]):
        got = greedy(model, batch, **LOGITS)
        entry = vtoken.trace(model).stages[-1]
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert (entry.stood_aside is None) == ("pool" in str(merger))


@attending
def test_one_layer_over_repeated_embeddings(family):
    """Where members are alike the text reads from one layer what it reads when the dense model is given each of them
    (behind a second layer members are no longer alike: that is what VTU gives up)."""
    model = tiny.make(family)
    model.get_decoder().layers = model.get_decoder().layers[:1]
    model.config.text_config.num_hidden_layers = model.get_decoder().config.num_hidden_layers = 1
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [{"pool": {"size": 2}}, {"vtu": {}}]):
        out, trace = greedy(model, batch, 1, **LOGITS), vtoken.trace(model)
    merge(p, trace)
    owner = naive_unmerge.owners(p, trace)
    rows = torch.arange(len(owner))[:, None]
    p.embeds, p.deep = p.embeds[rows, owner.clamp(min=0)], [d[rows, owner.clamp(min=0)] for d in p.deep]
    _, logits = oracle.generate(model, p, owner >= 0, 1)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=1e-5, rtol=1e-5)


@attending
def test_the_cache_holds_what_it_says(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, ("img", (1, 8, 12)) if tiny.family(family).mrope else "img", 5]], seed=3)
    slots = {}
    for name, stages in (
        ("dense", []),
        ("merged", MERGERS["mingled"]),
        ("vtu", unmerging("mingled")),
        ("vtu merged", unmerging("mingled", "merged")),
    ):
        with watched(model, {"stages": stages, "newline": "keep"}):
            out, trace = greedy(model, batch, 1, return_dict_in_generate=True), vtoken.trace(model)
        layer = out.past_key_values.layers[-1]
        slots[name] = layer.keys.shape[2]
        each = 2 * layer.keys.numel() * layer.keys.element_size()
        assert trace.cache_bytes == each * len(out.past_key_values.layers)
        if stages:
            gone = sum(int((into < 0).sum()) for into in trace.stages[-1].into)
            merged = sum(trace.visual_tokens) - gone - sum(trace.tokens_out)
    assert slots["vtu merged"] == slots["merged"] == slots["dense"] - gone - merged
    assert slots["vtu"] == slots["dense"] - gone and merged > 0 and gone > 0


@attending
@pytest.mark.parametrize(
    "merger", [[{"visionzip": {"keep": 6}}], [{"prumerge": {"keep": 5}}], [Mingled(), {"pool": {"size": 2}}]], ids=str
)
def test_weighted_means_and_chains(family, merger):
    model = tiny.make(family)
    trace = compare(model, tiny.build(model, rows_for(family, "ragged"), seed=3), [*merger, "vtu"], given=True)
    into = trace.stages[-1].into
    assert any(int((i >= 0).sum()) > len(kept) for i, kept in zip(into, trace.kept, strict=True))


def test_what_does_not_go_together_is_refused():
    model = tiny.make("llava")
    pool = {"pool": {"size": 2}}
    for pipeline, message in (
        ({"positions": "compact", "stages": [pool, "vtu"]}, "positions: original"),
        ([pool, {"fastv": {"keep": 3}}, "vtu"], r"fastv \(site decoder\)"),
        ([pool, "vtu", "vtu"], r"vtu \(site attention\)"),
        (["vtu", pool], "order the stages by site"),
    ):
        with pytest.raises((UnsupportedError, ValueError), match=message):
            vtoken.wrap(model, pipeline)
    vtoken.wrap(model, [pool, "vtu"])


def test_attention_that_rotates_differently_is_refused():
    model = tiny.llava(text="phi3", pad_token_id=0)
    with pytest.raises(UnsupportedError, match=r"Phi3Attention.*leave the stage out"):
        vtoken.wrap(model, [{"pool": {"size": 2}}, "vtu"])
    vtoken.unwrap(vtoken.wrap(model, [{"pool": {"size": 2}}]))


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "olmo2", "mistral"])
@caches
def test_other_decoders(text, cache):
    """Biases, norms per head, and norms over all heads before the rotation."""
    options = {"sliding_window": None} if text in ("mistral", "qwen2") else {}
    model = tiny.llava(text=text, **options)
    batch = tiny.build(model, rows_for("llava", "ragged"), seed=3)
    if text != "olmo2":
        compare(model, batch, unmerging("mingled", cache))
        return
    # Its layers are not put together as the definition's are; its attention is compared with the other cache.
    outs = []
    for each in ("expanded", cache):
        with vtoken.wrapped(model, unmerging("mingled", each)):
            outs.append(torch.stack(greedy(model, batch, **LOGITS).logits))
    torch.testing.assert_close(outs[0], outs[1])
