"""Static caches and padded prompts: the masks that `generate` makes tell of slots, from which logical padding cannot be
read."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from modes import LOGITS, greedy
from probes import Deep, Ragged
from transformers import StaticCache
from turns import IMAGE_TURNS, conversation, second

import vtoken

STAGES = {"even": [{"uniform": {"keep": 1}}], "ragged": [Ragged()], "deep": [Ragged(), Deep()]}
pipelines = pytest.mark.parametrize("pipeline", STAGES)
TURNS = {
    "text": ([[3, "img", 5], [1, "img", 7]], [[5], [5]]),
    "even text": ([["img", 3], ["img", 3]], [[9], [3]]),
    "long text": ([["img", 2], ["img", 7]], [[30], [30]]),
    "image": ([["img", 2], ["img", 7]], [[3, "img", 2], [3, "img", 2]]),
    "first image": ([[6], [4]], [[3, "img", 2], [3, "img", 2]]),
    "shorter image": ([["img", "img", 3], ["img", 2]], [[3, "img", 2], [3, "img", 2]]),
}


def logits(out: Any) -> torch.Tensor:
    return torch.stack(out.logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_that_padding_told_apart_and_pruning_made_equal(family: str) -> None:
    """No slot is padding any more, but the masks of `generate` still hide as many as there were."""
    model = tiny.make(family)
    rows: list[list[Any]] = [["img", "img", 2], ["img", 2]]
    with vtoken.wrapped(model, [{"uniform": {"keep": 1}}]):
        greedy(model, tiny.build(model, rows, seed=3), 1)
        lengths = vtoken.trace(model).prompt_tokens
        rows[1][1] += lengths[0] - lengths[1]
        batch = tiny.build(model, rows, seed=3)
        want = greedy(model, batch, **LOGITS)
        assert len(set(vtoken.trace(model).prompt_tokens)) == 1 and not batch["attention_mask"].all()
        got = greedy(model, batch, cache_implementation="static", **LOGITS)
    torch.testing.assert_close(logits(got), logits(want), atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.families(window=None))
@pipelines
@pytest.mark.parametrize("rows", TURNS)
def test_later_turns(family: str, rows: str, pipeline: str) -> None:
    """As on a dynamic cache; the shorter row of a turn ends in padding."""
    if "image" in rows and not IMAGE_TURNS and tiny.family(family).mrope:
        pytest.skip("transformers gives new pictures on a cache the positions of text")
    model = tiny.make(family)
    first, turn = (tiny.build(model, r, seed=s) for r, s in zip(TURNS[rows], (3, 9), strict=True))
    found = []
    with vtoken.wrapped(model, STAGES[pipeline]):
        for cache in (None, StaticCache(config=model.config.get_text_config(), max_cache_len=160)):
            a = greedy(model, first, 3, return_dict_in_generate=True, past_key_values=cache)
            whole, _ = conversation(model, first, turn, a.sequences)
            more = second(model, whole, turn)
            more["attention_mask"][:, -turn["attention_mask"].shape[1] :] = turn["attention_mask"].flip(1)
            found.append(logits(greedy(model, more, 4, past_key_values=a.past_key_values, **LOGITS)))
    torch.testing.assert_close(found[1], found[0], atol=3e-4, rtol=1e-4)
