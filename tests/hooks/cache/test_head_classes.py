"""Key heads in classes: every way of generating, against a dense model that masks what heads have dropped."""

from __future__ import annotations

import copy

import flash_stand_in
import oracle
import pytest
import streaming
import tiny
import torch
from batches import inside, rows_for
from model_state import changed, state
from modes import LOGITS, ROWS, alone, attending, greedy, whole
from probes import Deep, Ragged
from streaming import OPTIONS, expected, stage
from transformers import DynamicCache

import vtoken
from vtoken.compressors.cache.streaming_cache import StreamingCache
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.classed_layer import ClassedLayer
from vtoken.hooks.state.pruned_cache import cache_bytes
from vtoken.stages.layer_size import LayerSize

some = pytest.mark.parametrize("family", tiny.each("anyres", "mrope", "states", window=None))
options = pytest.mark.parametrize("name", OPTIONS)


def check(model, batch, stage, n=6, tolerance=3e-4, **more):
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [stage]):
        out, trace = greedy(model, batch, n, **LOGITS, **more), vtoken.trace(model)
    for row in sorted(set(trace.row)):
        want = expected(model, p, row, out.sequences[row, -n:].tolist(), stage)
        torch.testing.assert_close(torch.stack(out.logits)[:, row], want, atol=tolerance, rtol=1e-4)
    return out, trace


@whole
@options
@pytest.mark.parametrize("rows", ["one", "ragged", "video and image"])
def test_equals_a_dense_model_that_masks(family, name, rows):
    if rows_for(family, rows) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    out, trace = check(model, tiny.build(model, rows_for(family, rows), seed=3), stage(model, name))
    mine = [s for s in trace.stages if s.site == "cache"]
    assert tuple(s.layer for s in mine) == tiny.family(family).attending
    if len(set(trace.row)) == len(out.sequences):
        grown = cache_bytes(out.past_key_values) - trace.cache_bytes
        assert (grown > 0) == (name == "gates"), "heads that stream grow no more"
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@some
@options
def test_every_step_long_past_the_window(family, name):
    model = tiny.make(family)
    out, _ = check(model, tiny.build(model, ROWS[:2], seed=3), stage(model, name), 46, min_new_tokens=46)
    assert out.sequences.shape[1] >= 46


@whole
@options
def test_batch_equals_single(family, name):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [stage(model, name)]):
        together, trace = greedy(model, batch, 12), vtoken.trace(model)
        for row in range(3):
            assert torch.equal(greedy(model, alone(model, batch, row), 12)[0, -12:], together[row, -12:])
            for i in range(len(trace.cached) if row < 2 else 0):
                assert vtoken.trace(model).cached[i] == [trace.cached[i][row]]


@whole
def test_nothing_that_streams_is_the_dense_model(family):
    """No head streams, or nothing leaves: bit for bit as long as the cache is the model's own."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = torch.stack(greedy(model, batch, 9, **LOGITS).logits)
    with vtoken.wrapped(model, [stage(model, gates=True, sparsity=0.0)]):
        out = greedy(model, batch, 9, **LOGITS)
    assert torch.equal(torch.stack(out.logits), want)
    assert not any(isinstance(layer, ClassedLayer) for layer in out.past_key_values.layers)
    with vtoken.wrapped(model, [stage(model, recent=999)]):
        got = torch.stack(greedy(model, batch, 9, **LOGITS).logits)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@attending
@options
def test_drafts_change_nothing(family, name):
    """Drafts are taken back, also where the window has moved on: those in the prefill, and later ones."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    with vtoken.wrapped(model, [stage(model, name)]):
        plain = greedy(model, batch, 24)
        assert torch.equal(greedy(model, batch, 24, prompt_lookup_num_tokens=3), plain)
        assert torch.equal(greedy(model, batch, 24, assistant_model=tiny.make(family)), plain)


@whole
def test_an_answer_that_is_scored_reads_what_is_left(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    for compensate in (False, True):
        with vtoken.wrapped(model, [stage(model, compensate=compensate)]), torch.no_grad():
            out = greedy(model, batch, 12, **LOGITS)
            whole = {**batch, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
            if "mm_token_type_ids" in whole:
                whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 12))
            scored = model(**whole, logits_to_keep=13).logits[0, :12]
        torch.testing.assert_close(scored, torch.stack(out.logits)[:, 0], atol=2e-4, rtol=1e-4)


@whole
@options
def test_beams(family, name):
    model, n = tiny.make(family), 9
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    p, one = oracle.prompt(model, batch), stage(model, name)
    scores = {"output_scores": True, "return_dict_in_generate": True}
    with vtoken.wrapped(model, [one]):
        out = greedy(model, batch, n, num_beams=3, num_return_sequences=2, length_penalty=0.0, **scores)
    for sequence, found in zip(out.sequences, out.sequences_scores, strict=True):
        want = expected(model, p, 0, sequence[-n:].tolist(), one).log_softmax(-1)
        torch.testing.assert_close(found, want.gather(1, sequence[-n:, None]).sum(), atol=1e-3, rtol=1e-3)


@some
def test_beams_of_rows_of_different_lengths(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5], [1, "img", 7]], seed=3)
    for more in ({}, {"compensate": True}):
        with vtoken.wrapped(model, [stage(model, "gates", **more)]):
            both = greedy(model, batch, 9, num_beams=3)
            for row in range(2):
                got = greedy(model, alone(model, batch, row), 9, num_beams=3)
                assert torch.equal(got[0, -9:], both[row, -9:])


@some
def test_sampling_and_several_answers(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    one, n = stage(model, "gates"), 9
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [one]):
        torch.manual_seed(0)
        out = model.generate(**batch, max_new_tokens=n, do_sample=True, num_return_sequences=3, **LOGITS)
    for row in range(3):
        want = expected(model, p, 0, out.sequences[row, -n:].tolist(), one)
        torch.testing.assert_close(torch.stack(out.logits)[:, row], want, atol=3e-4, rtol=1e-4)


@some
def test_behind_stages_of_other_sites(family):
    """Layers hold different numbers of tokens in front of it, and rows too."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [Ragged(), *inside(family, [Deep(at=(2,), factor=0.6)]), stage(model, "gates")]):
        together, trace = greedy(model, batch, 9), vtoken.trace(model)
        assert sum(trace.layers[-1]) < sum(trace.layers[0])
        for row in range(3):
            assert torch.equal(greedy(model, alone(model, batch, row), 9)[0, -9:], together[row, -9:])


@whole
def test_thinned_prefill_and_streaming_cache_go_together(family):
    """The same heads stream in both."""
    model, last = tiny.make(family), 9
    batch, heads = tiny.build(model, ROWS[:2], seed=3), streaming.gates(model)
    thin = {"static_sparse": {"sink": 4, "window": 8, "size": 16, "min_len": 0, "gates": heads}}
    with vtoken.wrapped(model, [thin, stage(model, "gates")]):
        together = greedy(model, batch, last)
        acted = {s.name for s in vtoken.trace(model).stages if s.stood_aside is None}
        assert acted == {"static_sparse", "streaming_cache"}
        for row in range(2):
            assert torch.equal(greedy(model, alone(model, batch, row), last)[0, -last:], together[row, -last:])


@whole
def test_backends(family):
    """Eager masks, and backends of the flash kind, which take 2D masks."""
    rows = rows_for(family, "ragged")
    eager = tiny.make(family, "eager")
    check(eager, tiny.build(eager, rows, seed=3), stage(eager, "gates"), 9)
    model = tiny.make(family)
    batch, one = tiny.build(model, rows, seed=3), stage(model, "gates")
    with vtoken.wrapped(model, [one]):
        want = greedy(model, batch, 9, **LOGITS)
    model.get_decoder().config._attn_implementation_internal = flash_stand_in.NAME
    with vtoken.wrapped(model, [one]):
        got = greedy(model, batch, 9, **LOGITS)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)


@whole
def test_bytes_are_those_of_the_formula(family):
    """Of one row, after the prefill and at every length of the answer: nothing is hidden behind a mask."""
    model = tiny.make(family)
    config = model.get_decoder().config
    batch, n, family_layers = tiny.build(model, ROWS[1:2], seed=3), 11, tiny.family(family).attending
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for compensate in (False, True):
        one = stage(model, "gates", compensate=compensate)
        with vtoken.wrapped(model, [one]):
            out, trace = greedy(model, batch, n, **LOGITS), vtoken.trace(model)
        (prompt,), images = trace.prompt_tokens, tuple(trace.visual_tokens)
        for generated, found in ((0, trace.cache_bytes), (n - 1, cache_bytes(out.past_key_values))):
            total = counted = 0
            for k in family_layers:
                streams = sum(one.streams(k))
                kept = 3 + prompt - sum(images) + min(5, sum(images) - 3 + generated)
                full = (config.num_key_value_heads - streams) * (prompt + generated)
                total += (full + streams * (kept + compensate)) * 2 * width * 4
                counted += one.cache_bytes(
                    LayerSize(k, family_layers, prompt, images, generated, config.num_key_value_heads, width, 4)
                )
            assert found == total == counted


@attending
def test_crop_reaches_back_to_what_is_there(family):
    """As far as the last forward is long; what is further back is refused before anything changes."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    with vtoken.wrapped(model, [stage(model)]):
        cache = greedy(model, batch, 9, **LOGITS).past_key_values
        before, length = copy.deepcopy(cache), cache.get_seq_length()
        with pytest.raises(RuntimeError, match=r"takes back 2 tokens.* latest 1"):
            cache.crop(-2)
        cache.crop(0)
        for layer, same in zip(cache.layers, before.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(layer.tensors(), same.tensors(), strict=True))
        cache.crop(-1)
        assert cache.get_seq_length() == length - 1
        cache.reset()
        assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", states=(), window=None))
@pytest.mark.parametrize("compensate", [False, True])
@options
def test_what_leaves_waits_for_crop_where_the_past_is_recorded(family, name, compensate):
    """Steps see as far as ever, and are the same again after some were taken back."""
    model, n = tiny.make(family), 12
    batch = tiny.build(model, ROWS[:2], seed=5)
    with vtoken.wrapped(model, [stage(model, name, compensate=compensate)]):
        want = greedy(model, batch, n, **LOGITS)
        cache = DynamicCache(config=model.config.get_text_config())
        for layer in cache.layers:
            layer.record_past = True
        got = greedy(model, batch, n, past_key_values=cache, **LOGITS)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=3e-4, rtol=1e-4)
        for back in (7, 3):
            cache.crop(-back)
            ids = want.sequences[:, : 1 + cache.get_seq_length()]
            more = torch.ones(len(ids), ids.shape[1] - batch["input_ids"].shape[1], dtype=torch.long)
            mask = torch.cat([batch["attention_mask"], more], 1)
            given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, **tiny.types(model, ids)}
            again = torch.stack(greedy(model, given, back, **LOGITS).logits)
            torch.testing.assert_close(again, torch.stack(want.logits)[-back:], atol=3e-4, rtol=1e-4)
        cache.crop(-1)
        assert cache_bytes(cache) <= cache_bytes(want.past_key_values), "what has left by then is not held"


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", window=None))
def test_bfloat16_and_text_only(family):
    model = tiny.make(family).to(torch.bfloat16)
    batch = tiny.build(model, ROWS, seed=3)
    batch |= {k: v.bfloat16() for k, v in batch.items() if k.startswith("pixel_values")}
    text = tiny.build(model, [[6], [4]], seed=1)
    plain = greedy(model, text)
    with vtoken.wrapped(model, [stage(model, "gates", compensate=True)]), torch.inference_mode():
        out = greedy(model, batch, 12, **LOGITS)
        assert bool(torch.stack(out.logits).isfinite().all())
        assert all(c.keys.dtype == torch.bfloat16 for c in holding_classes(out.past_key_values))
        assert torch.equal(greedy(model, text), plain) and vtoken.trace(model).cached == []


def holding_classes(cache):
    return [each for layer in cache.layers if isinstance(layer, ClassedLayer) for each in layer.classes]


@whole
def test_unwrap_is_exact_and_ends_the_cache(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = greedy(model, batch, **LOGITS)
    before = state(model)
    with vtoken.wrapped(model, [stage(model, "gates")]):
        cache = greedy(model, batch, **LOGITS).past_key_values
    assert changed(before, state(model)) <= {("model", "rope_deltas")}
    assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(want.logits))
    with pytest.raises(RuntimeError, match="unwrapped since"):
        model.get_decoder()(inputs_embeds=torch.zeros(3, 1, 32), past_key_values=cache)


def test_what_cannot_be_served_is_refused():
    model = tiny.make("llava")
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [stage(model)]):
        want = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="static cache"):
            greedy(model, batch, cache_implementation="static")
        with pytest.raises(UnsupportedError, match="use_cache=True"):
            greedy(model, batch, use_cache=False)
        out = greedy(model, batch, **LOGITS)
        assert torch.equal(out.sequences, want)
        with pytest.raises(UnsupportedError, match="no single tensor"):
            _ = out.past_key_values.layers[0].keys


def test_an_exception_leaves_the_model_usable():
    model = tiny.make("llava")
    batch, fail = tiny.build(model, ROWS, seed=3), [True]

    class Sometimes(StreamingCache):
        def compress(self, layer):
            if fail[0] and layer.layer == 3:
                raise ZeroDivisionError("a bug in a stage")
            return StreamingCache.compress(self, layer)

    with vtoken.wrapped(model, [stage(model)]):
        want = greedy(model, batch)
    with vtoken.wrapped(model, [Sometimes(**OPTIONS["all"])]):
        with pytest.raises(ZeroDivisionError):
            greedy(model, batch)
        fail[0] = False
        assert torch.equal(greedy(model, batch), want)
