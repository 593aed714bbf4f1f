"""Conversations on every family: a turn on the returned cache equals the oracle over the kept tokens of all turns."""

from __future__ import annotations

import modes
import oracle
import pytest
import tiny
import torch
from modes import STAGES, every, greedy
from turns import IMAGE_TURNS, TURNS, both, conversation, second

import vtoken
from vtoken.errors import UnsupportedError

NEW = 4


@every
@pytest.mark.parametrize("rows", TURNS.values(), ids=TURNS)
def test_second_turn(family, pipeline, rows):
    model, pipeline = tiny.make(family), STAGES[pipeline]
    first, turn = tiny.build(model, rows[0], seed=3), tiny.build(model, rows[1], seed=9)
    image = tiny.family(family).pixels in turn
    fed, stages = [], []
    with vtoken.wrapped(model, pipeline):
        a = greedy(model, first, NEW, return_dict_in_generate=True)
        stages.append(vtoken.trace(model).stages)
        whole, order = conversation(model, first, turn, a.sequences)
        more = second(model, whole, turn)
        if image and modes.mrope(model) and not IMAGE_TURNS:
            with pytest.raises(UnsupportedError, match="M-RoPE"):
                greedy(model, more, NEW, past_key_values=a.past_key_values)
            return
        hook = (
            model.get_decoder()
            .layers[0]
            .register_forward_pre_hook(
                lambda m, a, k: fed.append((a[0] if a else k["hidden_states"]).shape[1]), with_kwargs=True
            )
        )
        options = {"return_dict_in_generate": True, "output_logits": True}
        b = greedy(model, more, NEW, past_key_values=a.past_key_values, **options)
        hook.remove()
        stages.append(vtoken.trace(model).stages if image else [])
    # The last generated token was never cached, so it is fed with the turn.
    assert fed[0] <= turn["input_ids"].shape[1] + 1
    p = oracle.prompt(model, whole)
    merged = [both(each, order) for each in zip(*(s for s in stages if s), strict=True)]
    got = torch.stack(b.logits)
    want = modes.forced(model, p, merged, b.sequences[:, -NEW:], pipeline.get("positions") == "compact")
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.families(mrope=True))
def test_images_with_positions_of_text_are_refused(family):
    """Without mm_token_type_ids, transformers numbers Qwen's image tokens as a line of text and says nothing."""
    model = tiny.make(family)
    batch = tiny.build(model, modes.ROWS, seed=3)
    types = batch.pop("mm_token_type_ids")
    model.generate(**batch, max_new_tokens=1)
    with vtoken.wrapped(model, "random:3"):
        with pytest.raises(UnsupportedError, match="mm_token_type_ids"):
            model.generate(**batch, max_new_tokens=1)
        model.generate(**batch, mm_token_type_ids=types, max_new_tokens=1)
