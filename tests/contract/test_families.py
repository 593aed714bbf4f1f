"""Every family: wrapped generate equals a full recomputation over the kept tokens, whatever the pictures, sites and policies."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
import usual
from probes import Deep, Inside, InsideMerge, Ragged

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.stages import Pruner

NEW = 6
IMAGES = {
    "llava": "img",
    "llava_next": ("img", (50, 100)),
    "llava_onevision": ("img", (112, 112)),
    "qwen2_vl": ("img", (1, 8, 4)),
    "qwen2_5_vl": ("img", (1, 8, 12)),
    "qwen3_vl": ("img", (1, 4, 4)),
}
QWEN = tuple(f for f in tiny.FAMILIES if f.startswith("qwen"))
BATCHES = {
    "one": [[3, "img", 5]],
    "ragged": [[3, "img", 5], [1, "img", 2, "other", 7], [4]],
    "video": [[2, "video", 3], [1, ("video", 2), 6]],
    "video and image": [[2, "video", 3, "other", 1], [1, "img", 6], [3]],
}
PIPELINES = {
    "fastervlm": [{"fastervlm": {"keep": 5}}],
    "random then ragged": [{"random": {"keep": "60%"}}, Ragged()],
    "pool": [{"pool": {"size": 2}}],
    "per segment": [{"fastervlm": {"keep": {"per_frame": 2}}}, {"uniform": {"keep": {"per_crop": 3}}}],
    "inside": [Inside(at=(1,))],
    "inside twice, then ragged": [Inside(at=(0, 1)), Ragged()],
    "merged inside": [InsideMerge(at=(1,))],
    "deep": [Deep(at=(1, 3), factor=0.7)],
    "everywhere": [Inside(at=(1,)), {"pool": {"size": 2}}, Deep()],
}
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def rows_for(family, name):
    """The rows of BATCHES with this family's own second picture; None where it cannot have them."""
    rows = [[IMAGES[family] if item == "other" else item for item in row] for row in BATCHES[name]]
    if "video" in name and family not in tiny.VIDEO:
        return None
    if family == "llava_onevision" and name == "video":
        rows = [[("video", 3) if isinstance(i, tuple) else i for i in row] for row in rows]
    return rows


def inside(stages):
    """The pipeline with its encoder stages where Qwen2.5-VL attends fully."""
    return [s.model_copy(update={"at": (1,)}) if isinstance(s, Inside) else s for s in stages]


def encode(model, batch, p, stages):
    """Puts the features that the wrapped model encodes, zeros where dropped, into the prompt; DeepStack's too, means where merged."""
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs if not seen else {})

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    hook.remove()
    p.embeds = seen["inputs_embeds"]
    for d, features in zip(p.deep, seen.get("deepstack_visual_embeds") or [], strict=True):
        # Of merged tokens, those count that had a value when the features were tapped.
        d[seen["visual_pos_masks"]] = features.masked_fill(~features.any(-1, keepdim=True), torch.nan)
        for image, into in zip(p.images, stages[-1].into or [], strict=False):
            x = d[image.row, image.columns].clone()
            for k in into.unique().tolist():
                d[image.row, image.columns[k]] = x[into == k].nanmean(0)
        d.nan_to_num_()


def merge(p, trace):
    """Puts the means of merged tokens at the places of those that absorbed them."""
    last = [s for s in trace.stages if s.site == "tokens" and s.into is not None]
    inside = [s.kept for s in trace.stages if s.site in ("frames", "encoder")]
    if not last:
        return
    for i, (image, into) in enumerate(zip(p.images, last[-1].into, strict=True)):
        columns = image.columns[~p.newline[image.row, image.columns]]
        alive = torch.zeros(len(columns), dtype=torch.bool)
        alive[inside[-1][i] if inside else slice(None)] = True
        for values in (p.embeds, *p.deep):
            x = values[image.row, columns].clone()
            for k in last[-1].kept[i].tolist():
                values[image.row, columns[k]] = x[(into == k) & alive].mean(0)


def compare(model, batch, pipeline, new=NEW, weighted=False):
    """Runs wrapped, then holds tokens and logits against the oracle; returns the trace.

    With `weighted` what merged tokens became is taken from what enters the decoder (the methods' own tests hold it), else it is the
    mean of the members.
    """
    p, entered = oracle.prompt(model, batch), {}
    with vtoken.wrapped(model, pipeline):
        hook = model.model.language_model.register_forward_pre_hook(
            lambda m, a, k: entered.update(k if not entered else {}), with_kwargs=True
        )
        out = model.generate(
            **batch, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        trace = vtoken.trace(model)
        hook.remove()
        early = [s for s in trace.stages if s.site in ("frames", "encoder")]
        if early:
            encode(model, batch, p, early)
    if not weighted:
        merge(p, trace)
    policy = pipeline.get("newline", "keep_if_row_has_token")
    entry = [s for s in trace.stages if s.site != "decoder"]
    first = entry[-1].kept if entry else [torch.arange(n) for n in trace.visual_tokens]
    keep = oracle.keep_mask(p, first, newlines=policy)
    if weighted and any(s.into is not None for s in trace.stages):
        alive, merged = entered["inputs_embeds"], keep & p.mask
        for row, stay in enumerate(merged):
            p.embeds[row, stay] = alive[row, alive.shape[1] - int(stay.sum()) :]
        for k, d in enumerate(p.deep):
            d[keep & p.visual] = entered["deepstack_visual_embeds"][k]
    deeper = {s.layer: oracle.keep_mask(p, s.kept, newlines=policy) for s in trace.stages if s.site == "decoder"}
    mixed, alive = {}, first
    for s in trace.stages:
        if s.site == "decoder":
            if s.into is not None:
                mixed[s.layer] = oracle.means(p, s.kept, s.into, alive)
            alive = s.kept
    compact = pipeline.get("positions") == "compact"
    tokens, logits = oracle.generate(model, p, keep, new, compact, deeper, layer_mix=mixed)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=2e-4, rtol=1e-4)
    assert torch.equal(out.sequences[:, -new:], tokens)
    assert trace.prompt_tokens == keep.sum(1).tolist()
    return trace


@families
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("stages", PIPELINES)
def test_equals_recomputation(family, rows, stages):
    if rows_for(family, rows) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    pipeline = {"stages": inside(PIPELINES[stages]) if family == "qwen2_5_vl" else PIPELINES[stages]}
    trace = compare(model, batch, pipeline)
    assert stages == "inside" or sum(trace.layers[-1]) < sum(trace.visual_tokens)
    for before, after in zip(trace.stages, trace.stages[1:], strict=False):
        assert after.tokens_in == before.tokens_out


@families
@pytest.mark.parametrize("stages", ["fastervlm", "everywhere"])
def test_eager_and_compact(family, stages):
    model = tiny.make(family, "eager")
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    stages = inside(PIPELINES[stages]) if family == "qwen2_5_vl" else PIPELINES[stages]
    if family in QWEN:
        with pytest.raises(UnsupportedError, match="M-RoPE"):
            vtoken.wrap(model, {"positions": "compact", "stages": stages})
        compare(model, batch, {"stages": stages})
    else:
        compare(model, batch, {"positions": "compact", "stages": stages})


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("stages", ["fastervlm", "deep"])
def test_newline_policies(family, newline, stages):
    model = tiny.make(family)
    rows = rows_for(family, "ragged" if family == "llava_next" else "video and image")
    compare(model, tiny.build(model, rows, seed=3), {"newline": newline, "stages": PIPELINES[stages]})


@families
@pytest.mark.parametrize("rows", ["ragged", "video and image"])
@pytest.mark.parametrize(
    "stages", [[{"fastervlm": {"keep": "100%"}}], [{"pool": {"size": 1}}], [Deep(factor=-1.0)]], ids=str
)
def test_keeping_everything_is_the_identity(family, rows, stages):
    if rows_for(family, rows) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**batch, **options)
    with vtoken.wrapped(model, stages):
        got = model.generate(**batch, **options)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"
    assert torch.equal(torch.stack(model.generate(**batch, **options).logits), torch.stack(want.logits)), "unwrapped"


@families
@pytest.mark.parametrize("name", [name for name in registry.stages() if registry.stage(name).site != "cache"])
def test_every_stage_runs(family, name):
    model = tiny.make(family)
    stage = usual.stage(name, seed=18)
    rows = (
        "video and image"
        if family in tiny.VIDEO and (name in ("evs", "vidcom2") or stage.site == "frames")
        else "ragged"
    )
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    if stage.site == "frames" and family not in tiny.VIDEO:
        with pytest.raises(UnsupportedError, match=f"{family} takes none"):
            vtoken.wrap(model, stage)
        return
    if stage.merge_point() and family in QWEN:
        with pytest.raises(UnsupportedError, match="neighbouring patches"):
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
        hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
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


@pytest.mark.parametrize(
    "family", [f for f in tiny.FAMILIES if f not in QWEN]
)  # Qwen closes a picture with a text token
@pytest.mark.parametrize("rows", [[[3, "img"]], [[2, "img", 1, "img"], [9]]], ids=["one", "ragged"])
def test_a_prompt_may_end_in_a_picture(family, rows):
    """Its last token may be dropped: the answer then follows the last one that is left."""
    model = tiny.make(family)
    batch = tiny.build(model, rows, seed=3)
    compare(model, batch, {"stages": [First(keep=3)], "newline": "drop"}, new=3)


class First(Pruner):
    """Keeps the first tokens of every image. No paper."""

    def score(self, tokens):
        return -tokens.place.float()
