"""What is shown of pictures that a stage made smaller, and where the baseline stands in the demo."""

from __future__ import annotations

import tiny
import torch
from PIL import Image
from tiny_processors import processor

import vtoken
from vtoken.evals.pictures.demo_pipelines import choose
from vtoken.evals.pictures.traced import as_resized, for_page
from vtoken.evals.shared.media import Media

FAMILY = tiny.families(grouped=True)[0]


def test_what_stays_of_a_smaller_picture_is_drawn_on_it() -> None:
    """Of 4 x 8 tokens 2 x 4 are left, then the last two of either row, then the first in each pair stands for both."""
    model = tiny.make(FAMILY)
    picture = Image.new("RGB", (224, 112))
    batch = tiny.build(model, [[2, ("img", (1, 8, 16)), 3]], seed=3)
    with vtoken.wrapped(model, [{"resize": {"keep": "25%"}}]):
        model.generate(**batch, max_new_tokens=1)
        trace = vtoken.trace(model)
    assert trace.stages[0].resized == [(1, 2, 4)] and trace.kept[0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    (view,), parts, kept, into = as_resized(trace, 0, [picture])
    assert view.size == (112, 56) and parts == ((1, 2, 4),) and list(kept) == list(range(8)) and into is None
    with vtoken.wrapped(model, [{"resize": {"keep": "25%"}}, {"pool": {"size": 2}}]):
        model.generate(**batch, max_new_tokens=1)
        trace = vtoken.trace(model)
    _, _, kept, into = as_resized(trace, 0, [picture])
    assert list(kept) == [0, 2] and into == [0, 0, 2, 2, 0, 0, 2, 2]
    (page,) = for_page(processor(FAMILY), {}, Media((picture,), video=False), trace, 1)
    assert page.width == 2 * page.height
    with vtoken.wrapped(model, [{"pool": {"size": 2}}]):
        model.generate(**batch, max_new_tokens=1)
        assert as_resized(vtoken.trace(model), 0, [picture])[:2] == ([picture], ((1, 4, 8),))


def test_the_demo_compares_with_it_where_it_can() -> None:
    prompt = {"input_ids": torch.ones(1, 1)}
    found = choose(tiny.make(FAMILY), prompt, [64, 32])
    assert {"resize:64", "resize:32", "random:32"} <= {*found.pipelines} and not found.left_out
    found = choose(tiny.make(tiny.families(varlen=False, anyres=False, window=None)[0]), prompt, [64, 32])
    assert "resize:64" not in found.pipelines and "pool averages" in found.left_out["resize"]
