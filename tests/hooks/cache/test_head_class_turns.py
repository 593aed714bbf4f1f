"""Key heads in classes over several turns, against a dense model that masks what heads have dropped."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from modes import LOGITS, ROWS, greedy, mrope, whole
from streaming import expected, stage
from turns import IMAGE_TURNS, conversation, second

import vtoken
from vtoken.errors import UnsupportedError

some = pytest.mark.parametrize("family", tiny.each("anyres", "mrope", "states", window=None))


@whole
@pytest.mark.parametrize("name", ["all", "whole prompt", "gates"])
@pytest.mark.parametrize("more", [[[5], [3]], [[3, "img", 2], [1, "img", 2]]], ids=["text", "image"])
def test_second_turn(family, name, more):
    """A turn of text reads as if its tokens came one by one; one with pictures reads what is left, and itself."""
    model = tiny.make(family)
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, more, seed=9)
    pictures = tiny.family(family).pixels in turn
    if pictures and mrope(model) and not IMAGE_TURNS:
        pytest.skip("older transformers numbers a new image as text")
    one, n = stage(model, name), 9
    with vtoken.wrapped(model, [one]):
        a = greedy(model, first, n, **LOGITS)
        whole, _ = conversation(model, first, turn, a.sequences)
        b = greedy(model, second(model, whole, turn), n, past_key_values=a.past_key_values, **LOGITS)
    p, length = oracle.prompt(model, whole), first["input_ids"].shape[1]
    for row in range(2):
        real = p.mask[row]
        visual = p.visual[row]
        ends = [length, length + n - 1, visual.shape[0]]
        parts = [
            (visual[a:b][real[a:b]].tolist(), kind)
            for a, b, kind in zip([0, *ends], ends, (True, False, pictures), strict=False)
        ]
        want = expected(model, p, row, b.sequences[row, -n:].tolist(), one, parts)
        torch.testing.assert_close(torch.stack(b.logits)[:, row], want, atol=3e-4, rtol=1e-4)


@some
def test_a_picture_after_a_turn_of_text(family):
    """What was there before any picture stays."""
    model, n = tiny.make(family), 9
    if mrope(model) and not IMAGE_TURNS:
        pytest.skip("older transformers numbers a new image as text")
    first, turn = tiny.build(model, [[6], [4]], seed=3), tiny.build(model, [[3, "img", 2], [1, "img", 2]], seed=9)
    one = stage(model)
    with vtoken.wrapped(model, [one]):
        a = greedy(model, first, n, **LOGITS)
        whole, _ = conversation(model, first, turn, a.sequences)
        b = greedy(model, second(model, whole, turn), n, past_key_values=a.past_key_values, **LOGITS)
    p = oracle.prompt(model, whole)
    for row in range(2):
        want = expected(model, p, row, b.sequences[row, -n:].tolist(), one)
        torch.testing.assert_close(torch.stack(b.logits)[:, row], want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.each("anyres", window=None))
def test_a_later_picture_where_other_stages_read_the_cache(family):
    """What reads the attention of new tokens goes on; what reads keys of earlier turns is refused; thinning says that
    it stands aside."""
    model, n = tiny.make(family), 3
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, [[3, "img", 2], [1, "img", 2]], seed=9)

    def two_turns(*before):
        with vtoken.wrapped(model, [*before, stage(model, "gates")]):
            a = greedy(model, first, n, **LOGITS)
            whole, _ = conversation(model, first, turn, a.sequences)
            greedy(model, second(model, whole, turn), n, past_key_values=a.past_key_values)
            return vtoken.trace(model)

    kept = two_turns({"fastv": {"keep": 5, "layer": 2}})
    assert kept.layers[-1] == [5, 5]
    thin = {"static_sparse": {"sink": 4, "window": 8, "size": 16, "min_len": 0}}
    assert "heads in classes" in two_turns(thin).aside["static_sparse"]
    with pytest.raises(UnsupportedError, match="leave out the stage that puts heads in classes"):
        two_turns({"pyramiddrop": {}})
