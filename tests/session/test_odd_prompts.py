"""Prompts that are legal and unusual: served as the stock model serves them, or refused with the cause and the mend."""

from __future__ import annotations

import warnings

import modes
import pytest
import tiny
import torch
from batches import inside
from modes import LOGITS, alone, attending, families, greedy, skip_refused
from packaging.version import Version
from padded_right import wrapped_or_skip
from probes import Deep, Inside, Ragged
from torch.utils._pytree import tree_leaves
from usual import ALONE, stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError

PADDED = tiny.families(varlen=False)
# Decoder and cache sites may drop on the way; what matters here is who is seen.
SITES = {
    "encoder": [Inside(at=(1,))],
    "tokens": [{"uniform": {"keep": 3}}],
    "decoder": [{"uniform": {"keep": 7}}, Deep(at=(1, 3))],
    "cache": [{"snapkv": {"keep": 2, "window": 2}}],
    "guarded": {"min_visual_tokens": 1, "stages": [Inside(at=(1,)), {"uniform": {"keep": 3}}]},
}
sites = pytest.mark.parametrize("name", SITES)


def at(family, name):
    """The pipeline, where the family can have its stages."""
    return SITES[name] if isinstance(SITES[name], dict) else inside(family, SITES[name])


def masked(model, batch, what):
    """The batch with a picture of row 0 hidden by the padding mask: all of it, or the first half."""
    first = tiny.segments(model, batch)[0]
    columns = first.columns if what == "whole" else first.columns[: len(first.columns) // 2]
    mask = batch["attention_mask"].clone()
    mask[0, columns] = 0
    return {**batch, "attention_mask": mask}


@attending  # a state of the stock model decays over what the mask hides
@pytest.mark.parametrize(
    "rows", [[[3, "img", 5]], [[3, "img", 2, "img", 5], [1, "img", 4]]], ids=["only", "first of two"]
)
@pytest.mark.parametrize("what", ["whole", "half"])
def test_pictures_hidden_by_the_mask_as_the_stock_model_has_it(family, rows, what):
    """With everything kept the wrapped model answers as the stock model, to the bit."""
    model = tiny.make(family)
    batch = masked(model, tiny.build(model, rows, seed=3), what)
    if what == "half" and tiny.family(family).mrope:
        with vtoken.wrapped(model, [{"uniform": {"keep": 99}}]):
            for call in (lambda: greedy(model, batch, 2), lambda: model(**batch)):
                with pytest.raises(UnsupportedError, match="attention_mask hides a part of a picture"):
                    call()
        return
    want = torch.stack(greedy(model, batch, 3, **LOGITS).logits)
    for stages in ([{"uniform": {"keep": 99}}], [{"fastv": {"keep": 99}}]):
        with vtoken.wrapped(model, stages):
            got = torch.stack(greedy(model, batch, 3, **LOGITS).logits)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@families
@sites
@pytest.mark.parametrize("what", ["whole", "half"])
def test_what_the_mask_hides_is_not_in_the_prompt(family, name, what):
    """The other picture of the row is pruned as ever; of the hidden one nothing enters the decoder that the mask
    hides."""
    if what == "half" and tiny.family(family).mrope:
        pytest.skip("refused, see above")
    if name == "cache" and tiny.family(family).window:
        pytest.skip("refused: windows hold no whole prompt")
    model = tiny.make(family)
    batch = masked(model, tiny.build(model, [[3, "img", 2, "img", 5]], seed=3), what)
    with vtoken.wrapped(model, at(family, name)):
        plain = tiny.build(model, [[3, "img", 2, "img", 5]], seed=3)
        greedy(model, plain, 1)
        before = vtoken.trace(model)
        greedy(model, batch, 3)
        trace = vtoken.trace(model)
    hidden = before.visual_tokens[0] if what == "whole" else len(tiny.segments(model, plain)[0].columns) // 2
    assert trace.visual_tokens[0] <= before.visual_tokens[0] - (hidden if what == "whole" else 1)
    assert trace.visual_tokens[1] == before.visual_tokens[1]
    for layer in trace.layers:
        assert all(n <= v for n, v in zip(layer, trace.visual_tokens, strict=True))
    if name in ("tokens", "encoder"):
        assert trace.kept[1].tolist() == before.kept[1].tolist()
    visible = int(batch["attention_mask"].sum())
    assert trace.prompt_tokens[0] <= visible - sum(trace.visual_tokens) + sum(trace.layers[0])


@pytest.mark.parametrize("family", tiny.VIDEO)
@sites
def test_a_typed_placeholder_is_text(family, name):
    """A `<video>` that somebody wrote beside a picture, without a video, is a word to the stock model."""
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 6]], seed=3)
    ids = batch["input_ids"].clone()
    ids[0, -3] = tiny.VID
    batch["input_ids"] = ids
    with vtoken.wrapped(model, at(family, name)):
        greedy(model, batch, 2)
        assert len(vtoken.trace(model).visual_tokens) == 1
    want = torch.stack(greedy(model, batch, 2, **LOGITS).logits)
    with vtoken.wrapped(model, [{"uniform": {"keep": 99}}]):
        torch.testing.assert_close(torch.stack(greedy(model, batch, 2, **LOGITS).logits), want)


@pytest.mark.parametrize("family", tiny.each("deepstack", window=None))
@pytest.mark.parametrize("name", sorted(set(ALONE) - {"kvpress"}))
@pytest.mark.parametrize(
    "rows", [[[3, "img", 5]], [[3, "img", 2, "img", 5], [2, "img", 4]]], ids=["only", "first of two"]
)
def test_every_stage_does_without_a_hidden_picture(family, name, rows):
    model = tiny.make(family)
    batch = masked(model, tiny.build(model, rows, seed=3), "whole")
    wrapped_or_skip(model, [stage(name, seed=18)])
    greedy(model, batch, 2)
    trace = vtoken.trace(model)
    assert trace.visual_tokens[0] == 0 and all(layer[0] == 0 for layer in trace.layers)


STAGES = [n for n in ALONE if n != "kvpress" and registry.stage(n).site in ("tokens", "decoder", "cache")]


@pytest.mark.parametrize("family", PADDED)  # Qwen closes a picture with a text token
@pytest.mark.parametrize("name", STAGES)
def test_a_picture_alone_is_a_prompt(family, name):
    """Without any text at least the last position stays, however much a stage takes; alone and beside others the answer
    is the same."""
    model = tiny.make(family)
    own = {"layer": 1} if name == "vtw" else {}
    wrapped_or_skip(model, [stage(name, seed=18, **own)])
    batch = tiny.build(model, [["img"], [2, "img", 3]], seed=3)
    together = greedy(model, batch, 3)
    trace = vtoken.trace(model)
    assert min(trace.prompt_tokens) >= 1
    single = alone(model, batch, 0)
    assert torch.equal(greedy(model, single, 3)[:, -3:], together[:1, -3:])


@pytest.mark.parametrize("family", PADDED)
@pytest.mark.parametrize(
    "stages",
    [
        [{"vtw": {"layer": 1}}, {"todre_exit": {"at": [2, 3]}}],
        [{"fastervlm": {"keep": 1}}, {"fastv": {"keep": 5, "layer": 2}}],
        [{"uniform": {"keep": 1}}, {"snapkv": {"keep": 1}}],
        [{"uniform": {"keep": 1}}, {"flexprefill": {"min_len": 0}}],
        [{"uniform": {"keep": 1}}, {"vtw": {"layer": 2}}],
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("cache", [True, False])
def test_prompts_cut_down_to_a_token_are_no_decode_step(family, stages, text, cache):
    model = tiny.make(family)
    batch = tiny.build(model, [["img", *[1] * text]], seed=3)
    if not cache and "snapkv" in str(stages):
        pytest.skip("needs a cache")
    skip_refused(model, stages)
    with vtoken.wrapped(model, {"stages": stages, "newline": "drop"}):
        out = greedy(model, batch, 3, use_cache=cache)
        trace = vtoken.trace(model)
        assert {s.name for s in trace.stages} == {name for s in stages for name in s}
        with torch.no_grad():
            first = model(**batch, use_cache=cache).logits[:, -1].argmax(-1)
    assert first == out[0, -3]


@families
def test_a_text_prompt_of_one_token_has_a_trace_of_its_own(family):
    model = tiny.make(family)
    with vtoken.wrapped(model, [Deep()]), torch.no_grad():
        greedy(model, tiny.build(model, [[3, "img", 5]], seed=3), 1)
        model(input_ids=torch.tensor([[7]]))
        assert vtoken.trace(model).visual_tokens == [] and vtoken.trace(model).stages == []
        greedy(model, tiny.build(model, [[3, "img", 5]], seed=3), 3)
        assert vtoken.trace(model).visual_tokens != [], "decode steps leave the trace alone"


@families
@sites
def test_packed_samples_are_refused(family, name):
    """Several samples in one row, told apart by restarting positions alone: the stock model keeps them apart, a pruned
    row could not."""
    model = tiny.make(family)
    if name == "cache":
        pytest.skip("asks for a cache, with which the stock model does not keep samples apart either")
    batch = tiny.build(model, [[3, "img", 5, "img", 4]], seed=3)
    length = batch["input_ids"].shape[1]
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
    batch.pop("attention_mask")
    if modes.mrope(model):
        # The axis in front is text's; transformers reads packed samples off it.
        axes = torch.stack([torch.arange(length), torch.arange(length) // 2, torch.arange(length) % 5])[:, None]
        positions = torch.cat([positions[None], axes])
    with vtoken.wrapped(model, at(family, name)), torch.no_grad():
        with pytest.raises(UnsupportedError, match="several samples in one row"):
            model(**batch, position_ids=positions, use_cache=False)
        whole = positions.clone()
        whole[..., :] = torch.arange(length) if not modes.mrope(model) else whole
        if modes.mrope(model):
            whole[0] = torch.arange(length)
        model(**batch, position_ids=whole, use_cache=False)


@families
def test_pictures_merged_into_embeddings_are_told_once(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.update(k if not seen else {}), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        hook.remove()
        given = {"inputs_embeds": seen["inputs_embeds"], "attention_mask": batch["attention_mask"]}
        want = model(**given).logits
        with vtoken.wrapped(model, [{"uniform": {"keep": 3}}, Ragged(), Deep()]):
            with pytest.warns(UserWarning, match="inputs_embeds came without pixels"):
                got = model(**given).logits
            trace = vtoken.trace(model)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(**given)
                greedy(model, batch, 2)
    torch.testing.assert_close(got, want)
    assert len(trace.stages) == 3 and all("without pixels" in s.stood_aside for s in trace.stages)


@pytest.mark.parametrize("family", tiny.families(anyres=True))
@pytest.mark.parametrize("newline", ["keep_if_row_has_token", "keep", "drop"])
@pytest.mark.parametrize(
    "stages",
    [
        [{"frames_uniform": {"keep": 1}}],
        [{"fastervlm": {"keep": 60}}],
        [Inside(at=(1,))],
        [{"fastv": {"keep": 60}}],
        [{"snapkv": {"keep": 60}}],
        [{"flexprefill": {"min_len": 0}}],
    ],
    ids=str,
)
def test_newlines_do_not_depend_on_batch_mates(family, newline, stages):
    """A row with a picture that loses nothing enters as many tokens alone as beside one that does."""
    model = tiny.make(family)
    other = "video" if family in tiny.VIDEO else ("img", (112, 112))
    wrapped_or_skip(model, {"newline": newline, "stages": stages})
    for picture in (("img", (63, 60)), ("img", (20, 5000)), ("img", (56, 56))):
        batch = tiny.build(model, [[2, other, 3], [1, picture, 4]], seed=3)
        greedy(model, batch, 1)
        together = vtoken.trace(model).prompt_tokens
        for row in (0, 1):
            greedy(model, alone(model, batch, row), 1)
            assert vtoken.trace(model).prompt_tokens == [together[row]], (picture, row)


@families
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_features_as_tuples(family, kind, by):
    """What the model's own functions return is what was asked for, here or in the configuration."""
    model = tiny.make(family)
    if kind == "video" and family not in tiny.VIDEO:
        pytest.skip("no videos")
    batch = tiny.build(model, [[3, kind if kind == "video" else "img", 5]], seed=3)
    pixels = {k: v for k, v in batch.items() if k in modes.INPUTS[kind]}
    function = f"get_{kind}_features"
    if modes.VERSION < Version("5.18") and tiny.family(family).pooled_videos:
        pixels = {"pixel_values" if k == "pixel_values_videos" else k: v for k, v in pixels.items()}
    options = {"return_dict": False} if by == "argument" else {}
    with torch.no_grad(), vtoken.wrapped(model, [Inside(at=(1,))]):
        owner = model if hasattr(model, function) else model.model
        want = getattr(owner, function)(**pixels, return_dict=True)
        if by == "configuration":
            model.config.return_dict = False
        got = getattr(owner, function)(**pixels, **options)
    assert type(got) is tuple
    leaves, expected = tree_leaves(got), tree_leaves(want.to_tuple())
    assert len(leaves) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(leaves, expected, strict=True) if torch.is_tensor(a)
    )


def test_tuples_by_configuration():
    """Of the families' own forward, the one that goes by it at all."""
    model = tiny.make("llava_next")
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    with vtoken.wrapped(model, [Inside(at=(1,)), Ragged(), Deep()]), torch.no_grad():
        want = model(**batch).logits
        model.config.return_dict = False
        got = model(**batch)
    assert isinstance(got, tuple) and torch.equal(got[0], want)
