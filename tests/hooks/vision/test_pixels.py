"""Stages that act on pixels before the vision tower, inside models: every family whose tower takes pictures of any
size."""

from __future__ import annotations

from typing import Any

import pytest
import smaller
import tiny
import torch
from batches import inside, suited
from probes import Deep, Inside, Ragged

FAMILIES = tiny.families(varlen=True, by_rows=False)
families = pytest.mark.parametrize("family", FAMILIES)
PICTURES = [[3, ("img", (1, 8, 12)), 5, ("img", (1, 4, 4)), 6], [1, ("img", (1, 8, 8)), 2], [4]]
WITH_VIDEOS = [[2, ("video", 3, 8, 12), 3, ("img", (1, 8, 8)), 1], [1, ("img", (1, 4, 12)), 6, ("video", 2, 4, 4), 2]]
RESIZE = {"resize": {"keep": "30%"}}
BEHIND: dict[str, list[Any]] = {
    "nothing": [],
    "frames": [{"frames_uniform": {"keep": 1}}],
    "encoder": [Inside(at=(1,))],
    "tokens": [{"fastervlm": {"keep": 2}}, Ragged()],
    "pooled": [{"pool": {"size": 2}}],
    "deep": [Ragged(), Deep()],
    "cache": [{"snapkv": {"keep": 2, "window": 2}}],
}


@families
@pytest.mark.parametrize("rows", [PICTURES, WITH_VIDEOS], ids=["pictures", "videos"])
@pytest.mark.parametrize("stages", BEHIND)
def test_a_resized_prompt_is_that_of_the_smaller_pictures(family: str, rows: list[Any], stages: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, suited(family, rows), seed=3)
    trace = smaller.compare(model, batch, [RESIZE, *inside(family, BEHIND[stages])])
    first = trace.stages[0]
    assert first.name == "resize" and sum(first.tokens_out) < sum(first.tokens_in) / 2
    assert all(stage.tokens_in == first.tokens_out for stage in trace.stages[1:2])
