"""When nothing is chosen, what is refused, and what a choice waits for."""

from __future__ import annotations

import copy
from typing import ClassVar

import flash_stand_in
import pytest
import tiny
import torch
from model_state import changed, state
from modes import LOGITS, alone, greedy, whole
from probes import Ragged
from syncs import Recorder, on_device
from transformers import DynamicCache

import vtoken
from vtoken import registry
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.stages.decode import Choice, DecodeStage, highest

ROWS = [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
QUEST = {"keep": 4, "size": 2, "min_len": 0, "dense_layers": (0,)}
NAMES = {
    "quest": QUEST,
    "tidal": {"keep": 3, "min_len": 0, "layer": 0, "correction": None},
    "recycled": {"keep": 3, "min_len": 0, "every": 2},
}
names = pytest.mark.parametrize("name", NAMES)


def made(name, **options):
    return registry.stage(name)(**{**NAMES[name], **options})


class OneToken(DecodeStage):
    """Reads one visual token of every row, the one whose key its query likes best. No paper."""

    name: ClassVar[str] = "one_token"

    def choose(self, step):
        counts = [min(1, n) for n in step.lengths]
        return Choice(highest(step.of_visual(step.logits().amax(2)), counts), tuple(counts))


@names
def test_a_planted_needle_is_read(name):
    """One visual key that answers every query: whatever else is read, it is."""
    torch.manual_seed(0)
    stage, seen = made(name, keep=2), []
    model = tiny.make("llava")
    batch = tiny.build(model, ROWS[:2], seed=3)
    choose = type(stage).choose

    def with_needle(self, step):
        needle = step.visual[:, 7]
        keys = step.keys.clone()
        keys[torch.arange(len(keys)), :, needle] = 50 * step.queries.unflatten(1, (keys.shape[1], -1)).mean(2)
        found = choose(self, type(step)(**{**vars(step), "keys": keys}))
        if found is not None:
            seen.append(found.index)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stage), "choose", with_needle)
        with vtoken.wrapped(model, [stage]):
            # Of recycled, and of what quest and tidal choose once, the needle is the first step's.
            greedy(model, batch, 3)
    assert seen and all(bool((index == 7).any(-1).all()) for index in seen[: 4 if name != "recycled" else None])


@whole
def test_short_rows_read_everything(family):
    """Row by row, alone and in a batch; the trace says why."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    tokens = [int(n) for n in batch["attention_mask"].sum(1)]
    short, long = sorted((0, 1), key=lambda row: tokens[row])
    want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [made("quest", min_len=tokens[long])]):
        out, entry = greedy(model, batch, **LOGITS), vtoken.trace(model).stages[-1]
        few = f"the row has {tokens[short]} tokens, fewer than min_len {tokens[long]}"
        assert entry.stood_aside is None
        assert [entry.rows_aside[row] for row in (short, long, 2)] == [few, None, "the row has no image"]
        alone_ = greedy(model, alone(model, batch, short), **LOGITS)
        assert vtoken.trace(model).stages[-1].stood_aside == few
    for row in (short, 2):
        torch.testing.assert_close(
            torch.stack(out.logits)[:, row], torch.stack(want.logits)[:, row], atol=2e-4, rtol=1e-4
        )
    torch.testing.assert_close(
        torch.stack(alone_.logits)[:, 0], torch.stack(want.logits)[:, short], atol=2e-4, rtol=1e-4
    )
    with vtoken.wrapped(model, "quest:4"):
        assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(want.logits)), "bit for bit"
        assert "min_len 8192" in vtoken.trace(model).stages[-1].stood_aside


@whole
def test_prompts_without_pictures_are_the_stock_model_s(family):
    model = tiny.make(family)
    text = tiny.build(model, [[6], [4]], seed=1)
    want = greedy(model, text, **LOGITS)
    with vtoken.wrapped(model, [made("quest")]):
        got = greedy(model, text, **LOGITS)
        assert type(got.past_key_values) is DynamicCache and vtoken.trace(model).stages == []
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


@whole
@names
def test_backends(family, name):
    """Eager masks, and backends of the flash kind."""
    batch = tiny.build(tiny.make(family), ROWS, seed=3)
    model = tiny.make(family)
    with vtoken.wrapped(model, [Ragged(), made(name)]):
        want = greedy(model, batch, **LOGITS)
    others = [tiny.make(family, "eager"), tiny.family(family).make()]
    others[1].get_decoder().config._attn_implementation_internal = flash_stand_in.NAME
    for other in others:
        with vtoken.wrapped(other, [Ragged(), made(name)]):
            got = greedy(other, batch, **LOGITS)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=3e-4, rtol=1e-4)


def test_sampled_answers_and_copies_of_a_cache():
    """Several answers to a prompt are several rows; a copy of a cache goes on by itself."""
    model, stage = tiny.make("llava"), made("recycled")
    batch = tiny.build(model, ROWS[:1], seed=3)
    with vtoken.wrapped(model, [stage]), torch.no_grad():
        torch.manual_seed(1)
        out = model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3, **LOGITS)
        assert vtoken.trace(model).stages[-1].slots_read[1][0] < vtoken.trace(model).stages[-1].slots_read[0][0]
        for row in range(3):
            said = out.sequences[row, -6:].tolist()
            cache = model(**batch, use_cache=True).past_key_values
            for other in (copy.deepcopy(cache), cache):
                logits = [
                    model(input_ids=torch.tensor([[t]]), past_key_values=other, use_cache=True).logits[0, -1]
                    for t in said[:-1]
                ]
                got = torch.stack(out.logits)[1:, row]
                torch.testing.assert_close(got, torch.stack(logits), atol=2e-4, rtol=1e-4)


def test_a_cache_that_was_cropped_to_nothing_is_used_again():
    model = tiny.make("llava")
    batch, cache = tiny.build(model, ROWS[:1], seed=3), DynamicCache(config=model.config.get_text_config())
    with vtoken.wrapped(model, [made("quest")]):
        want = greedy(model, batch, 4)
        for _ in range(2):
            assert torch.equal(greedy(model, batch, 4, past_key_values=cache), want)
            cache.crop(-cache.get_seq_length())


def test_rows_are_picked_by_index_or_mask():
    """transformers' batch_select_indices takes either."""
    model = tiny.make("llava")
    batch, step = tiny.build(model, ROWS[:2], seed=3), {"input_ids": torch.tensor([[7]]), "use_cache": True}
    steps = []
    for pick in (torch.tensor([1]), torch.tensor([False, True])):
        with vtoken.wrapped(model, [made("quest")]), torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
            cache.batch_select_indices(pick)
            mask = torch.nn.functional.pad(batch["attention_mask"][pick], (0, 1), value=1)
            logits = model(**step, attention_mask=mask, past_key_values=cache).logits
            steps.append((logits, vtoken.trace(model).stages[-1].slots_read))
    assert torch.equal(steps[0][0], steps[1][0]) and steps[0][1] == steps[1][1] and len(steps[0][1][0]) == 1


@names
def test_a_generated_token_waits_for_nothing(name):
    model = tiny.make("llava")
    batch = on_device(tiny.build(model, ROWS[:1]))
    with torch.inference_mode(), vtoken.wrapped(model, [made(name)]):
        cache = model(**batch, use_cache=True).past_key_values
        token = on_device({"input_ids": torch.tensor([[5]])})
        model(**token, past_key_values=cache, use_cache=True)
        with Recorder() as recorder:
            for _ in range(3):
                model(**token, past_key_values=cache, use_cache=True)
    assert not recorder.found


def test_what_cannot_be_served_is_refused():
    model = tiny.make("llava")
    batch = tiny.build(model, ROWS, seed=3)
    for stages, why in (
        (["tidal", {"quest": {"keep": 4}}], "tidal and quest both choose"),
        ([{"snapkv": {"keep": 4}}, {"quest": {"keep": 4}}], "of which snapkv leaves every head others"),
        (
            [{"pool": {"size": 2}}, "vtu", {"quest": {"keep": 4}}],
            "vtu makes decoder layers attend at places that quest",
        ),
        ([{"tidal": {"layer": 3}}], "layers 0 to 3"),
        ([{"quest": {"keep": 4, "dense_layers": [0, 1, 2, 3]}}], "leaves all layers with attention as they are"),
        ([type("Other", (Ragged,), {"site": "decode"})()], r"no choose\(\)"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            vtoken.wrap(model, stages)
    with pytest.raises(ConfigError, match="per_frame cannot"):
        vtoken.wrap(model, [{"quest": {"keep": {"per_frame": 4}}}])
    with vtoken.wrapped(model, [made("quest")]):
        want = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="static cache"):
            greedy(model, batch, cache_implementation="static")
        with pytest.raises(UnsupportedError, match="layers of kind Odd"):
            cache = DynamicCache(config=model.get_decoder().config)
            cache.layers[1].__class__ = type("Odd", (type(cache.layers[1]),), {})
            greedy(model, batch, past_key_values=cache)
        model(**batch, use_cache=False)
        assert "no KV cache" in vtoken.trace(model).stages[-1].stood_aside
        assert torch.equal(greedy(model, batch), want)
    with vtoken.wrapped(tiny.make("llava", "eager"), [made("quest")]) as eager:
        out = greedy(eager, batch, output_attentions=True, return_dict_in_generate=True)
        assert out.attentions[1][0] is not None
        assert vtoken.trace(eager).stages[-1].stood_aside == "attention weights were asked for"
    wrong = OneToken(keep=2, min_len=0)
    with pytest.MonkeyPatch.context() as patch, vtoken.wrapped(model, [wrong]):
        patch.setattr(OneToken, "choose", lambda self, step: Choice(torch.zeros(1, 1, 1).long(), (99,)))
        with pytest.raises(ValueError, match=r"one_token chose \[99\] of \[16, 32, 0\]"):
            greedy(model, batch)


@whole
def test_an_exception_leaves_the_model_usable(family):
    model = tiny.make(family)
    batch, text = tiny.build(model, ROWS, seed=3), tiny.build(model, [[5]], seed=1)
    plain, fail = greedy(model, text, **LOGITS), [True]
    greedy(model, batch)
    before = state(model)

    class Sometimes(OneToken):
        def choose(self, step):
            if fail[0] and step.layer == 3:
                raise ZeroDivisionError("a bug in a stage")
            return OneToken.choose(self, step)

    with vtoken.wrapped(model, [OneToken(keep=2, min_len=0)]):
        want = greedy(model, batch)
    with vtoken.wrapped(model, [Sometimes(keep=2, min_len=0)]):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                greedy(model, batch)
            got = greedy(model, text, **LOGITS)
            assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
        fail[0] = False
        assert torch.equal(greedy(model, batch), want)
    assert changed(before, state(model)) <= {("model", "rope_deltas")}
