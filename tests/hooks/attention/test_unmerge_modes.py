"""Virtual unmerging in every way of calling: both caches, single rows, beams, drafts, turns, checkpointing,
failures."""

from __future__ import annotations

import copy

import flash_stand_in
import modes
import naive_unmerge
import oracle
import pytest
import tiny
import torch
from against_oracle import merge
from batches import rows_for
from modes import LOGITS, alone, attending, greedy
from packaging.version import Version
from turns import IMAGE_TURNS, TURNS, both, conversation, second
from unmerging import Mingled, caches, compare, unmerging

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.trace import Trace


@attending
@caches
def test_modes_agree(family, cache):
    """Single rows, drafts, no cache and (expanded) static caches give what plain generation of the batch gives."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    with vtoken.wrapped(model, unmerging("mingled", cache)):
        plain = greedy(model, batch)
        assert torch.equal(greedy(model, batch, use_cache=False), plain)
        if cache == "expanded":
            assert torch.equal(greedy(model, batch, cache_implementation="static"), plain)
        else:
            with pytest.raises(UnsupportedError, match="dynamic cache"):
                greedy(model, batch, cache_implementation="static")
        for row in range(3):
            one = alone(model, batch, row)
            assert torch.equal(greedy(model, one)[0, -6:], plain[row, -6:])
        one = alone(model, batch, 0)
        one.pop("attention_mask")
        assert torch.equal(greedy(model, one, prompt_lookup_num_tokens=3)[0, -6:], plain[0, -6:])
        assert torch.equal(greedy(model, one, assistant_model=tiny.make(family, seed=1))[0, -6:], plain[0, -6:])


@attending
@caches
def test_eager_static_and_flash_kind(family, cache):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    stages = unmerging("mingled", cache)
    with vtoken.wrapped(model, stages):
        want = greedy(model, batch, **LOGITS)
    for name in ("eager", flash_stand_in.NAME):
        model.get_decoder().config._attn_implementation_internal = name
        with vtoken.wrapped(model, stages):
            got = greedy(model, batch, **LOGITS)
            if name == "eager" and cache == "expanded":
                assert torch.equal(greedy(model, batch, cache_implementation="static"), want.sequences)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)


@attending
@caches
def test_beams(family, cache):
    """The score of every returned beam is what the definition gives it."""
    model, n = tiny.make(family), 4
    batch = tiny.build(model, modes.expandable(family), seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, unmerging("mingled", cache)):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
        options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}
        out = greedy(model, batch, n, return_dict_in_generate=True, **options)
    merge(p, trace)
    owner = naive_unmerge.owners(p, trace)
    for b in range(2):
        said = out.sequences[b::2, -n:]
        _, logits = naive_unmerge.generate(model, p, owner, n, start=said)
        want = logits.log_softmax(-1).gather(2, said.T[..., None])[..., 0].sum(0)
        torch.testing.assert_close(out.sequences_scores[b::2], want, atol=1e-3, rtol=1e-3)


@attending
@pytest.mark.parametrize("rows", TURNS.values(), ids=TURNS)
@caches
def test_second_turn(family, rows, cache):
    """A turn on the returned cache, whether its keys carry RoPE (a first turn of text) or not."""
    model, n = tiny.make(family), 4
    first, turn = tiny.build(model, rows[0], seed=3), tiny.build(model, rows[1], seed=9)
    image = tiny.family(family).pixels in turn
    if image and modes.mrope(model) and not IMAGE_TURNS:
        pytest.skip(
            "transformers gives a new image in a cached turn the positions of text; refused, see test_family_turns"
        )
    traces = []
    with vtoken.wrapped(model, unmerging("mingled", cache)):
        a = greedy(model, first, n, return_dict_in_generate=True)
        traces.append(vtoken.trace(model))
        whole, order = conversation(model, first, turn, a.sequences)
        b = greedy(model, second(model, whole, turn), n, past_key_values=a.past_key_values, **LOGITS)
        traces.append(vtoken.trace(model))
    p = oracle.prompt(model, whole)
    pruned = [t for t in traces if t.visual_tokens]
    pruned = pruned if image else pruned[:1]
    stages = []
    for each in zip(*(t.stages for t in pruned), strict=True):
        stages.append(both(each, order))
        stages[-1].into = both([as_kept(stage) for stage in each], order).kept
    trace = Trace(stages=stages)
    merge(p, trace)
    _, logits = naive_unmerge.generate(model, p, naive_unmerge.owners(p, trace), n, start=b.sequences[:, -n:])
    torch.testing.assert_close(torch.stack(b.logits), logits, atol=3e-4, rtol=1e-4)


def as_kept(stage):
    """A stage whose `kept` is its `into`, for `both`."""
    return type(stage)(**{**vars(stage), "kept": stage.into})


@attending
@caches
def test_bfloat16(family, cache):
    """Against the definition of the same bfloat16 weights and embeddings, in float64."""
    model = tiny.make(family, **tiny.family(family).steady).to(torch.bfloat16)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    batch |= {k: v.bfloat16() for k, v in batch.items() if k.startswith("pixel_values")}
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, unmerging("mingled", cache)), torch.inference_mode():
        out, trace = greedy(model, batch, 3, **LOGITS), vtoken.trace(model)
    merge(p, trace)
    _, want = naive_unmerge.generate(model, p, naive_unmerge.owners(p, trace), 3, start=out.sequences[:, -3:])
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16
    assert (torch.stack(out.logits).float() - want).norm() / want.norm() < 0.05, "0.015 to 0.03 without any stage"


@pytest.mark.parametrize("family", tiny.each("deepstack", states=(), window=None))
def test_gradients_with_and_without_checkpointing(family):
    model = tiny.make(family)
    batch = tiny.build(model, modes.ROWS, seed=3)
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100

    def gradients():
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}

    with vtoken.wrapped(model, unmerging("mingled")):
        plain = gradients()
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        if modes.VERSION < Version("5.21"):
            with pytest.raises(UnsupportedError, match="checkpointing"):
                gradients()
            return
        again = gradients()
    assert all(layer.self_attn.k_proj.weight.grad.abs().sum() > 0 for layer in model.get_decoder().layers)
    assert plain.keys() == again.keys()
    for name, want in plain.items():
        torch.testing.assert_close(again[name], want)


@attending
@caches
def test_the_rows_of_a_cache_may_change_places(family, cache):
    """Rows with pictures of different size, swapped and doubled behind the prefill: every row goes on as it would
    have."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged")[:2], seed=3)
    with vtoken.wrapped(model, unmerging("mingled", cache)), torch.no_grad():
        want = greedy(model, batch, 4)
        out = greedy(model, batch, 2, return_dict_in_generate=True)
        deltas = getattr(model.model, "rope_deltas", None)
        for index in ([1, 0], [1, 1, 0]):
            picked = copy.deepcopy(out.past_key_values)
            picked.batch_select_indices(torch.tensor(index))
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)[index]
            more = {"input_ids": out.sequences[index], "attention_mask": mask, "past_key_values": picked}
            if modes.mrope(model):
                more["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 2))[index]
                model.model.rope_deltas = deltas[index]
            assert torch.equal(greedy(model, more, 2), want[index])


@attending
@caches
def test_a_failed_forward_leaves_no_trace_in_the_next(family, cache):
    """A decode step dies in the first layer; the same step again gives what it would have given."""
    model = tiny.make(family)
    batch = tiny.build(model, modes.ROWS[:2], seed=3)
    compare(model, batch, unmerging("mingled", cache), new=3)
    with vtoken.wrapped(model, unmerging("mingled", cache)), torch.no_grad():
        want = greedy(model, batch, 3)
        out = greedy(model, batch, 2, return_dict_in_generate=True)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
        more = {"input_ids": out.sequences, "attention_mask": mask, "past_key_values": out.past_key_values}
        if modes.mrope(model):
            more["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 2))
        handle = model.get_decoder().layers[0].self_attn.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            greedy(model, more, 1)
        handle.remove()
        assert torch.equal(greedy(model, more, 1), want)


def test_compiled_decoding_is_one_graph():
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    model = tiny.make("qwen2_5_vl")
    batch = tiny.build(model, modes.ROWS, seed=3)
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=False)
    compiling._compile_all_devices = True
    with vtoken.wrapped(model, unmerging("mingled")):
        want = greedy(model, batch)
        torch._dynamo.reset()
        counters.clear()
        got = greedy(model, batch, cache_implementation="static", compile_config=compiling)
    assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_compiled_prefill():
    model = tiny.make("llava")
    batch = tiny.build(model, modes.ROWS, seed=3)
    with vtoken.wrapped(model, unmerging("mingled")), torch.no_grad():
        want = model(**batch).logits
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(got, want)


@attending
def test_unwrap_is_exact(family):
    from model_state import changed, state

    model = tiny.make(family)
    batch = tiny.build(model, modes.ROWS, seed=3)
    want, config = greedy(model, batch, **LOGITS), model.config.to_json_string()
    before = state(model)
    with vtoken.wrapped(model, [Mingled(), "vtu"]):
        assert state(model) != before and model.config.to_json_string() == config
        out = greedy(model, batch, return_dict_in_generate=True)
    assert changed(before, state(model)) <= {("model", "rope_deltas")}
    assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(want.logits))
    ids = torch.cat([out.sequences, out.sequences[:, -2:]], 1)
    with pytest.raises(RuntimeError, match="unwrapped"):
        model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=1)
