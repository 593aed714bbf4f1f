"""Decoders some of whose layers see a window of the prompt: after pruning it reaches further back and hides nothing."""

from __future__ import annotations

import modes
import pytest
import tiny
import torch
import usual
from against_oracle import compare
from batches import BATCHES, rows_for
from modes import greedy
from probes import Deep, Ragged

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.layer_kinds import layer_mask

SLIDING = tiny.families(window=12)
TEXTS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
}
THINNING = [
    n for n in registry.stages() if registry.stage(n).site in ("attention", "cache", "decode") and n != "kvpress"
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stages", [[{"fastervlm": {"keep": 5}}], [Ragged(), Deep()]], ids=["tokens", "deep"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_other_decoders_that_slide(text, stages, attn):
    model = tiny.llava(attn, text=text, **TEXTS[text])
    batch = tiny.build(model, rows_for("llava", "ragged"), seed=3)
    with pytest.warns(UserWarning, match="sliding windows of 8"):
        compare(model, batch, {"stages": stages})


@pytest.mark.parametrize(("text", "seed"), [("mistral", 11), ("qwen2", 9)])  # rows keep different numbers of tokens
def test_rows_of_later_turns_see_as_many_tokens_as_alone(text, seed):
    """Rows that keep different numbers of tokens are padded between the turns, which takes no room in a window."""
    model = tiny.llava(text=text, **TEXTS[text])
    first = tiny.build(model, [[6], [6]], seed=3)
    turn = tiny.build(model, [[3, "img", 2], [3, "img", 2]], seed=seed)
    logits = []
    with vtoken.wrapped(model, [Ragged()]):
        for rows in ([0, 1], [0], [1]):
            a = greedy(model, {k: v[rows] for k, v in first.items()}, 2, return_dict_in_generate=True)
            ids = torch.cat([a.sequences, turn["input_ids"][rows]], 1)
            more = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": turn["pixel_values"][rows],
            }
            out = greedy(model, more, 4, past_key_values=a.past_key_values, **modes.LOGITS)
            logits.append(torch.stack(out.logits, 1))
            kept = vtoken.trace(model).tokens_out
            assert len(rows) == 1 or len(set(kept)) == 2, "ragged"
    torch.testing.assert_close(logits[0], torch.cat(logits[1:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("name", THINNING)
def test_what_thins_attention_is_refused(family, name):
    with pytest.raises(UnsupportedError, match=r"both ways|sliding windows"):
        vtoken.wrap(tiny.make(family), usual.stage(name, seed=18))


@pytest.mark.parametrize("family", SLIDING)
def test_one_warning_where_something_is_dropped(family):
    model = tiny.make(family)
    with pytest.warns(UserWarning) as said:
        vtoken.wrap(model, "fastervlm:3")
        model.generate(**tiny.build(model, BATCHES["one"]), max_new_tokens=2)
    assert len([w for w in said if "sliding windows of 12" in str(w.message)]) == 1


def test_static_caches_of_nothing_but_windows_are_refused():
    model = tiny.llava(text="mistral", sliding_window=8)
    with vtoken.wrapped(model, "fastervlm:3"), pytest.raises(UnsupportedError, match="dynamic cache"):
        greedy(model, tiny.build(model, BATCHES["one"]), 2, cache_implementation="static")


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_masks_against_their_definition(window, blocks):
    """Padding on the left and in between, earlier slots, two images."""
    kinds = "full_attention" if window is None else "sliding_attention"
    config = tiny.llava(text="qwen2").model.language_model.config
    config.layer_types, config.sliding_window = [kinds] * 4, window
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1, 1]])
    number = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, -1], [0, 0, 0, -1, -1, 1, 1, -1, -1]])
    got = layer_mask(config, 0, torch.zeros(2, 9, 4), real, None, number if blocks else None)[:, 0]
    rank = real.cumsum(1)
    for row in range(2):
        for q in range(9):
            for k in range(9):
                both = blocks and number[row, q] == number[row, k] >= 0
                near = window is None or rank[row, k] > rank[row, q] - window
                want = bool(real[row, k]) and bool(near) and (k <= q or bool(both))
                assert not real[row, q] or bool(got[row, q, k]) == want, (row, q, k)
