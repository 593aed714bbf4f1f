"""Stages that shrink the KV cache: every family, ragged batches, all ways of generating, against a dense model that
masks what was evicted."""

from __future__ import annotations

import flash_stand_in
import oracle
import oracle_kv
import pytest
import tiny
import torch
from batches import inside, rows_for
from model_state import changed, state
from modes import LOGITS, alone, attending, greedy, mrope, whole
from oracle_kv import Told
from probes import Deep, Inside, Ragged
from turns import conversation, second

import vtoken
from vtoken.compressors.cache.lookm import LookM
from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.compressors.cache.zipvl_cache import ZipVLCache
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.stages.cache import KeepSlots, ReplacedKV

STAGES = {
    "snapkv": (SnapKV, {"keep": 5, "window": 4}),
    "snapkv share": (SnapKV, {"keep": "30%", "kernel": 3, "pooling": "max"}),
    "snapkv all": (SnapKV, {"keep": 9, "window": 4, "text": True}),
    "lookm": (LookM, {"merge": "none", "important": "40%"}),
    "lookm keep": (LookM, {"merge": "none", "keep": 4}),
    "zipvl": (ZipVLCache, {"tau": 0.9, "recent": 2, "drawn": 4}),
    "lookm strict": (LookM, {"merge": "none", "text": True}),
}


class Pyramid(SnapKV):
    """Holds fewer tokens in deeper layers."""

    def compress(self, layer):
        return SnapKV(keep=8 - 2 * layer.layer, window=4).compress(layer)


STAGES["pyramid"] = (Pyramid, {"keep": 8})
ROWS = [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
stages = pytest.mark.parametrize("name", [name for name in STAGES if name != "pyramid"])


def recorded(name):
    cls, options = STAGES[name]
    return Told(cls, **options)


def check(model, batch, name, before=(), n=6, tolerance=3e-4):
    """Generates, and holds logits of every row against the oracle; returns output, trace and what was told."""
    p, spy = oracle.prompt(model, batch), recorded(name)
    with vtoken.wrapped(model, [*before, spy.stage]):
        out, trace = greedy(model, batch, n, **LOGITS), vtoken.trace(model)
    entry = [s for s in trace.stages if s.site in ("encoder", "tokens")]
    keep = oracle.keep_mask(p, entry[-1].kept) if entry else p.mask
    inner = {s.layer: oracle.keep_mask(p, s.kept) for s in trace.stages if s.site == "decoder"}
    images, got = sorted(set(trace.row)), torch.stack(out.logits)
    for row in range(len(keep)):
        lost = spy.lost(images.index(row)) if row in images else {}
        want = oracle_kv.forced(model, p, row, out.sequences[row, -n:].tolist(), lost, keep, inner)
        torch.testing.assert_close(got[:, row], want, atol=tolerance, rtol=1e-4)
    return out, trace, spy


@whole
@stages
@pytest.mark.parametrize("rows", ["one", "ragged", "video and image"])
def test_equals_a_dense_model_that_masks(family, name, rows):
    if rows_for(family, rows) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    out, trace, spy = check(model, tiny.build(model, rows_for(family, rows), seed=3), name)
    assert trace.layers == [trace.visual_tokens] * 4 and trace.tokens_out == trace.visual_tokens
    mine = [s for s in trace.stages if s.site == "cache"]
    assert tuple(s.layer for s in mine) == tiny.family(family).attending
    assert all(sum(left) < sum(trace.prompt_tokens) for left in trace.cached)
    cache = out.past_key_values
    for left, stage in zip(trace.cached, mine, strict=True):
        assert cache.layers[stage.layer].keys.shape[2] == max(left) + 5
        assert all(held_by <= n for held_by, n in zip(stage.tokens_out, stage.tokens_in, strict=True))
        if not spy.stage.text:
            gone = sum(stage.tokens_in) - sum(stage.tokens_out)
            assert sum(trace.prompt_tokens) - sum(left) == pytest.approx(gone, abs=len(trace.row))
    keys = cache.layers[-1].keys
    assert trace.cache_bytes == sum(max(h) for h in trace.cached) * 2 * keys.element_size() * keys[:, :, 0].numel()


@pytest.mark.parametrize("family", tiny.families(varlen=True, by_rows=False))
def test_rows_without_padding_may_be_left_with_different_numbers(family):
    """Two prompts of one length, so that `generate` sees no padding and drops its mask; the shrunk rows are padded all
    the same."""
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5], [3, ("img", (1, 4, 4)), 5 + 4]], seed=3)
    assert bool(batch["attention_mask"].all())
    _, trace, _ = check(model, batch, "snapkv share")
    assert trace.cached[0][0] != trace.cached[0][1]


@whole
@pytest.mark.parametrize("name", ["snapkv", "lookm"])
def test_after_stages_of_every_site(family, name):
    model = tiny.make(family)
    before = [Inside(at=(1,)), {"random": {"keep": "80%"}}, {"fastv": {"keep": "70%"}}, Deep(at=(3,), factor=0.6)]
    before = inside(family, before)
    p_before = before[1:]  # what the encoder drops is other embeddings; test_families holds that
    _, trace, _ = check(model, tiny.build(model, rows_for(family, "ragged"), seed=3), name, p_before)
    assert [s.site for s in trace.stages] == ["tokens", "decoder", "decoder"] + ["cache"] * len(trace.cached)
    for stage in trace.stages[3:]:
        assert stage.tokens_in == trace.layers[stage.layer]
        seen = trace.stages[(0, 0, 1, 2)[stage.layer]].kept
        assert all(set(k.tolist()) <= set(s.tolist()) for k, s in zip(stage.kept, seen, strict=True))
    with vtoken.wrapped(model, [*before, recorded(name).stage]):
        greedy(model, tiny.build(model, rows_for(family, "ragged"), seed=3))


@whole
@stages
def test_batch_equals_single(family, name):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [recorded(name).stage]):
        together, trace = greedy(model, batch), vtoken.trace(model)
        for row in range(3):
            assert torch.equal(greedy(model, alone(model, batch, row))[0, -6:], together[row, -6:])
            single = vtoken.trace(model)
            for i, k in enumerate(tiny.family(family).attending if row < 2 else ()):
                assert single.cached[i] == [trace.cached[i][row]]
                mine = [i for i, r in enumerate(trace.row) if r == row]
                kept = [next(s for s in t.stages if s.layer == k).kept for t in (trace, single)]
                assert [kept[0][i].tolist() for i in mine] == [i.tolist() for i in kept[1]]


@attending
@stages
def test_drafts_change_nothing(family, name):
    """Drafts that are verified in the prefill read the shrunk cache, too."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    with vtoken.wrapped(model, [recorded(name).stage]):
        plain, cached = greedy(model, batch, 8), vtoken.trace(model).cached
        assert torch.equal(greedy(model, batch, 8, prompt_lookup_num_tokens=3), plain)
        assert vtoken.trace(model).cached == cached
        assert torch.equal(greedy(model, batch, 8, assistant_model=tiny.make(family)), plain)


@whole
@pytest.mark.parametrize("name", ["snapkv", "lookm"])
def test_an_answer_that_is_scored_reads_the_shrunk_cache(family, name):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    with vtoken.wrapped(model, [recorded(name).stage]), torch.no_grad():
        out = greedy(model, batch, 5, **LOGITS)
        whole = {**batch, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 5))
        scored = model(**whole, logits_to_keep=6).logits[0, :5]
    torch.testing.assert_close(scored, torch.stack(out.logits)[:, 0], atol=2e-4, rtol=1e-4)


@whole
@stages
def test_beams(family, name):
    model = tiny.make(family)
    batch, n = tiny.build(model, [[3, "img", 5]], seed=3), 4
    p, spy = oracle.prompt(model, batch), recorded(name)
    with vtoken.wrapped(model, [spy.stage]):
        out = greedy(
            model,
            batch,
            n,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    for sequence, found in zip(out.sequences, out.sequences_scores, strict=True):
        want = oracle_kv.forced(model, p, 0, sequence[-n:].tolist(), spy.lost(0)).log_softmax(-1)
        torch.testing.assert_close(found, want.gather(1, sequence[-n:, None]).sum(), atol=1e-3, rtol=1e-3)


@whole
@pytest.mark.parametrize("name", ["snapkv", "snapkv all", "lookm"])
@pytest.mark.parametrize("more", [[[5], [5]], [[3, "img", 2], [3, "img", 2]]], ids=["text", "image"])
def test_second_turn(family, name, more):
    """A text turn reads the shrunk cache; a turn with an image shrinks what it adds, and nothing else."""
    model = tiny.make(family)
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, more, seed=9)
    if tiny.family(family).pixels in turn and mrope(model):
        pytest.importorskip("transformers", minversion="5.21", reason="older transformers numbers a new image as text")
    spy, n = recorded(name), 4
    with vtoken.wrapped(model, [spy.stage]):
        a = greedy(model, first, n, **LOGITS)
        lost, cached = [spy.lost(row) for row in range(2)], vtoken.trace(model).cached
        spy.calls.clear()
        whole, _ = conversation(model, first, turn, a.sequences)
        b = greedy(model, second(model, whole, turn), n, past_key_values=a.past_key_values, **LOGITS)
        if spy.calls:
            begin = first["attention_mask"].sum(1) + n - 1
            for row in range(2):
                for k, found in spy.lost(row, int(begin[row])).items():
                    lost[row][k] += found
    assert bool(spy.calls) == (tiny.family(family).pixels in turn)
    p = oracle.prompt(model, whole)
    for row in range(2):
        want = oracle_kv.forced(model, p, row, b.sequences[row, -n:].tolist(), lost[row])
        torch.testing.assert_close(torch.stack(b.logits)[:, row], want, atol=3e-4, rtol=1e-4)
    slots = b.past_key_values.layers[3].keys.shape[2]
    assert slots < int(whole["attention_mask"].sum(1).max()) + n - 1 and max(cached[-1]) < slots


@whole
@pytest.mark.parametrize("merge", ["averaged", "pivotal", "weighted"])
def test_merged_caches_equal_a_loop_on_the_stock_model(family, merge):
    """The stock model's own cache, every layer's keys and values replaced by hand before it goes on."""
    model, n = tiny.make(family), 5
    batch = tiny.build(model, ROWS[:2], seed=3)
    spy = Told(LookM, important="30%", merge=merge)
    with vtoken.wrapped(model, [spy.stage]):
        got = greedy(model, batch, n, **LOGITS)
    for row in range(2):
        one = alone(model, batch, row)
        with torch.no_grad():
            out = model(**one)
            last = model.get_decoder()
            cache, length = out.past_key_values, one["input_ids"].shape[1]
            for k, calls in spy.calls.items():
                layer, hold = calls[row]
                cached = cache.layers[k]
                torch.testing.assert_close(cached.keys[0], layer.keys, atol=1e-4, rtol=1e-4)
                cached.keys, cached.values = (by_hand(hold, x[0])[None] for x in (cached.keys, cached.values))
            start = oracle.prompt(model, one).positions.max() + 1
            want = [out.logits[:, -1]]
            for step, token in enumerate(got.sequences[row, -n:-1].tolist()):
                position = (start + step).reshape(1, 1)
                if mrope(model):
                    position = position.expand(3, 1, 1)
                x = model.get_input_embeddings()(torch.tensor([[token]]))
                hidden = last(inputs_embeds=x, position_ids=position, past_key_values=cache).last_hidden_state
                want.append(model.lm_head(hidden)[:, -1])
        assert length > cache.layers[-1].keys.shape[2]
        torch.testing.assert_close(torch.stack(got.logits)[:, row], torch.cat(want), atol=3e-4, rtol=1e-4)


def by_hand(hold, x):
    """Hold.apply, one loop per sentence."""
    out = torch.zeros(*hold.index.shape, x.shape[2])
    for h in range(len(x)):
        for j, into in enumerate(hold.into[h].tolist()):
            if into >= 0:
                out[h, into] += x[h, j] * hold.weight[h, j]
    return out


@whole
def test_backends(family):
    """Eager masks, and backends of the flash kind, which take 2D masks and read the tail."""
    rows = rows_for(family, "ragged")
    check(tiny.make(family, "eager"), tiny.build(tiny.make(family), rows, seed=3), "snapkv", [Ragged()])
    model = tiny.make(family)
    batch = tiny.build(model, rows, seed=3)
    with vtoken.wrapped(model, [Ragged(), Deep(), recorded("snapkv").stage]):
        want = greedy(model, batch, **LOGITS)
    model.get_decoder().config._attn_implementation_internal = flash_stand_in.NAME
    with vtoken.wrapped(model, [Ragged(), Deep(), recorded("snapkv").stage]):
        got = greedy(model, batch, **LOGITS)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.each("anyres", mrope=False, window=None))
def test_compact_positions(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    pipeline = {"positions": "compact", "stages": [{"random": {"keep": 9}}, recorded("snapkv").stage]}
    with vtoken.wrapped(model, pipeline):
        plain = greedy(model, batch)
        for row in range(3):
            assert torch.equal(greedy(model, alone(model, batch, row))[0, -6:], plain[row, -6:])


@whole
def test_layers_may_hold_different_numbers(family):
    """Layer groups of their own, in padded rows, drafts and text turns."""
    model = tiny.make(family)
    out, trace, _ = check(model, tiny.build(model, ROWS, seed=3), "pyramid", [{"random": {"keep": 12}}])
    slots = [layer.keys.shape[2] for layer in oracle_kv.attending(out.past_key_values)]
    assert slots == [max(h) + 5 for h in trace.cached] and len({tuple(h) for h in trace.cached}) == len(slots)
    if not tiny.family(family).states:
        test_drafts_change_nothing(family, "pyramid")
    test_second_turn(family, "pyramid", [[5], [5]])


@whole
@pytest.mark.parametrize(
    "stage", [SnapKV(keep="100%"), LookM(keep="100%"), LookM(important="100%")], ids=lambda s: s.name
)
def test_holding_everything_is_the_identity(family, stage):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [stage]):
        got = greedy(model, batch, **LOGITS)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"


@whole
def test_unwrap_is_exact(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = greedy(model, batch, **LOGITS)
    before = state(model)
    with vtoken.wrapped(model, [{"fastv": {"keep": 9}}, recorded("lookm").stage]):
        greedy(model, batch)
    assert changed(before, state(model)) <= {("model", "rope_deltas")}
    assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(want.logits))


@whole
def test_bfloat16_and_text_only(family):
    model = tiny.make(family).to(torch.bfloat16)
    batch = tiny.build(model, ROWS, seed=3)
    batch |= {k: v.bfloat16() for k, v in batch.items() if k.startswith("pixel_values")}
    text = tiny.build(model, [[6], [4]], seed=1)
    plain = greedy(model, text)
    with vtoken.wrapped(model, [LookM(keep=4)]), torch.inference_mode():
        out = greedy(model, batch, 3, **LOGITS)
        assert out.past_key_values.layers[-1].keys.dtype == torch.bfloat16 and bool(
            torch.stack(out.logits).isfinite().all()
        )
        assert torch.equal(greedy(model, text), plain) and vtoken.trace(model).cached == []


def test_what_cannot_be_served_is_refused():
    model = tiny.make("llava")
    batch = tiny.build(model, ROWS, seed=3)
    with pytest.raises(UnsupportedError, match="snapkv and lookm both act"):
        vtoken.wrap(model, [{"snapkv": {"keep": 4}}, "lookm"])
    with pytest.raises(ConfigError, match="per_frame cannot"):
        vtoken.wrap(model, [{"snapkv": {"keep": {"per_frame": 4}}}])
    with pytest.raises(ConfigError, match="odd"):
        vtoken.wrap(model, [{"snapkv": {"keep": 4, "kernel": 4}}])
    with pytest.raises(ConfigError, match="leave `keep` out"):
        vtoken.wrap(model, [{"lookm": {"keep": 4, "text": True}}])
    with pytest.raises(UnsupportedError, match=r"no compress\(\)"):
        vtoken.wrap(model, [type("Other", (Ragged,), {"site": "cache"})()])
    with vtoken.wrapped(model, [{"snapkv": {"keep": 4}}]):
        want = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="static cache"):
            greedy(model, batch, cache_implementation="static")
        with pytest.raises(UnsupportedError, match="use_cache=True"):
            greedy(model, batch, use_cache=False)
        assert torch.equal(greedy(model, batch), want)


@whole
def test_an_exception_leaves_the_model_usable(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    fail = [True]

    class Sometimes(SnapKV):
        def compress(self, layer):
            if fail[0] and layer.layer == 3:
                raise ZeroDivisionError("a bug in a stage")
            return SnapKV.compress(self, layer)

    with vtoken.wrapped(model, [SnapKV(keep=3)]):
        want = greedy(model, batch)
    with vtoken.wrapped(model, [Sometimes(keep=3)]):
        with pytest.raises(ZeroDivisionError):
            greedy(model, batch)
        assert greedy(model, tiny.build(model, [[5]], seed=1)).shape == (1, 11)
        fail[0] = False
        assert torch.equal(greedy(model, batch), want)


@pytest.mark.parametrize("bad", ["heads", "none", "more"])
def test_a_bad_decision_is_named(bad):
    class Bad(SnapKV):
        def compress(self, layer):
            n = {"heads": 3, "none": 0, "more": layer.keys.shape[1] + 1}[bad]
            x = layer.keys.new_zeros(len(layer.keys) + (bad == "heads"), n, layer.keys.shape[2])
            return ReplacedKV(x, x)

    model = tiny.llava()
    with vtoken.wrapped(model, [Bad(keep=3)]), pytest.raises(ValueError, match="every head must hold the same"):
        greedy(model, tiny.build(model, ROWS, seed=3))


def test_a_hold_is_a_gather():
    x = torch.arange(12.0).view(2, 3, 2)
    keys, values = KeepSlots(torch.tensor([[0, 2], [1, 2]])).apply(x, -x[..., :1])
    assert keys.tolist() == [[[0, 1], [4, 5]], [[8, 9], [10, 11]]]
    assert values.tolist() == [[[0], [-4]], [[-8], [-10]]]
