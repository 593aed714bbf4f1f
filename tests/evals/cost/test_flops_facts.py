"""What facts inside the decoder cost, against torch's FlopCounterMode on whole prefills with and without the stage that
asks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from flop_counts import MODELS, Pipe, counted
from modes import VERSION
from packaging.version import Version
from watchers import First, Watcher

import vtoken
from vtoken.evals.cost.flops import LEFT_OUT, account
from vtoken.stages import FACTS, Fact, spec_of

TEXT = 9
PICTURE = 16


class All(Watcher):
    """All text behind an image rates it; what it is given is forgotten. No paper."""

    def query_tokens(self, tokens: Any) -> list[torch.Tensor]:
        return [torch.arange(len(text)) for text in tokens.facts[Fact("later_text")]]

    def select(self, tokens: Any) -> Any:
        self.seen.clear()
        return super().select(tokens)


class Half(First):
    """The plan of First. No paper."""

    def expected_counts(self, lengths: Any, parts: Any, row: Any, layer: int | None = None) -> tuple[int, ...]:
        return tuple(n - n // 2 for n in lengths)


NAMES = [spec.name for spec in FACTS if "decoder" in spec.sites]


@pytest.mark.parametrize("fact", NAMES)
@pytest.mark.parametrize("text", ["llama", "wide heads", "qwen3"])
@pytest.mark.parametrize("images", [1, 2])
def test_facts_inside_the_decoder(fact: str, text: str, images: int) -> None:
    """All text stands behind the pictures, so that the account's upper bound is the truth. The cut in front leaves
    fewer tokens."""
    model = tiny.llava(**MODELS[text])
    batch = tiny.build(model, [[*["img"] * images, TEXT]], seed=3)
    # The cut at layer 2 comes first, so that a stage there asks about fewer tokens than enter the layer.
    plain, asking = (Half(at=2),), (Half(at=2), All(at=(2, 3), asks=(fact,), seen={}))
    costs = []
    for stages in (plain, asking):
        with vtoken.wrapped(model, list(stages)):
            costs.append(counted(lambda: model(**batch, logits_to_keep=1)))
    text_tokens = batch["input_ids"].shape[1] - images * PICTURE
    claimed = account(model.config, Pipe(asking), images=images, text_tokens=text_tokens, new_tokens=1)
    assert claimed.visual_tokens == tuple(images * n for n in (PICTURE, PICTURE, PICTURE // 2, PICTURE // 2))
    # RoPE is a matrix product up to transformers 5.17, and not counted.
    rope = 1e-3 * costs[0] if fact in ("mean_cos", "mean_sin") and VERSION < Version("5.18") else 0
    assert claimed.stages == pytest.approx(costs[1] - costs[0], rel=0, abs=rope)
    assert claimed.left_out == LEFT_OUT
    assert bool(claimed.stages) == bool(spec_of(fact, "decoder").queries)
