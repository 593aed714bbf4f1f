"""Presses of kvpress as stages; skipped where the package is not installed (`pip install --no-deps kvpress==0.5.5` and what it imports)."""

from __future__ import annotations

import sys

import oracle_kv
import pytest
import tiny
import torch
from modes import LOGITS, ROWS, alone, attending, greedy

import vtoken
from vtoken.compressors.cache.kvpress import KVPress
from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.errors import UnsupportedError

try:
    import kvpress  # noqa: F401

    INSTALLED = True
except ImportError:
    INSTALLED = False
needs_kvpress = pytest.mark.skipif(not INSTALLED, reason="kvpress, or something that it imports, is not installed")


def test_without_kvpress_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(UnsupportedError, match="pip install --no-deps kvpress"):
        vtoken.wrap(tiny.llava(), [{"kvpress": {"press": "KnormPress", "compression_ratio": 0.5}}])


@needs_kvpress
@attending
@pytest.mark.parametrize("press", ["KnormPress", "SnapKVPress", "KeyDiffPress", "TOVAPress"])
@pytest.mark.parametrize("text", [False, True])
def test_presses_run_and_rows_decide_alone(family, press, text):
    model, one = tiny.make(family), tiny.family(family)
    if press in ("SnapKVPress", "TOVAPress") and (one.rotates_part or one.rotates_neighbours):
        pytest.skip("refused: test_presses_that_turn_queries_are_refused_where_rope_is_another")
    batch = tiny.build(model, ROWS, seed=3)
    options = {"window_size": 4} if press == "SnapKVPress" else {}
    stage = {"press": press, "compression_ratio": 0.5, "options": options, "text": text}
    with vtoken.wrapped(model, [{"random": {"keep": "80%"}}, {"kvpress": stage}]):
        plain, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
        # Normed keys are all of one length here (the norm has no weights yet), so KnormPress has nothing to go by.
        normed = hasattr(model.get_decoder().layers[0].self_attn, "k_norm")
        for row in () if normed and press == "KnormPress" else range(3):
            single = greedy(model, alone(model, batch, row), **LOGITS)
            for mine, other in zip(single.logits, plain.logits, strict=True):
                torch.testing.assert_close(mine[0], other[row], atol=2e-4, rtol=1e-4)
                if mine[0].argmax() != other[row].argmax():
                    break  # Two logits are all but equal: from here on the answers are different ones.
    assert all(sum(held) < sum(trace.prompt_tokens) for held in trace.cached)
    if text:
        assert trace.cached[0] == [max(1, n // 2) if r < 2 else n for r, n in enumerate(trace.prompt_tokens)]
        assert not trace.stages[-1].kept
    else:
        assert trace.stages[-1].tokens_out == [n // 2 for n in trace.stages[-1].tokens_in]


@needs_kvpress
@pytest.mark.parametrize("family", tiny.families(rotates_part=True))
def test_presses_that_turn_queries_are_refused_where_rope_is_another(family):
    model = tiny.make(family)
    batch, stage = tiny.build(model, ROWS, seed=3), {"press": "TOVAPress", "compression_ratio": 0.5}
    with vtoken.wrapped(model, [{"kvpress": stage}]):
        with pytest.raises(ValueError, match=r"turns queries itself.* KnormPress"):
            greedy(model, batch)
    greedy(model, batch)


FITTING = tiny.families(states=(), window=None, rotates_part=False, rotates_neighbours=False)


@needs_kvpress
@pytest.mark.parametrize("family", FITTING)
def test_snapkv_of_kvpress_is_ours(family):
    """Two implementations of one method, on the queries of every family: Qwen3-VL's norm included."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:2], seed=3)
    held = []
    for cls, options in (
        (KVPress, {"press": "SnapKVPress", "compression_ratio": 0.5, "options": {"window_size": 4}}),
        (SnapKV, {"keep": "50%", "window": 4}),
    ):
        spy = Spy(cls, **options)
        with vtoken.wrapped(model, [spy.stage]):
            out = greedy(model, batch, **LOGITS)
        held.append(({k: [h.index.tolist() for h in calls] for k, calls in spy.calls.items()}, torch.stack(out.logits)))
    assert held[0][0] == held[1][0] and len(held[0][0]) == 4
    assert torch.equal(held[0][1], held[1][1])


class Spy(oracle_kv.Told):
    """Tells of stages that are set up for a model, too."""

    def __init__(self, cls, **options):
        self.calls = {}
        calls = self.calls

        def compressor(self, model):
            inner = cls.compressor(self, model)

            def compress(layer):
                found = inner(layer)
                calls.setdefault(layer.layer, []).append(found)
                return found

            return compress

        self.stage = type(cls.__name__, (cls,), {"compressor": compressor, "name": cls.name})(**options)


@needs_kvpress
@pytest.mark.parametrize(
    "press, options",
    [
        ("PyramidKVPress", {"window_size": 2, "compression_ratio": 0.5, "beta": 2}),
        ("ChunkPress", {"press": {"KnormPress": {"compression_ratio": 0.5}}, "chunk_length": 8}),
        (
            "ComposedPress",
            {"presses": [{"KnormPress": {"compression_ratio": 0.3}}, {"KeyDiffPress": {"compression_ratio": 0.3}}]},
        ),
        ("PerLayerCompressionPress", {"press": {"KnormPress": {}}, "compression_ratios": [0.2, 0.4, 0.6, 0.8]}),
        ("ThinKPress", {"key_channel_compression_ratio": 0.5, "window_size": 4}),
    ],
)
def test_presses_that_do_more_than_score(press, options):
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    with pytest.raises(UnsupportedError, match="set text: true"):
        vtoken.wrap(model, [{"kvpress": {"press": press, "options": options}}])
    with vtoken.wrapped(model, [{"kvpress": {"press": press, "options": options, "text": True}}]):
        plain, cached = greedy(model, batch, **LOGITS), vtoken.trace(model).cached
        for row in range(3):
            single = greedy(model, alone(model, batch, row), **LOGITS)
            for mine, other in zip(single.logits, plain.logits, strict=True):
                torch.testing.assert_close(mine[0], other[row], atol=2e-4, rtol=1e-4)
                if mine[0].argmax() != other[row].argmax():
                    break  # Two logits are all but equal: from here on the answers are different ones.
    assert press == "ThinKPress" or all(held[0] < 24 for held in cached)
    assert press != "PerLayerCompressionPress" or [held[0] for held in cached] == [19, 14, 9, 4]


@needs_kvpress
@pytest.mark.parametrize(
    "press, options, message",
    [
        ("AdaKVPress", {"press": {"KnormPress": {}}}, "only masks"),
        ("KeyRerotationPress", {"press": {"KnormPress": {}}}, "original positions"),
        ("ChunkPress", {"press": {"ObservedAttentionPress": {}}}, "attention maps"),
        ("DecodingPress", {"base_press": {"KnormPress": {}}}, "while decoding"),
        ("KVzipPress", {}, "several passes"),
        ("SnapKVPres", {}, "no press 'SnapKVPres'"),
        ("KnormPress", {"size": 3}, "does not take"),
    ],
)
def test_presses_that_cannot_be_served_are_refused(press, options, message):
    with pytest.raises(UnsupportedError, match=message):
        vtoken.wrap(tiny.llava(), [{"kvpress": {"press": press, "options": options, "text": True}}])


@needs_kvpress
def test_a_prompt_too_short_for_a_press_is_named():
    model = tiny.llava()
    with vtoken.wrapped(model, [{"kvpress": {"press": "SnapKVPress", "compression_ratio": 0.5}}]):
        with pytest.raises(ValueError, match="cannot compress a prompt of 24 tokens"):
            greedy(model, tiny.build(model, ROWS[:1], seed=3))


@needs_kvpress
def test_presses_that_number_tokens_need_plain_positions():
    stage = {"press": "ExpectedAttentionPress", "compression_ratio": 0.5}
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [{"kvpress": stage}]):
        greedy(model, tiny.build(model, ROWS[:1], seed=3))
    for pruned, before in ((model, [{"random": {"keep": 5}}]), (tiny.make("qwen2_vl"), [])):
        with vtoken.wrapped(pruned, [*before, {"kvpress": stage}]), pytest.raises(ValueError, match="numbers tokens"):
            greedy(pruned, tiny.build(pruned, ROWS, seed=3) if before == [] else batch)
