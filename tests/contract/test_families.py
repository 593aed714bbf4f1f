"""Every family: wrapped generate equals a full recomputation over the kept tokens, whatever the pictures, sites and
policies."""

from __future__ import annotations

import pytest
import smaller
import tiny
import torch
import usual
from against_oracle import compare
from batches import BATCHES, inside, rows_for
from probes import Deep, Inside, InsideMerge, Ragged

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.hooks.vision.pixel_stages import resizes
from vtoken.stages import Pruner

PIPELINES = {
    "fastervlm": [{"fastervlm": {"keep": 5}}],
    "random then ragged": [{"random": {"keep": "60%"}}, Ragged()],
    "pool": [{"pool": {"size": 2}}],
    "per segment": [{"fastervlm": {"keep": {"per_frame": 2}}}, {"uniform": {"keep": {"per_crop": 3}}}],
    "inside": [Inside(at=(1,))],
    "inside twice, then ragged": [Inside(at=(0, 1)), Ragged()],
    "merged inside": [InsideMerge(at=(1,))],
    "deep": [Deep(at=(1, 3), factor=0.9)],
    "everywhere": [Inside(at=(1,)), {"pool": {"size": 2}}, Deep()],
}
families = pytest.mark.parametrize("family", tiny.FAMILIES)


@families
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("stages", PIPELINES)
def test_equals_recomputation(family, rows, stages):
    if rows_for(family, rows) is None:
        pytest.skip("takes no video")
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    pipeline = {"stages": inside(family, PIPELINES[stages])}
    trace = compare(model, batch, pipeline)
    assert stages == "inside" or sum(trace.layers[-1]) < sum(trace.visual_tokens)
    for before, after in zip(trace.stages, trace.stages[1:], strict=False):
        assert after.tokens_in == before.tokens_out


@families
@pytest.mark.parametrize("stages", ["fastervlm", "everywhere"])
def test_eager_and_compact(family, stages):
    model = tiny.make(family, "eager")
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    stages = inside(family, PIPELINES[stages])
    if tiny.family(family).mrope:
        with pytest.raises(UnsupportedError, match="M-RoPE"):
            vtoken.wrap(model, {"positions": "compact", "stages": stages})
        compare(model, batch, {"stages": stages})
    else:
        compare(model, batch, {"positions": "compact", "stages": stages})


@pytest.mark.parametrize("family", tiny.families(anyres=True))
@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("stages", ["fastervlm", "deep"])
def test_newline_policies(family, newline, stages):
    model = tiny.make(family)
    rows = rows_for(family, "video and image" if family in tiny.VIDEO else "ragged")
    compare(model, tiny.build(model, rows, seed=3), {"newline": newline, "stages": PIPELINES[stages]})


@families
@pytest.mark.parametrize("rows", ["ragged", "video and image"])
@pytest.mark.parametrize(
    "stages", [[{"fastervlm": {"keep": "100%"}}], [{"pool": {"size": 1}}], [Deep(factor=-1.0)]], ids=str
)
def test_keeping_everything_is_the_identity(family, rows, stages):
    if rows_for(family, rows) is None:
        pytest.skip("takes no video")
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**batch, **options)
    with vtoken.wrapped(model, stages):
        got = model.generate(**batch, **options)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"
    assert torch.equal(torch.stack(model.generate(**batch, **options).logits), torch.stack(want.logits)), "unwrapped"


@families
@pytest.mark.parametrize("name", [name for name in usual.ALONE if registry.stage(name).site != "cache"])
def test_every_stage_runs(family, name):
    model = tiny.make(family)
    stage = usual.stage(name, seed=18)
    rows = (
        "video and image"
        if family in tiny.VIDEO
        and (
            name in ("dycoke", "evs", "fastvid", "flashvid", "holitom", "prunevid", "vidcom2") or stage.site == "frames"
        )
        else "ragged"
    )
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    if stage.site == "frames" and family not in tiny.VIDEO:
        with pytest.raises(UnsupportedError, match=f"{family} takes none"):
            vtoken.wrap(model, stage)
        return
    if stage.site == "pixels" and not tiny.family(family).grouped:
        with pytest.raises(UnsupportedError, match="acts on pixels before the vision tower"):
            vtoken.wrap(model, stage)
        return
    if stage.site == "pixels" and resizes(stage):
        smaller.compare(model, batch, [stage], new=3)
        return
    if stage.site == "attention" and tiny.family(family).both_ways:
        with pytest.raises(UnsupportedError, match="both ways"):
            vtoken.wrap(model, stage)
        return
    if stage.site == "decode" and tiny.family(family).window:
        with pytest.raises(UnsupportedError, match="sliding windows"):
            vtoken.wrap(model, stage)
        return
    if stage.merge_point() and tiny.family(family).unit > 1:
        with pytest.raises(UnsupportedError, match="neighbouring patches"):
            vtoken.wrap(model, stage)
        return
    if usual.needs_attention(stage) & set(tiny.family(family).states):
        with pytest.raises(UnsupportedError, match="keep a state"):
            vtoken.wrap(model, stage)
        return
    if stage.clears_earlier_layers() and tiny.family(family).window is not None:
        with pytest.raises(UnsupportedError, match="retroactive: false"):
            vtoken.wrap(model, stage)
        return
    compare(model, batch, {"stages": [stage]}, new=3, weighted=True)


def test_deepstack_features_of_merged_tokens_are_averaged():
    """Features tapped before the merge are means over the members; those tapped after it are the merged token's own."""
    model = tiny.make("qwen3_vl")
    batch = tiny.build(model, [[3, "img", 5], [1, ("img", (1, 8, 4)), 2]], seed=3)
    images = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    seen = {}
    with vtoken.wrapped(model, [InsideMerge(at=(0,))]), torch.no_grad():
        hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
        model(**batch)
        hook.remove()
        kept, into = vtoken.trace(model).kept, vtoken.trace(model).stages[0].into
        before, after = (
            torch.cat(list(d)) if not torch.is_tensor(d) else d
            for d in model.model.get_image_features(**images, return_dict=True).deepstack_features
        )
    want, start = [], 0
    for k, i in zip(kept, into, strict=True):
        want += [before[start : start + len(i)][i == j].mean(0) for j in k.tolist()]
        start += len(i)
    torch.testing.assert_close(seen["deepstack_visual_embeds"][0], torch.stack(want))
    torch.testing.assert_close(seen["deepstack_visual_embeds"][1], after[after.any(-1)])


@pytest.mark.parametrize("family", tiny.families(varlen=False))  # Qwen closes a picture with a text token
@pytest.mark.parametrize("rows", [[[3, "img"]], [[2, "img", 1, "img"], [9]]], ids=["one", "ragged"])
def test_a_prompt_may_end_in_a_picture(family, rows):
    """Its last token may be dropped: the answer then follows the last one that is left."""
    model = tiny.make(family)
    batch = tiny.build(model, rows, seed=3)
    compare(model, batch, {"stages": [First(keep=3)], "newline": "drop"}, new=3)


class First(Pruner):
    """Keeps the first tokens of every image. No paper."""

    def score(self, tokens):
        return -tokens.raster_index.float()
