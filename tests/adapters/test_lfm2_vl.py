"""LFM2-VL: sizes of its pictures, what is refused, and the account where crops are padded."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from flop_counts import Quiet, counted
from torch import Tensor

import vtoken
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account
from vtoken.evals.cost.geometry import geometry
from vtoken.evals.cost.geometry.lfm2_vl import rasters
from vtoken.evals.shared.configs import resolve_config
from vtoken.evals.speed.inputs import random_prompt
from vtoken.stages import VisualTokens
from vtoken.stages.budget import Budget

WHOLE = (1, 16, 16)


class Half(Quiet):
    """The longest vectors stay."""

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.x.norm(dim=-1)


@pytest.mark.parametrize(
    ("size", "crops"),
    [
        (512, ((1, 16, 16),)),
        ((256, 384), ((1, 8, 12),)),
        ((32, 64), ((1, 6, 12),)),  # enlarged to 64 tokens at least
        ((640, 800), ((1, 14, 17),)),  # 500 tokens are scaled down, not cut
        ((1024, 1024), (WHOLE,) * 4 + ((1, 16, 16),)),
        ((600, 2000), (WHOLE,) * 3 + ((1, 8, 29),)),
        ((3000, 1000), (WHOLE,) * 3 + ((1, 27, 9),)),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_processor(size: Any, crops: Any) -> None:
    """As `Lfm2VlImageProcessor` of transformers 5.23 gave them."""
    assert rasters(resolve_config("LiquidAI/LFM2-VL-450M"), size) == crops


@pytest.mark.parametrize("family", tiny.families(crops_sized=True))
@pytest.mark.parametrize("size", [(84, 112), (112, 112), (300, 150), (40, 300)], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_padding_is_counted_until_something_leaves(family: str, size: Any, images: int) -> None:
    """Crops of a picture need not be equal, and rows are as long as the fullest: exact, whatever the sizes."""
    model = tiny.make(family)
    prompt = random_prompt(tiny.adapter(model), batch=2, images=images, image_size=size, text_tokens=40)
    told: Any = {"image_size": size, "text_tokens": 40, "new_tokens": 1, "images": images, "batch": 2}
    dense, half = Pipeline("dense", "original", ()), Pipeline("half", "original", (Half(keep=Budget("50%")),))
    found = {}
    for pipeline in (dense, half):
        claimed = account(model.config, pipeline, **told)
        with vtoken.wrapped(model, pipeline):
            flops = counted(lambda: model.generate(**prompt.inputs, max_new_tokens=1, do_sample=False))
        assert claimed.total == flops and not claimed.inexact
        found[pipeline.name] = claimed.tower
    assert found["half"] < found["dense"]


def test_other_parts_are_refused() -> None:
    model: Any = tiny.make("lfm2_vl")
    with pytest.raises(UnsupportedError, match="wrap the whole VLM"):
        vtoken.wrap(model.model.language_model, "uniform:4")
    model.config.text_config.model_type = "lfm2_moe"
    with pytest.raises(UnsupportedError, match="'siglip2_vision_model' and 'lfm2_moe' is not supported"):
        vtoken.wrap(model, "uniform:4")
    with pytest.raises(UnsupportedError, match="no FLOPs account for lfm2_vl with"):
        geometry(model.config)
