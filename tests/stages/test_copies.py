"""Copies of stages with other options."""

from __future__ import annotations

from functools import cached_property

import pytest
from usual import ALONE, stage

from vtoken import registry
from vtoken.compressors.cache.streaming_cache import StreamingCache

GATES = ((0.9, 0.1), (0.2, 0.3))


def test_what_was_worked_out_of_an_option_is_worked_out_anew() -> None:
    made = StreamingCache(gates=GATES, sparsity=0.25)
    assert [made.streams(k) for k in range(2)] == [(False, True), (False, False)]
    assert made.model_copy(update={"sparsity": 1.0}).streams(1) == (True, True)
    assert made.model_copy(update={"gates": None}).streams(1) is None
    assert made.model_copy(update={"sparsity": 1.0}, deep=True) == StreamingCache(gates=GATES, sparsity=1.0)


def works_out(cls: type) -> bool:
    return any(isinstance(getattr(cls, name, None), cached_property) for name in dir(cls))


@pytest.mark.parametrize("name", [name for name in ALONE if works_out(registry.stage(name))])
def test_a_changed_copy_is_like_a_new_stage(name: str) -> None:
    made = stage(name)
    fresh = vars(type(made)(**{option: getattr(made, option) for option in made.model_fields_set})).keys()
    made.layers(4), made.incompatibility(4, 32)
    changed, same = made.model_copy(update={}), made.model_copy(update=dict(made))
    assert vars(changed).keys() == vars(made).keys(), "what was read once is not read again without need"
    assert vars(same).keys() <= fresh
