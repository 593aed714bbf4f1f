"""`min_visual_tokens` with stages of the vision tower: which rows run dense is known before it runs, however the model
is called."""

from __future__ import annotations

import modes
import pytest
import tiny
import torch
from batches import rows_for, uneven
from contrast import Some, batch_of
from modes import LOGITS, alone, families, greedy
from packaging.version import Version
from probes import Inside, InsideMerge, Ragged
from turns import conversation, second

import vtoken
from vtoken.hooks.vision import encoder_facts as facts

videos = pytest.mark.parametrize("family", tiny.VIDEO)
early = pytest.mark.skipif(modes.VERSION < Version("5.18"), reason="transformers takes encoded features from 5.18 on")


def guarded(model, batch, stages, row=1):
    """The pipeline whose threshold is what a row holds: this row just passes it."""
    with vtoken.wrapped(model, stages):
        greedy(model, alone(model, batch, row), 1)
        least = sum(vtoken.trace(model).visual_tokens)
    return {"min_visual_tokens": least, "stages": stages}


@families
@pytest.mark.parametrize("stages", [[Inside(at=(1,)), Ragged()], [InsideMerge(at=(1,))]], ids=["drop", "merge"])
def test_a_forward_decides_as_generate_does(family, stages):
    model = tiny.make(family)
    batch = tiny.build(model, uneven(family), seed=3)
    with vtoken.wrapped(model, guarded(model, batch, stages)), torch.no_grad():
        said = greedy(model, batch, 1, **LOGITS).logits[0]
        first = vtoken.trace(model)
        called = model(**batch).logits[:, -1]
        again = vtoken.trace(model)
    torch.testing.assert_close(called, said, atol=2e-4, rtol=1e-4)
    assert first.dense_rows == again.dense_rows == [0, 2] and first.tokens_out == again.tokens_out


@families
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams(family, options):
    """Rows are counted before, or (up to transformers 5.17) after the batch is expanded."""
    model = tiny.make(family)
    rows = uneven(family)
    if not modes.expands_several(family):
        rows = [rows[0], [*rows[1][:2], 9], [4]]
    batch = tiny.build(model, rows, seed=3)
    pipeline = guarded(model, batch, [Inside(at=(1,))])
    options = {**options, "return_dict_in_generate": True, "output_scores": True}
    with vtoken.wrapped(model, pipeline):
        got = greedy(model, batch, 4, **options)
        one = [greedy(model, alone(model, batch, row), 4, **options) for row in range(3)]
    want = torch.cat([each.sequences_scores for each in one])
    torch.testing.assert_close(got.sequences_scores, want, atol=3e-4, rtol=1e-4)


@families
def test_a_static_cache(family):
    """Its prefill is given a 4D mask, and its decode steps may be compiled."""
    model = tiny.make(family)
    batch = tiny.build(model, uneven(family), seed=3)
    pipeline = guarded(model, batch, [Inside(at=(1,)), Ragged()])
    with vtoken.wrapped(model, pipeline):
        want = torch.stack(greedy(model, batch, **LOGITS).logits)
        got = torch.stack(greedy(model, batch, cache_implementation="static", **LOGITS).logits)
        assert vtoken.trace(model).dense_rows == [0, 2]
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


@videos
def test_images_and_videos_of_a_prompt_count_together(family):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "video and image"), seed=3)
    pipeline = guarded(model, batch, [Inside(at=(1,), uniform=True), Ragged()], 0)
    dense = torch.stack(greedy(model, batch, **LOGITS).logits)
    with vtoken.wrapped(model, pipeline["stages"]):
        plain = torch.stack(greedy(model, alone(model, batch, 0), **LOGITS).logits)[:, 0]
        single = vtoken.trace(model).stages[0]
    with vtoken.wrapped(model, pipeline):
        got, trace = torch.stack(greedy(model, batch, **LOGITS).logits), vtoken.trace(model)
    assert trace.dense_rows == [1, 2] and trace.stages[0].site == "encoder"
    torch.testing.assert_close(got[:, 0], plain, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(got[:, 1:], dense[:, 1:], atol=2e-4, rtol=1e-4)
    many = trace.row.count(0)
    assert trace.stages[0].tokens_out == single.tokens_out + trace.visual_tokens[many:] and many == 2
    assert sum(single.tokens_out) < sum(single.tokens_in)


@videos
def test_frames(family):
    """A video of a short prompt keeps all its frames; where every prompt is short, the bits are those of the stock
    model."""
    model = tiny.make(family)
    batch = batch_of(family, model)
    dense = torch.stack(greedy(model, batch, **LOGITS).logits)
    pipeline = guarded(model, batch, [Some(), {"uniform": {"keep": "50%"}}])
    with vtoken.wrapped(model, pipeline["stages"]):
        plain = torch.stack(greedy(model, alone(model, batch, 1), **LOGITS).logits)[:, 0]
    with vtoken.wrapped(model, pipeline):
        got, trace = torch.stack(greedy(model, batch, **LOGITS).logits), vtoken.trace(model)
    assert trace.dense_rows == [0, 2]
    torch.testing.assert_close(got[:, 1], plain, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(got[:, 0], dense[:, 0], atol=2e-4, rtol=1e-4)
    with vtoken.wrapped(model, {**pipeline, "min_visual_tokens": 1000}):
        assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), dense)
        assert all("min_visual_tokens 1000" in s.stood_aside for s in vtoken.trace(model).stages)


@pytest.mark.parametrize("family", tiny.each("anyres", mrope=False, window=None))
def test_a_turn_counts_its_own_pictures(family):
    """`generate` is told the whole conversation; the turn's one picture is fewer than the two of the first."""
    model = tiny.make(family)
    first, turn = tiny.build(model, [[1, "img", 2, "img", 7]], seed=3), tiny.build(model, [[3, "img", 2]], seed=9)
    with vtoken.wrapped(model, guarded(model, first, [Inside(at=(1,)), Ragged()], 0)):
        a = greedy(model, first, 4, return_dict_in_generate=True)
        assert not vtoken.trace(model).dense_rows
        more = second(model, conversation(model, first, turn, a.sequences)[0], turn)
        greedy(model, more, 4, past_key_values=a.past_key_values)
        trace = vtoken.trace(model)
    assert trace.dense_rows == [0] and all(s.stood_aside for s in trace.stages)


@early
@families
def test_features_that_are_asked_for_by_hand(family):
    """No prompt tells the rows: each image counts for itself, of one crop where only a prompt tells whose crops are."""
    model, rows = tiny.make(family), uneven(family)
    if tiny.family(family).split:
        rows = [[("img", (0, 0)) if item == "img" else item for item in row] for row in rows]
    batch = tiny.build(model, rows, seed=3)
    given = {k: batch.pop(k) for k in modes.INPUTS["image"] if k in batch}
    kept = {k: v for k, v in given.items() if "grid" in k}
    with vtoken.wrapped(model, [Inside(at=(1,))]):
        model.generate(**batch, **given, max_new_tokens=1)
        sizes, (plain,) = vtoken.trace(model).visual_tokens, vtoken.trace(model).stages
    with vtoken.wrapped(model, {"min_visual_tokens": max(sizes), "stages": [Inside(at=(1,))]}), torch.no_grad():
        features = model.model.get_image_features(**given, return_dict=True)
        model(**batch, **kept, mm_encoder_outputs={"image": features})
        (stage,) = vtoken.trace(model).stages
    want = [less if n == max(sizes) else n for less, n in zip(plain.tokens_out, sizes, strict=True)]
    assert stage.tokens_out == want and sum(want) < sum(sizes)


def test_a_call_that_failed_tells_nothing_of_the_next():
    """Its two pictures together pass the threshold, asked for by hand neither does."""
    model = tiny.llava()
    batch = tiny.build(model, [[3, "img", 2, "img", 4]])
    with vtoken.wrapped(model, guarded(model, batch, [Inside(at=(1,))], 0)), torch.no_grad():
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(**batch, max_new_tokens=-1)
        features = model.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    assert len(features) == 2 and all(f.any(-1).all() for f in features), "nothing was dropped"


@families
@pytest.mark.parametrize("stages", [[Inside(at=(1,))], [{"fastervlm": {"keep": 5}}]], ids=["inside", "tokens"])
def test_standing_aside_costs_no_facts(family, stages, monkeypatch):
    model = tiny.make(family)
    batch = tiny.build(model, uneven(family), seed=3)

    def never(*_, **__):
        raise AssertionError("a fact was worked out for nobody")

    for name in ("mean_received", "compute", "one_query"):
        monkeypatch.setattr(facts, name, never)
    with vtoken.wrapped(model, {"min_visual_tokens": 1000, "stages": stages}):
        greedy(model, batch)
        with pytest.raises(AssertionError, match="for nobody"), vtoken.wrapped(tiny.make(family), stages) as other:
            greedy(other, batch)


def test_unwrapping_gives_generate_back():
    model = tiny.llava()
    with vtoken.wrapped(model, {"min_visual_tokens": 8, "stages": [Inside()]}):
        assert "generate" in vars(model) and model.generate.__name__ == "generate"
    assert "generate" not in vars(model)
