"""A digit in one frame of many: what is drawn, and that it can be found."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from reference_models.needle import DEPTHS, LENGTHS, SIDE, needle
from reference_models.pictures import COLOURS, picture
from vtoken.errors import ConfigError
from vtoken.evals import reference


def test_the_same_needle_is_drawn_again_and_no_other_is_like_it() -> None:
    one, again, others = needle(3, 50, 0), needle(3, 50, 0), (needle(3, 50, 1), needle(3, 0, 0), needle(4, 50, 0))
    assert (one.question, one.answer, one.place) == (again.question, again.answer, again.place)
    assert [f.tobytes() for f in one.frames] == [f.tobytes() for f in again.frames]
    for other in others:
        assert one.frames[0].tobytes() != other.frames[0].tobytes()


@pytest.mark.parametrize("length", [1, 2, *LENGTHS[:2]])
def test_the_digit_stands_at_its_depth(length: int) -> None:
    for depth in DEPTHS:
        found = needle(length, depth, 1)
        assert len(found.frames) == length and {frame.size for frame in found.frames} == {(SIDE, SIDE)}
        assert abs(found.place - depth / 100 * (length - 1)) <= 0.5
        # No photograph is as bright as a digit: they are dimmed to 0.6 at most.
        bright = [int((np.asarray(frame).max(-1) > 160).sum()) for frame in found.frames]
        assert bright[found.place] > 20 and not any(n for k, n in enumerate(bright) if k != found.place)


def test_questions_ask_for_digit_and_colour_in_turn() -> None:
    digit, colour = needle(2, 0, 0), needle(2, 0, 1)
    assert digit.question.startswith("what digit is ") and digit.answer.isdigit()
    assert colour.question.startswith("what color is the ") and colour.answer in COLOURS


def test_a_picture_without_digits() -> None:
    bare = picture(np.random.RandomState(0), "test", SIDE, (0, 0))
    assert bare.glyphs == () and bare.ink.shape == (0, SIDE // 8, SIDE // 8)


def test_the_task_says_where_the_generator_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert reference.needles().needle is sys.modules["reference_models.needle"].needle
    monkeypatch.setattr(reference, "_REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="root of a checkout"):
        reference.needles()
