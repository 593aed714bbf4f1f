"""A cut inside the decoder that also takes what it drops out of the caches of earlier layers."""

from __future__ import annotations

import pytest
import tiny
import torch
from against_oracle import compare
from batches import behind, rows_for
from modes import COMPACT, LOGITS, ROWS, alone, greedy, whole
from oracle_kv import attending
from probes import Deep, Ragged
from transformers import DynamicCache
from turns import TURNS, conversation, second
from usual import runs
from watchers import where

import vtoken
from vtoken import config
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account


class Clearing(Deep):
    """As Deep, for all caches. No paper."""

    def clears_earlier_layers(self) -> bool:
        return True


plain = pytest.mark.parametrize("family", tiny.families(window=None, states=(), mrope=False))


def lengths(cache):
    return [layer.keys.shape[2] for layer in attending(cache)]


@whole
def test_generation_equals_the_oracle(family):
    """Generated tokens see in no layer what was dropped, the prompt sees all of it before the cut."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    compare(model, batch, {"stages": [Ragged(), Clearing(at=behind(family, 3))]})


@plain
def test_cuts_behind_it_clear_nothing(family):
    """What a later stage drops stays in the caches of the layers in front of it."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    trace = compare(model, batch, {"stages": [{"ivc_prune": {"keep": 3, "layer": 1}}, {"vtw": {"layer": 3}}]})
    assert [sum(layer) for layer in trace.layers][1:] == [9, 9, 0]


@pytest.mark.parametrize("family", [family for family in COMPACT if tiny.family(family).window is None])
def test_renumbered_positions(family):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    compare(model, batch, {"positions": "compact", "stages": [Ragged(), Clearing()]})


@whole
def test_the_first_token_is_as_without(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    first = []
    for stage in (Deep(), Clearing()):
        with vtoken.wrapped(model, [stage]), torch.no_grad():
            first.append(model(**batch).logits[:, -1])
    assert torch.equal(*first)


@whole
def test_all_layers_hold_the_same(family):
    """One layer group, whose decode steps are the model's own, and bytes of what is left."""
    model = tiny.make(family)
    with vtoken.wrapped(model, {"newline": "keep", "stages": [Clearing()]}), torch.no_grad():
        out = model(**tiny.build(model, ROWS[:1], seed=3))
        trace = vtoken.trace(model)
    (n,) = set(lengths(out.past_key_values))
    assert n == trace.prompt_tokens[0] - trace.visual_tokens[0] + trace.tokens_out[0]
    layers = attending(out.past_key_values)
    assert trace.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert list(out.past_key_values.groups) == [0]


@whole
def test_rows_and_static_caches(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [Ragged(), Clearing()]):
        together = greedy(model, batch, **LOGITS)
        for row in range(len(ROWS)):
            one = greedy(model, alone(model, batch, row), **LOGITS)
            assert torch.equal(one.sequences[:, -6:], together.sequences[row : row + 1, -6:])
        fixed = greedy(model, batch, cache_implementation="static", **LOGITS)
        assert torch.equal(fixed.sequences, together.sequences)
        torch.testing.assert_close(torch.stack(fixed.logits), torch.stack(together.logits), atol=3e-4, rtol=1e-4)
        beams = [greedy(model, {**b}, 4, num_beams=3) for b in (tiny.build(model, ROWS[:1], seed=3),) * 2]
        assert torch.equal(*beams)


@whole
def test_what_earlier_cuts_dropped_leaves_though_nothing_more_does(family):
    """Else a row would be another in a batch in which other rows lose more."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    (first,), (last,) = behind(family, 2), behind(family, 3)
    stages = [Deep(at=(first,)), {"ivc_prune": {"layer": last, "keep": "100%"}}]
    if not runs(family, [*config.load(stages).stages]):
        pytest.skip("layers that keep a state have no values to read")
    trace = compare(model, batch, {"stages": stages})
    assert sum(trace.stages[0].tokens_out) == sum(trace.stages[1].tokens_out) < sum(trace.visual_tokens)


@plain
def test_later_tokens_equal_slots_deleted_by_hand(family):
    """What the stock model says on a cache from which a hand has taken the slots, a turn of text included."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=3)
    turn = torch.tensor([[5, 9, 7]])
    with vtoken.wrapped(model, {"newline": "keep", "stages": [Deep()]}), torch.no_grad():
        out, kept = model(**batch), vtoken.trace(model).kept[0]
    ((_, columns, _, _),) = where(model, batch)
    stay = torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
    stay[columns] = False
    stay[columns[kept]] = True
    with vtoken.wrapped(model, {"newline": "keep", "stages": [Clearing()]}), torch.no_grad():
        cleared = model(**batch)
        got = model(turn, past_key_values=cleared.past_key_values).logits
    hand = DynamicCache(config=model.config.get_text_config())
    for k, layer in enumerate(out.past_key_values.layers):
        slots = stay if k < 2 else stay[stay]
        hand.update(layer.keys[:, :, slots], layer.values[:, :, slots], k)
    positions = len(stay) + torch.arange(3)[None]
    with torch.no_grad():
        want = model(turn, past_key_values=hand, position_ids=positions).logits
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@whole
@pytest.mark.parametrize("name", TURNS)
def test_later_turns(family, name):
    """Rows of a conversation equal conversations of their own."""
    model = tiny.make(family)
    if name != "text" and tiny.family(family).mrope:
        pytest.skip("transformers numbers pictures of later turns as it likes")
    first, turn = (tiny.build(model, rows, seed=seed) for rows, seed in zip(TURNS[name], (3, 9), strict=True))
    found = []
    with vtoken.wrapped(model, [Ragged(), Clearing()]):
        for a, b in [(first, turn), *((alone(model, first, r), alone(model, turn, r)) for r in range(2))]:
            said = greedy(model, a, 4, return_dict_in_generate=True)
            whole, _ = conversation(model, a, b, said.sequences)
            found.append(greedy(model, second(model, whole, b), 4, past_key_values=said.past_key_values)[:, -4:])
    assert torch.equal(found[0][:2], torch.cat(found[1:]))


def test_what_later_tokens_have_read_is_refused():
    model = tiny.llava()
    batch = tiny.build(model, ROWS[:1], seed=3)
    with vtoken.wrapped(model, [Clearing()]):
        want = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="retroactive: false"):
            model(**batch, logits_to_keep=3)
        with pytest.raises(UnsupportedError, match="drafts, or an answer"):
            greedy(model, batch, assistant_model=tiny.llava())
        assert torch.equal(greedy(model, batch), want), "the model stays usable"
    with pytest.raises(UnsupportedError, match="snapkv leaves every head"):
        vtoken.wrap(model, [Clearing(), {"snapkv": {"keep": 2, "window": 2}}])


def test_the_account_counts_what_is_held():
    model = tiny.llava()
    pipeline = config.load([{"ivc_prune": {"keep": 5}}])
    found = account(model.config, pipeline, text_tokens=8, new_tokens=1, dtype_bytes=4)
    with vtoken.wrapped(model, pipeline), torch.no_grad():
        model(**tiny.build(model, [[3, "img", 5]], seed=3))
        assert vtoken.trace(model).cache_bytes == found.kv_bytes_prefill
    assert found.visual_tokens == (16, 16, 5, 5)
