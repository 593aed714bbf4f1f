"""Stages that change what attention gives, against weights that are written out: on every family, at every step."""

from __future__ import annotations

import json
from dataclasses import replace

import flash_stand_in
import modes
import oracle
import pytest
import tiny
import torch
from modes import LOGITS, ROWS, alone, greedy, whole
from probes import Deep, Ragged
from steered import amplified, literal, redistributed, salient
from turns import IMAGE_TURNS, TURNS, both, conversation, second

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError
from vtoken.hooks.attention import steering
from vtoken.hooks.attention.steering import layer_for
from vtoken.stages import SteeredAttention

NEW = 4
VAR = {"tau": 2.2, "rho": 0.8, "summ": 0.05, "p": 0.3, "first": 1}
STEERS = {
    "amplify": ({"amplify": {"gamma": 3.0, "first": 1}}, lambda: amplified(3.0, (1, 2, 3))),
    "var": ({"var": VAR}, lambda: redistributed(**VAR)),
}
PRUNED = {"all": [], "tokens": [{"fastervlm": {"keep": 7}}, Ragged()], "deep": [Ragged(), Deep()]}
steers = pytest.mark.parametrize("steer", STEERS)


def compared(model, batch, stages, steer, **options):
    """Logits [n, B, V] of the wrapped model, and of the definition."""
    stage, rule = STEERS[steer][0], STEERS[steer][1]()
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [*stages, stage]):
        out = greedy(model, batch, NEW, **LOGITS, **options)
        trace = vtoken.trace(model)
    return torch.stack(out.logits), literal(model, p, trace.stages, out.sequences[:, -NEW:], rule), rule


@whole
@steers
@pytest.mark.parametrize("pruned", PRUNED)
def test_equals_written_out_weights(family, steer, pruned):
    """A ragged batch, and behind stages that drop: prompt and generated tokens."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    got, want, rule = compared(model, batch, PRUNED[pruned], steer)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    assert steer == "amplify" or rule.changed > 8, "some rows are chosen"
    dense = literal(model, oracle.prompt(model, batch), *_dense(model, batch, PRUNED[pruned], got), lambda w, *_: w)
    changed = (got - dense).abs().amax((0, 2))
    assert changed[:2].max() > 1e-2 and changed[2] < 1e-4, "what is said of pictures, and nothing else"


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", "states", window=None))
@steers
@pytest.mark.parametrize("backend", ["eager", flash_stand_in.NAME])
def test_backends(family, steer, backend):
    """Eager masks, and backends of the flash kind, which take no bias."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = compared(model, batch, PRUNED["tokens"], steer)[0]
    if tiny.family(family).gaps_for_flash:
        pytest.skip("the stock model hands flash attention gaps")
    model.get_decoder().config._attn_implementation_internal = backend
    with vtoken.wrapped(model, [*PRUNED["tokens"], STEERS[steer][0]]):
        got = torch.stack(greedy(model, batch, NEW, **LOGITS).logits)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", "states", window=None))
@steers
def test_rows_of_a_batch_are_rows_alone(family, steer):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [*PRUNED["deep"], STEERS[steer][0]]):
        got = torch.stack(greedy(model, batch, NEW, **LOGITS).logits)
        for row in range(3):
            one = torch.stack(greedy(model, alone(model, batch, row), NEW, **LOGITS).logits)[:, 0]
            torch.testing.assert_close(got[:, row], one, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", window=None, states=()))
@steers
@pytest.mark.parametrize("rows", TURNS.values(), ids=TURNS)
def test_second_turn(family, steer, rows):
    """A turn on the returned cache, with text or another picture, is as one conversation. Sinks are those of prompts with
    pictures, so VAR is told of no text in between."""
    model = tiny.make(family)
    stage, rule = STEERS[steer][0], STEERS[steer][1]()
    first, turn = tiny.build(model, rows[0], seed=3), tiny.build(model, rows[1], seed=9)
    image = tiny.family(family).pixels in turn
    stages = []
    with vtoken.wrapped(model, [Ragged(), stage]):
        a = greedy(model, first, NEW, return_dict_in_generate=True)
        stages.append(vtoken.trace(model).stages[:1])
        whole, order = conversation(model, first, turn, a.sequences)
        more = second(model, whole, turn)
        if image and modes.mrope(model) and not IMAGE_TURNS:
            with pytest.raises(UnsupportedError, match="M-RoPE"):
                greedy(model, more, NEW, past_key_values=a.past_key_values)
            return
        b = greedy(model, more, NEW, past_key_values=a.past_key_values, **LOGITS)
        stages.append(vtoken.trace(model).stages[:1] if image else [])
    p = oracle.prompt(model, whole)
    merged = [both(each, order) for each in zip(*(s for s in stages if s), strict=True)]
    length = first["input_ids"].shape[1]
    column = torch.arange(whole["input_ids"].shape[1]).expand(2, -1)
    asked = (column < length) & (tiny.family(family).pixels in first)
    if image:
        asked = asked | (column >= length + NEW - 1)  # the last generated token is fed with the turn
    want = literal(model, p, merged, b.sequences[:, -NEW:], rule, asked)
    torch.testing.assert_close(torch.stack(b.logits), want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", window=None, states=()))
@pytest.mark.parametrize("pruned", ["all", "tokens"])
def test_salient_tokens(family, pruned):
    model, stage = tiny.make(family), {"amplify": {"gamma": 4.0, "tokens": "salient", "keep": 3, "measured": 1}}
    batch = tiny.build(model, [[3, "img", 5], [1, "img", 8], [4]], seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [*PRUNED[pruned], stage]):
        out = greedy(model, batch, NEW, **LOGITS)
        trace = vtoken.trace(model)
    want = literal(model, p, trace.stages, out.sequences[:, -NEW:], salient(4.0, 3, 1))
    torch.testing.assert_close(torch.stack(out.logits), want, atol=3e-4, rtol=1e-4)


@steers
def test_nothing_to_do_changes_no_bit(steer):
    neutral = {"amplify": {"gamma": 1.0}, "var": {"p": 1.0}}[steer]
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    for stages in PRUNED.values():
        with vtoken.wrapped(model, stages or "none"):
            want = greedy(model, batch, **LOGITS)
        with vtoken.wrapped(model, [*stages, {steer: neutral}]):
            got = greedy(model, batch, **LOGITS)
        assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)) or stages
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)


@steers
@pytest.mark.parametrize("family", tiny.each("mrope", window=None, states=()))
def test_beams_drafts_and_calls_without_a_cache(family, steer):
    model = tiny.make(family)
    batch, stages = tiny.build(model, modes.expandable(family), seed=3), [*PRUNED["tokens"], STEERS[steer][0]]
    p, rule = oracle.prompt(model, batch), STEERS[steer][1]()
    with vtoken.wrapped(model, stages):
        plain = greedy(model, batch, NEW)
        trace = vtoken.trace(model)
        assert torch.equal(greedy(model, batch, NEW, use_cache=False), plain)
        options = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True, "length_penalty": 0.0}
        out = greedy(model, batch, NEW, **options)
        one = alone(model, batch, 0)
        assert torch.equal(greedy(model, one, NEW, prompt_lookup_num_tokens=3)[:, -NEW:], plain[:1, -NEW:])
    said = out.sequences[:, -NEW:]
    scores = literal(model, p, trace.stages, said, rule).log_softmax(-1).gather(2, said.T[..., None])[..., 0].sum(0)
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-3, rtol=1e-3)


def test_heads_of_a_file(tmp_path):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps([[1, 0], [1, 3], [3, 2]]))
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    p = oracle.prompt(model, batch)
    for heads in (str(file), ((1, 0), (1, 3), (3, 2))):
        stage = {"amplify": {"gamma": 5.0, "heads": heads}}
        with vtoken.wrapped(model, [stage]):
            out, stages = greedy(model, batch, NEW, **LOGITS), vtoken.trace(model).stages
        assert [s.layer for s in stages] == [1, 3]
        rule = amplified(5.0, (1, 3), ((1, 0), (1, 3), (3, 2)))
        want = literal(model, p, stages, out.sequences[:, -NEW:], rule)
        torch.testing.assert_close(torch.stack(out.logits), want, atol=3e-4, rtol=1e-4)
    file.write_text("[[1, 9]]")
    with pytest.raises(OtherModelError, match=r"no head \[1, 9\] in 4 decoder layers of 4 heads"):
        vtoken.wrap(model, [{"amplify": {"gamma": 5.0, "heads": str(file)}}])
    for text in ("[[1]]", "{}", "x", "[[1, 2.0]]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"heads\.json"):
            config.load([{"amplify": {"gamma": 5.0, "heads": str(file)}}])


@steers
def test_rows_with_few_tokens_stay_dense(steer):
    """Those that `min_visual_tokens` leaves alone, later tokens too."""
    model = tiny.make("qwen2_5_vl")
    batch = tiny.build(model, [[3, ("img", (1, 4, 4)), 5], [1, ("img", (1, 8, 8)), 2]], seed=3)
    dense = torch.stack(greedy(model, batch, NEW, **LOGITS).logits)
    pipeline = {"positions": "original", "min_visual_tokens": 8, "stages": [STEERS[steer][0]]}
    with vtoken.wrapped(model, pipeline):
        got = torch.stack(greedy(model, batch, NEW, **LOGITS).logits)
        assert vtoken.trace(model).dense_rows == [0]
    torch.testing.assert_close(got[:, 0], dense[:, 0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[:, 1], dense[:, 1], atol=1e-2)


class Broken(SteeredAttention):
    """Fails at a step. No paper."""

    def steer(self, layer):
        if layer.q.shape[2] == 1 and layer.layer == 2:
            raise ZeroDivisionError
        return None


class Odd(SteeredAttention):
    """Marks what does not fit. No paper."""

    def marked_by(self, layer):
        return layer

    def mark(self, layer):
        return layer.behind[:, 1:]


def test_a_head_of_a_layer_that_is_not_there_is_named():
    with pytest.raises(UnsupportedError, match=r"no head \[9, 0\] in 4 decoder layers"):
        vtoken.wrap(tiny.llava(), [{"amplify": {"gamma": 2.0, "heads": [[9, 0]]}}])


@steers
def test_what_cannot_be_steered_is_refused(steer):
    stage, model = STEERS[steer][0], tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    want = greedy(model, batch)
    others = [{"snapkv": {"keep": 5}}, "xattention", "vtu", {"amplify": {"gamma": 2.0}}, {"var": {}}]
    for other in others:
        with pytest.raises(UnsupportedError, match="leave one of the two out"):
            vtoken.wrap(model, [stage, other])
    with pytest.raises(UnsupportedError, match=f"stage {steer} acts in no decoder layer; this model has layers 0 to 3"):
        vtoken.wrap(model, [{steer: {**stage[steer], "first": 4}}])
    with pytest.raises(ConfigError, match="comes before"):
        config.load([{steer: {**stage[steer], "first": 3, "last": 1}}])
    with vtoken.wrapped(model, [stage]):
        steered = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="static cache"):
            greedy(model, batch, cache_implementation="static")
        assert torch.equal(greedy(model, batch), steered), "it is usable after that"
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(UnsupportedError, match="gradient checkpointing"):
            model(**batch)
        model.gradient_checkpointing_disable()
        model.eval()
    for stage, error in ((Broken(), ZeroDivisionError), (Odd(), ValueError)):
        with vtoken.wrapped(model, [stage]):
            with pytest.raises(error):
                greedy(model, batch)
            text = tiny.build(model, [[6], [4]], seed=1)
            greedy(model, text)
    assert torch.equal(greedy(model, batch), want)


def _dense(model, batch, stages, got):
    with vtoken.wrapped(model, [*stages, {"amplify": {"gamma": 1.0}}]):
        greedy(model, batch, 1)
        return vtoken.trace(model).stages, got.argmax(-1).T


def test_what_slots_hold_lies_with_the_layer(monkeypatch):
    """Layers of one group may lie on several devices."""
    model, devices = tiny.make("llava"), []

    def on_both(stage, flow, call):
        for device in ("cpu", "meta"):
            layer = layer_for(stage, flow, replace(call, q=call.q.to(device)))
            devices.append({layer.visual.device.type, layer.behind.device.type, layer.real.device.type} - {device})
        return layer_for(stage, flow, call)

    monkeypatch.setattr(steering, "layer_for", on_both)
    with vtoken.wrapped(model, [STEERS["amplify"][0]]):
        greedy(model, tiny.build(model, ROWS, seed=3), 2)
    assert len(devices) == 2 * 3 * 2 and not any(devices)
