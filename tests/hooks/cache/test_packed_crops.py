"""Caches in few bits that are cropped."""

from __future__ import annotations

import tiny
import torch
from modes import LOGITS, ROWS, greedy
from rounded_cache import both, recording, some
from transformers import DynamicCache

import vtoken


@some
def test_crops_of_the_whole_cache(family):
    """Into the tail, and on into what was packed, whose tokens are all there."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:2], seed=3)

    def run():
        cache = greedy(model, batch, 5, **LOGITS).past_key_values
        cache.crop(-6)
        return cache.get_seq_length(), cache.layers[3].keys

    (length, got), (wide, want) = both(model, run)
    assert length == wide == batch["input_ids"].shape[1] - 2 and torch.equal(got, want)


def test_nothing_is_left_of_what_was_packed():
    """Then what is generated stays at full precision, too."""
    model = tiny.make("llava")
    stage, calls = recording(every=3)
    with vtoken.wrapped(model, [stage]), torch.no_grad():
        cache = model(**tiny.build(model, ROWS[:1], seed=3)).past_key_values
        cache.crop(-cache.get_seq_length())
        stock = DynamicCache(config=model.config)
        for n in (4, 1, 1):
            text = torch.full((1, n), 7)
            got, want = (model(input_ids=text, past_key_values=past).logits for past in (cache, stock))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert not calls
