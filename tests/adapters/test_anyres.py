"""LLaVA-NeXT and OneVision: facts, layouts and budgets line up with what the model packs."""

from __future__ import annotations

import pytest
import tiny
import torch
from modes import greedy
from probes import Recorder

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import FeatureCall

SIZES = [(100, 60), (50, 100), (112, 112), (30, 200), (57, 56), (300, 40)]
families = pytest.mark.parametrize("family", tiny.families(anyres=True))


def adapter_of(model):
    return registry.adapter(model.config.model_type)(model)


def encode(model, batch, kind="image"):
    """The call, projected features [crops, patches, D] and packed features of the stock model."""
    adapter, seen = adapter_of(model), {}
    names = ("pixel_values", "image_sizes", "batch_num_images") if kind == "image" else ("pixel_values_videos",)
    arguments = {name: batch[name] for name in names if name in batch}
    hook = adapter.projectors[0].register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad():
        first, *names = arguments
        more = {name: arguments[name] for name in names}
        out = getattr(model.model, adapter.features[kind])(arguments[first], **more, return_dict=True).pooler_output
    hook.remove()
    return adapter, FeatureCall(kind, arguments, adapter.layouts(kind, arguments)), seen["out"], out


@families
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_take_the_road_of_the_features(family, size):
    model = tiny.make(family)
    batch = tiny.build(model, [[1, ("img", size), 2], [("img", (100, 60))]], seed=1)
    adapter, call, projected, features = encode(model, batch)
    want = [f[~(f == model.model.image_newline).all(-1)] for f in features]
    got = adapter.pack(call, projected).split([layout.tokens for layout in call.layouts])
    for layout, packed, feature, token in zip(call.layouts, features, want, got, strict=True):
        assert layout.length == len(packed) and layout.tokens == len(feature)
        torch.testing.assert_close(token, feature)
        ends = layout.newline.nonzero()[:, 0]
        assert torch.equal(packed[ends], model.model.image_newline.expand(len(ends), -1))
        _, (_, rows, columns) = layout.parts
        assert len(ends) == rows and torch.equal(ends, torch.arange(rows) * (columns + 1) + columns + 16)
        assert torch.equal(layout.closed_by[16:], torch.arange(rows).repeat_interleave(columns))


@families
@pytest.mark.parametrize("size", [(20, 5000), (5000, 20), (2, 300)], ids=str)
def test_pictures_thinner_than_a_patch(family, size):
    """The model cuts their crops away with the padding: the scaled-down whole is all there is, and newlines."""
    model = tiny.make(family)
    batch = tiny.build(model, [[1, ("img", size), 2], [("img", (100, 60)), 3]], seed=1)
    stock = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vtoken.wrapped(model, "none"):
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), stock)
    with vtoken.wrapped(model, "uniform:8"):
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        seen = vtoken.trace(model)
    assert seen.visual_tokens[0] == 16 and seen.tokens_out == [8, 8] and seen.parts[0] == ((1, 4, 4),)


@families
def test_segments_are_crops(family):
    """A channel that holds the number of the crop comes out as the segment (interpolated, it is a mean of several)."""
    model = tiny.make(family)
    for size in SIZES:
        batch = tiny.build(model, [[1, ("img", size), 2]], seed=1)
        adapter, call, projected, _ = encode(model, batch)
        crops = torch.arange(len(projected)).float()[:, None, None].expand(-1, adapter.patches, 1)
        number, layout = adapter.pack(call, crops)[:, 0], call.layouts[0]
        assert set(layout.segment.tolist()) == set(range(len(projected)))
        assert layout.interpolated or torch.equal(number.long(), layout.segment)


def test_onevision_scales_large_pictures_down():
    model = tiny.make("llava_onevision")
    resized = {s: encode(model, tiny.build(model, [[("img", s)]]))[1].layouts[0].interpolated for s in SIZES}
    assert set(resized.values()) == {True, False}, "both kinds are tested above"


def test_onevision_packs_several_images_and_video():
    model = tiny.make("llava_onevision")
    batch = tiny.build(model, [["img", 2, "img"], [3, "video"]], seed=1)
    for kind in ("image", "video"):
        adapter, call, projected, features = encode(model, batch, kind)
        flat = torch.cat(list(features))
        newline = torch.cat([layout.newline for layout in call.layouts])
        if len(flat) < len(newline):  # up to 5.17 the newline of a video is added later
            newline = torch.zeros(len(flat), dtype=torch.bool)
        torch.testing.assert_close(adapter.pack(call, projected), flat[~newline])
        assert torch.equal(flat[newline], model.model.image_newline.expand(int(newline.sum()), -1))
    assert call.layouts[0].parts == ((3, 2, 2),) and call.layouts[0].segment.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@families
def test_facts_are_those_of_the_crops(family):
    """Attention and keys of each token are those of its patch in its crop, encoded alone."""
    model = tiny.make(family)
    batch = tiny.build(model, [[1, ("img", (100, 60)), 2], [("img", (50, 100))]], seed=1)
    name = tiny.adapter(model).substitutes.get("cls_attention", "cls_attention")
    recorder = Recorder(asks=((name, None), ("keys", None), ("features", None), ("pixels", None)), seen=[])
    with vtoken.wrapped(model, [recorder]), torch.no_grad():
        model(**batch)
    got = recorder.seen[0]
    adapter, call, _, _ = encode(model, batch)
    tower, layer = model.model.vision_tower, adapter.encoder.layers[adapter.encoder.attention_layer]
    crops = torch.cat([p[:n] for p, n in zip(batch["pixel_values"], adapter.crops(call.arguments), strict=True)])
    seen = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o: seen.update(q=o)),
        layer.self_attn.k_proj.register_forward_hook(lambda m, a, o: seen.update(k=o)),
    ]
    cls = int(adapter.encoder.cls)
    with torch.no_grad():
        states = tower(crops, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    for hook in hooks:
        hook.remove()
    q, k = (seen[x].unflatten(-1, (4, -1)).transpose(1, 2) for x in "qk")
    weights = (q @ k.transpose(-1, -2) * adapter.encoder.scale).softmax(-1).mean(1)
    attention = weights[:, 0, 1:] if cls else weights.mean(1)
    patches = torch.nn.functional.unfold(crops, 14, stride=14).transpose(1, 2)
    for fact, want in (
        (name, attention[..., None]),
        ("keys", seen["k"][:, cls:]),
        ("features", states[:, cls:]),
        ("pixels", patches),
    ):
        value = got.fact(fact) if fact != name else got.fact(fact)[:, None]
        torch.testing.assert_close(value, adapter.pack(call, want), atol=1e-5, rtol=1e-4)


@families
def test_budget_per_crop(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[1, ("img", (100, 60)), 2], [("img", (50, 100))]], seed=1)
    for stage in ("fastervlm", "uniform", "random"):
        with vtoken.wrapped(model, [{stage: {"keep": {"per_crop": 3}}}]), torch.no_grad():
            model(**batch)
            trace = vtoken.trace(model)
        layouts = encode(model, batch)[1].layouts
        for layout, kept in zip(layouts, trace.kept, strict=True):
            held, left = (
                layout.segment.bincount(),
                layout.segment[kept].bincount(minlength=int(layout.segment.max()) + 1),
            )
            assert torch.equal(left, held.clamp(max=3))


def test_budget_per_frame():
    model = tiny.make("qwen2_vl")
    batch = tiny.build(model, [["video", 2, "img"], [1, ("video", 3), 2]], seed=1)
    for stage in ("fastervlm", "uniform"):
        with vtoken.wrapped(model, [{stage: {"keep": {"per_frame": 2}}}]), torch.no_grad():
            model(**batch)
            trace = vtoken.trace(model)
        assert trace.tokens_out == [4, 2, 6]
        assert [(k // 4).tolist() for k in trace.kept][::2] == [[0, 0, 1, 1], [0, 0, 1, 1, 2, 2]]


def test_forced_grid():
    """anyres: 2x2 changes the crops the model expects, for the length of the wrap; a processor that does not know is
    found out."""
    model = tiny.make("llava_next")
    pinpoints = model.config.image_grid_pinpoints
    stale = tiny.build(model, [[1, ("img", (50, 100)), 2]], seed=1)
    with vtoken.wrapped(model, {"anyres": "2x2", "stages": [{"random": {"keep": 4}}]}):
        assert model.model.config.image_grid_pinpoints == [[112, 112]]
        with pytest.raises(ValueError, match="match_processor"):
            model(**stale)
        pixels = torch.randn(1, 5, 3, 56, 56)
        features = model.model.get_image_features(pixels, torch.tensor([[60, 60]]), return_dict=True).pooler_output
        assert len(features[0]) == 16 + 8 * 9
    assert model.config.image_grid_pinpoints is pinpoints
    for family in tiny.each("split", anyres=False):  # one that cuts pictures in another way among them
        with pytest.raises(UnsupportedError, match=f"image_grid_pinpoints.*which {family} does not have"):
            vtoken.wrap(tiny.make(family), {"anyres": "2x2", "stages": []})


def test_forced_grid_of_what_reads_beside():
    """What answers are compared with, and what drafts, is given the same crops, here of a picture that has as many
    tokens in fewer of them."""
    model, stages = tiny.make("llava_next"), [{"uniform": {"keep": 9}}]
    pixels, sizes = torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(1)), torch.tensor([[50, 100]])
    n = len(model.model.get_image_features(pixels[:, :3], sizes, return_dict=True).pooler_output[0])
    with vtoken.wrapped(model, {"anyres": "2x2", "stages": stages}):
        assert len(model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output[0]) == n
        batch = {"input_ids": torch.tensor([[11, *[tiny.IMG] * n, 12]]), "pixel_values": pixels, "image_sizes": sizes}
        own = greedy(model, batch, 4, output_scores=True, return_dict_in_generate=True)
        drafts = vtoken.draft(model, None, stages)
        assert torch.equal(greedy(model, batch, 9, assistant_model=drafts)[:, : own.sequences.shape[1]], own.sequences)
        assert vtoken.acceptance(drafts).share == 1
        vtoken.unwrap(drafts)
    with vtoken.wrapped(model, {"anyres": "2x2", "stages": stages, "contrast": {"stages": stages, "beta": 0}}):
        same = greedy(model, batch, 4, output_scores=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(same.scores), torch.stack(own.scores), atol=1e-4, rtol=1e-4)


def test_match_processor():
    from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil

    class Processor:
        def __init__(self, image_processor):
            self.image_processor = image_processor

    model = tiny.make("llava_next")
    processor = Processor(LlavaNextImageProcessorPil(image_grid_pinpoints=[[336, 672]]))
    with vtoken.wrapped(model, {"anyres": "2x2", "stages": []}):
        assert vtoken.match_processor(processor, model) is processor
    assert processor.image_processor.image_grid_pinpoints == [[112, 112]]
    with pytest.raises(UnsupportedError, match="does not have crop grids"):
        vtoken.match_processor(Processor(CLIPImageProcessorPil()), model)
