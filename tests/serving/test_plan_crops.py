"""Placeholders of pictures that are cut into crops, and of videos with a newline, as planned: those that a wrapped
model of transformers has left."""

from __future__ import annotations

import pytest
import tiny
import torch

import vtoken
from vtoken import config
from vtoken.serving import plan

# Whole crops, padding on either side, thinner than a patch; of OneVision's tiny model the last ones are scaled down.
SIZES = ((56, 112), (112, 56), (100, 60), (30, 100), (300, 40), (3, 112), (112, 4), (77, 333), (112, 112), (101, 99))
FRAMES = (1, 2, 5)
STAGES = {
    "a count": ["fastervlm:10"],
    "more than there is": ["fastervlm:999"],
    "a share": ["divprune:25%"],
    "per crop": [{"fastervlm": {"keep": {"per_crop": 3}}}],
    "per frame": [{"fastervlm": {"keep": {"per_frame": 3}}}],
    "merging": [{"visionzip": {"keep": {"per_crop": 5}, "heads": 4}}],
    "two stages": [{"uniform": {"keep": {"per_crop": 9}}}, {"fastervlm": {"keep": {"per_crop": 2}}}],
    "per frame, then a count": [{"uniform": {"keep": {"per_frame": 2}}}, "fastervlm:7"],
}


@pytest.fixture(scope="module", params=tiny.families(anyres=True, served=True))
def model(request):
    return tiny.make(request.param)


@pytest.mark.parametrize("least", [0, 24])
@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("stages", STAGES)
def test_what_is_planned_is_left(model, stages, newline, least):
    written = {"positions": "compact", "newline": newline, "stages": STAGES[stages], "min_visual_tokens": least}
    pipeline, family = config.load(written), model.config.model_type
    plan.check(pipeline, family)
    adapter, videos = tiny.adapter(model), FRAMES if tiny.family(family).takes_video else ()
    resized = set()
    for item in [*(("img", size) for size in SIZES), *(("video", n) for n in videos)]:
        batch = tiny.build(model, [[2, item, 3]])
        (layout,) = adapter.layouts("image" if item[0] == "img" else "video", batch)
        resized |= {layout.interpolated} if item[0] == "img" else set()
        with vtoken.wrapped(model, pipeline), torch.inference_mode():
            model(**batch)
            trace = vtoken.trace(model)
        assert trace.prompt_tokens[0] - 5 == plan.placeholders(pipeline, layout), item
        assert sum(map(len, trace.stages[-1].kept)) == plan.kept(pipeline, layout), item
    assert resized == ({False, True} if hasattr(model.config, "vision_aspect_ratio") else {False})
