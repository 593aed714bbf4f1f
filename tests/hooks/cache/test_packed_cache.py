"""Caches in few bits in models: every way of generating gives the very logits of a cache that was rounded at full
width."""

from __future__ import annotations

import copy
import inspect

import modes
import pytest
import tiny
import torch
from modes import LOGITS, ROWS, alone, expandable, greedy, mrope, whole
from oracle_kv import attending
from rounded_cache import FEW, Wide, both, recording, rounded, some
from turns import conversation, second

import vtoken
from vtoken.compressors.cache.zipvl_cache import ZipVLCache
from vtoken.hooks.state.quantized_layer import Plain, QuantizedLayer
from vtoken.session import session_of


def equal(a, b):
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(torch.stack(a.logits), torch.stack(b.logits)), "bit for bit"


def stored(layer):
    """Bytes of all storages that can be reached from a cache layer."""
    found, seen, todo = {}, set(), [layer]
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if torch.is_tensor(x):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, (tuple, list)):
            todo += x
        elif hasattr(x, "__dict__"):
            todo += vars(x).values()
    return sum(found.values())


@whole
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "ragged"])
def test_greedy(family, rows):
    model = tiny.make(family)
    batch = tiny.build(model, rows, seed=3)

    def run():
        return greedy(model, batch, **LOGITS), vtoken.trace(model)

    (got, trace), (want, wide) = both(model, run)
    equal(got, want)
    assert trace.cached == wide.cached == [trace.prompt_tokens] * len(tiny.family(family).attending)
    for cached, plain in zip(attending(got.past_key_values), attending(want.past_key_values), strict=True):
        assert isinstance(cached, QuantizedLayer) and cached.get_seq_length() == plain.get_seq_length()
        assert torch.equal(cached.keys, plain.keys) and torch.equal(cached.values, plain.values)


@whole
def test_bytes_are_really_saved(family):
    """Of wide heads, so that codes outweigh what reads them."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [ZipVLCache(**FEW)]), torch.no_grad():
        out, trace = model(**batch), vtoken.trace(model)
    dense = model(**batch).past_key_values
    cache = out.past_key_values
    assert trace.cache_bytes == sum(map(stored, attending(cache))), "and nothing else is kept alive"
    for cached, full in zip(attending(cache), attending(dense), strict=True):
        (block,), d = cached.blocks, full.keys.shape[-1]
        assert [type(row[0]).__name__ for row in block.rows] == ["QuantizedKV", "QuantizedKV", "Plain"]
        for (piece,), n in zip(block.rows[:2], trace.prompt_tokens, strict=False):
            heads = full.keys.shape[1]
            assert sum(c.packed.nbytes for c in piece.key_groups) <= n * heads * -(-4 * d // 8)
            assert sum(c.packed.shape[1] for c in piece.key_groups) == n
        assert stored(cached) < full.keys.nbytes


@some
def test_beams(family):
    model = tiny.make(family)
    batch = tiny.build(model, expandable(family), seed=3)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    got, want = both(model, lambda: greedy(model, batch, 5, **options))
    assert torch.equal(got.sequences, want.sequences) and torch.equal(got.sequences_scores, want.sequences_scores)


@some
def test_sampling_and_return_sequences(family):
    model = tiny.make(family)
    batch = tiny.build(model, expandable(family), seed=3)

    def run():
        torch.manual_seed(1)
        return model.generate(**batch, max_new_tokens=5, do_sample=True, num_return_sequences=3, **LOGITS)

    equal(*both(model, run))


@whole
@pytest.mark.parametrize("more", [[[5], [5]], [[3, "img", 2], [3, "img", 2]]], ids=["text", "image"])
def test_second_turn(family, more):
    """A text turn reads the packed cache, a turn with an image packs what it adds behind it, also after a copy."""
    model = tiny.make(family)
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, more, seed=9)
    if tiny.family(family).pixels in turn and mrope(model):
        pytest.importorskip("transformers", minversion="5.21", reason="older transformers numbers a new image as text")

    def run():
        a = greedy(model, first, 4, **LOGITS)
        whole, _ = conversation(model, first, turn, a.sequences)
        twin = copy.deepcopy(a.past_key_values)
        now = second(model, whole, turn)
        b = greedy(model, now, 4, past_key_values=a.past_key_values, **LOGITS)
        assert torch.equal(greedy(model, now, 4, past_key_values=twin), b.sequences)
        return b

    got, want = both(model, run)
    equal(got, want)
    kinds = [
        {type(piece).__name__ for row in block.rows for piece in row} for block in got.past_key_values.layers[3].blocks
    ]
    assert kinds == (
        [{"QuantizedKV"}, {"Plain"}, {"QuantizedKV"}] if tiny.family(family).pixels in turn else [{"QuantizedKV"}]
    )


@modes.attending
def test_drafts(family):
    """Assisted generation crops the tail; drafts that are verified in the prefill read rounded numbers, too."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    with vtoken.wrapped(model, [ZipVLCache(**FEW)]):
        plain = greedy(model, batch, 8)
        assert torch.equal(greedy(model, batch, 8, prompt_lookup_num_tokens=3), plain)
        assert torch.equal(greedy(model, batch, 8, assistant_model=tiny.make(family)), plain)


@some
def test_an_answer_that_is_scored(family):
    """Rows are followed by answers of different lengths in the prefill itself."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)

    def run():
        out = greedy(model, batch, 5, **LOGITS)
        whole = {**batch, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 5))
        with torch.no_grad():
            scored = model(**whole, logits_to_keep=6)
        return scored.logits[0, :5], torch.stack(out.logits)[:, 0], scored.past_key_values.layers[1]

    (got, generated, cached), (want, _, _) = both(model, run)
    assert torch.equal(got, want) and isinstance(cached, QuantizedLayer)
    torch.testing.assert_close(got, generated, atol=2e-4, rtol=1e-4)


@some
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_stages_before(family, dtype):
    model = tiny.make(family).to(dtype)
    batch = tiny.build(model, ROWS, seed=3)
    batch |= {k: v.to(dtype) for k, v in batch.items() if k.startswith("pixel_values")}
    found = []
    for cls in (ZipVLCache, Wide):
        with (
            vtoken.wrapped(model, [{"random": {"keep": "80%"}}, {"fastv": {"keep": "60%"}}, cls(**FEW)]),
            torch.inference_mode(),
        ):
            found.append(greedy(model, batch, **LOGITS))
    equal(*found)
    layers = attending(found[0].past_key_values)
    assert layers[0].keys.dtype == layers[-1].values.dtype == dtype
    assert layers[0].get_seq_length() > layers[-1].get_seq_length(), "fastv opens a layer group of its own"


@whole
def test_what_is_generated_follows(family):
    """Against a loop on the stock model, whose cache is rounded by hand: every third token, what the newest query
    attends to in float64."""
    model, n, every = tiny.make(family), 9, 3
    batch = tiny.build(model, ROWS[:1], seed=3)
    stage, calls = recording(every=every)
    with vtoken.wrapped(model, [stage]):
        out = greedy(model, batch, n, **LOGITS)
    assert [layer.layer for layer, _ in calls] == [*tiny.family(family).attending] * 2, (
        "after the third and the sixth token that is fed"
    )
    wide = Wide(**FEW, every=None)
    with vtoken.wrapped(model, [wide]), torch.no_grad():
        got = model(**batch)
        cache, want, prompt = got.past_key_values, [got.logits[:, -1]], batch["input_ids"].shape[1]
        queries = iter(calls)
        for step, token in enumerate(out.sequences[0, -n:-1].tolist()):
            fed = {"input_ids": torch.tensor([[token]]), "past_key_values": cache}
            if mrope(model):
                at = model.model.rope_deltas.reshape(1, 1) + prompt + step
                fed["position_ids"] = at.expand(3, 1, 1)
            want.append(model(**fed).logits[:, -1])
            if (step + 1) % every:
                continue
            for cached in attending(cache):
                asked, _ = next(queries)
                k, v, q = cached.keys[0], cached.values[0], asked.query
                torch.testing.assert_close(asked.keys, k, atol=1e-4, rtol=1e-4)
                groups, scores = len(q) // len(k), []
                for h in range(len(q)):
                    scores.append((k[h // groups].double() @ q[h].double() * asked.scale).softmax(0))
                received = torch.stack(scores).mean(0).tolist()
                total, important = 0.0, set()
                for j in sorted(range(len(received)), key=lambda j: -received[j]):
                    if total < FEW["tau"]:
                        important.add(j)
                    total += received[j]
                begin = len(received) - every
                chosen = torch.tensor([begin + j in important for j in range(every)])
                parts = [(chosen.nonzero()[:, 0], 4), ((~chosen).nonzero()[:, 0], 2)]
                new = rounded(k[:, begin:], v[:, begin:], parts)
                cached.keys, cached.values = (
                    torch.cat([x[:, :, :begin], y[None]], 2)
                    for x, y in zip((cached.keys, cached.values), new, strict=True)
                )
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(want), atol=2e-4, rtol=1e-4)
    for cached, plain in zip(attending(out.past_key_values), attending(cache), strict=True):
        assert len(cached.blocks) == 3 and cached.tail[0].shape[2] == n - 1 - 2 * every
        torch.testing.assert_close(cached.values, plain.values, atol=2e-4, rtol=1e-4)


@whole
def test_what_is_generated_in_batches_and_turns(family):
    """Rows decide as they do alone; the row without an image stays as it is; copies of a prompt have answers of their
    own."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    stage, calls = recording(every=3)
    with vtoken.wrapped(model, [stage]):
        together = greedy(model, batch, 8, **LOGITS)
        for row in range(3):
            one = greedy(model, alone(model, batch, row), 8, **LOGITS)
            torch.testing.assert_close(
                torch.stack(one.logits)[:, 0], torch.stack(together.logits)[:, row], atol=2e-4, rtol=1e-4
            )
        layer = together.past_key_values.layers[1]
        assert len(layer.blocks) == 3 and all(isinstance(block.rows[2][0], Plain) for block in layer.blocks)
        assert not any(isinstance(block.rows[0][0], Plain) for block in layer.blocks)
        assert stored(layer) == sum(t.nbytes for t in layer.tensors())
        # A text turn, padded, then more of the same.
        turn = tiny.build(model, [[5], [2], [3]], seed=9)
        whole, _ = conversation(model, batch, turn, together.sequences)
        calls.clear()
        ahead = greedy(model, second(model, whole, turn), 8, past_key_values=together.past_key_values, **LOGITS)
        assert bool(torch.stack(ahead.logits).isfinite().all()) and len(ahead.past_key_values.layers[1].blocks) > 4
        assert calls and all(layer.at.stop <= layer.keys.shape[1] for layer, _ in calls)


@some
def test_beams_and_drafts_with_what_is_generated(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    stage, calls = recording(every=3)
    with vtoken.wrapped(model, [stage]):
        greedy(model, batch, 8, num_beams=3)
        assert len(calls) == 2 * 4 * 3, "each beam its own"
        calls.clear()
        drafted = greedy(model, batch, 8, assistant_model=tiny.make(family), **LOGITS)
        n = batch["input_ids"].shape[1]
        found = [asked.at for asked, _ in calls if asked.layer == 0]
        assert found == [range(n, n + 3), range(n + 3, n + 6)][: len(found)] and found, "each token once, in order"
        cached = drafted.past_key_values.layers[0]
        assert cached.get_seq_length() == n + 7


def test_never_costs_nothing():
    """Without a period no layer gets a second tap."""
    model = tiny.make("llava")
    attention = model.get_decoder().layers[0].self_attn
    # What is dropped is not rounded.
    for stage, taps in (
        (ZipVLCache(**FEW, every=None), 1),
        (ZipVLCache(**FEW, every=100), 2),
        (ZipVLCache(tau=0.9), 1),
    ):
        with vtoken.wrapped(model, [stage]):
            assert [module for module, _ in session_of(model).context.handle.installed].count(attention) == taps


@some
def test_unwrap_and_exceptions_leave_a_usable_model(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    dense = greedy(model, batch, **LOGITS)
    fail = [True]

    class Sometimes(ZipVLCache):
        name = "zipvl_cache"

        def compress(self, layer):
            if fail[0] and layer.layer == 2:
                raise ZeroDivisionError("a bug in a stage")
            return ZipVLCache.compress(self, layer)

        def requantize(self, layer):
            if fail[0]:
                raise ZeroDivisionError("a bug in a stage")
            return ZipVLCache.requantize(self, layer)

    with vtoken.wrapped(model, [ZipVLCache(**FEW, every=3)]):
        want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [Sometimes(**FEW, every=3)]):
        with pytest.raises(ZeroDivisionError):
            greedy(model, batch)
        fail[0] = False
        cache = model(**batch).past_key_values
        fail[0] = True
        with pytest.raises(ZeroDivisionError):
            for _ in range(3):
                model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
        fail[0] = False
        equal(greedy(model, batch, **LOGITS), want)
    equal(greedy(model, batch, **LOGITS), dense)
    with pytest.raises(RuntimeError, match="was unwrapped since"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


def test_a_bad_decision_is_named():
    class Short(ZipVLCache):
        name = "zipvl_cache"

        def compress(self, layer):
            found = super().compress(layer)
            return copy.replace(found, peak=found.peak[:1]) if hasattr(copy, "replace") else found.first(0)

    model = tiny.llava()
    with vtoken.wrapped(model, [Short(**FEW)]), pytest.raises(ValueError, match="every head must hold the same"):
        greedy(model, tiny.build(model, ROWS, seed=3))


def test_the_stock_layer_has_no_other_doors():
    """What a newer DynamicLayer can do with its keys and values must be looked at here."""
    from transformers.cache_utils import DynamicLayer

    known = {*vars(QuantizedLayer), "lazy_initialization", "get_mask_sizes", "get_max_length", "get_max_cache_shape"}
    public = {name for name, _ in inspect.getmembers(DynamicLayer, inspect.isfunction) if not name.startswith("_")}
    assert public <= known
