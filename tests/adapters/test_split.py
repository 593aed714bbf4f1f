"""Idefics3 and SmolVLM: which crops are of one picture, and what the model itself drops or hides."""

from __future__ import annotations

import pytest
import tiny
import tiny_processors
import torch

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry._split import cuts
from vtoken.hooks.state.parted import crops_of

families = pytest.mark.parametrize("family", tiny.families(split=True))
ONE, TWO, FOUR = ("img", (0, 0)), ("img", (1, 2)), ("img", (2, 2))
# Pictures that text parts, that nothing parts, rows without.
ROWS = [[3, TWO, 5, ONE], [ONE, ONE, FOUR, TWO, 1], [4], [FOUR, 2]]
CROPS = [3, 1, 1, 1, 5, 3, 5]


def counts(model, arguments):
    return [len(layout.parts) for layout in tiny.adapter(model).layouts("image", arguments)]


def by_row(model, batch, rows):
    """The pixels as the processor pads them: the crops of a row one after the other."""
    pixels, each = batch["pixel_values"], iter(batch["pixel_values"])
    held = [[_real(next(each)) for item in row if not isinstance(item, int)] for row in rows]
    most = max(sum(map(len, crops)) for crops in held)
    out = pixels.new_zeros(len(rows), most, *pixels.shape[2:])
    for row, crops in zip(out, held, strict=True):
        joined = torch.cat([pixels.new_zeros(0, *pixels.shape[2:]), *crops])
        row[: len(joined)] = joined
    return {**batch, "pixel_values": out}


def _real(crops):
    return crops[(crops != 0).flatten(1).any(1)]


@families
def test_the_prompt_tells_which_crops_are_of_a_picture(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS)
    assert counts(model, batch) == CROPS
    assert counts(model, {"pixel_values": batch["pixel_values"]}) == [1] * sum(CROPS)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert counts(model, {"pixel_values": batch["pixel_values"], "inputs_embeds": embeds}) == CROPS
    assert counts(model, {**batch, "input_ids": batch["input_ids"][:2]}) == [1] * sum(CROPS)


def test_prompts_that_are_written_otherwise() -> None:
    """Mark 9, picture 8, two tokens to a crop: 0 is text."""

    def found(*rows: list[int]) -> list[int]:
        ids = torch.tensor(rows)
        return crops_of(ids, ids == 8, int((ids == 8).sum()) // 2, 2)

    assert found([9, 0, 8, 8, 9, 0, 8, 8, 9]) == [2]
    assert found([9, 8, 8, 0, 9, 8, 8, 9, 9, 8, 8, 9]) == [2, 1]
    assert found([9, 8, 8, 9, 9, 8, 8, 9, 0, 9, 8, 8, 9]) == [1, 1, 1]
    assert found([9, 8, 8, 0, 8, 8, 9]) == [1, 1], "nothing marks the second crop"
    assert found([8, 8, 8, 8]) == [1, 1] and found([9, 8, 8]) == [1]
    assert found([9, 8, 0, 8, 9, 8, 8, 9]) == [1, 1], "text inside a crop"
    assert found([9, 8, 8, 9, 8, 8, 9], [0, 0, 9, 8, 8, 9, 0]) == [2, 1]


@families
def test_pixels_may_be_padded_by_row_or_by_picture(family):
    """Upstream looks at which crops are not all zero."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS)
    rows = by_row(model, batch, ROWS)
    assert counts(model, rows) == CROPS and rows["pixel_values"].shape[0] == len(ROWS)
    with vtoken.wrapped(model, "fastervlm:3"):
        said = [model.generate(**b, max_new_tokens=4, do_sample=False) for b in (batch, rows)]
        assert vtoken.trace(model).tokens_out == [3] * len(CROPS)
    assert torch.equal(*said)


@families
def test_a_hidden_part_of_a_picture_is_refused(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[1, TWO, 2], [1, ONE, 2]])
    pixels = batch["pixel_values"]
    mask = (pixels != 0).any(2).long()
    stock = model(**batch, pixel_attention_mask=mask).logits
    with vtoken.wrapped(model, "uniform:100%"):
        assert torch.equal(model(**batch, pixel_attention_mask=mask).logits, stock)
        mask[0, 1, -20:] = 0
        with pytest.raises(UnsupportedError, match="hides a part of a picture"):
            model(**batch, pixel_attention_mask=mask)


@families
def test_pixels_of_another_size_are_refused(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[1, ONE, 2]])
    with vtoken.wrapped(model, "uniform:2"):
        for pixels in (batch["pixel_values"][..., :28], batch["pixel_values"][0]):
            with pytest.raises(ValueError, match="needs pixel_values"):
                model(**{**batch, "pixel_values": pixels})
        assert model(**batch).logits.isfinite().all()


@families
def test_features_as_a_tensor_are_refused(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[1, ONE, 2]])
    pixels = batch.pop("pixel_values")
    features = torch.cat(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))
    new = tiny.adapter(model).outer.forward.__annotations__
    name = "mm_encoder_outputs" if "mm_encoder_outputs" in new else "image_hidden_states"
    with vtoken.wrapped(model, "uniform:2"), pytest.raises(UnsupportedError, match="image features as a tensor"):
        model(**batch, **{name: features})


@families
def test_text_between_crops_stays(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[2, FOUR, 3]])
    text = int((batch["input_ids"] != tiny.IMG).sum())
    with vtoken.wrapped(model, "uniform:1"):
        model(**batch)
        assert vtoken.trace(model).prompt_tokens == [text + 1]


@families
def test_the_account_cuts_as_the_processor_does(family):
    one = tiny.family(family)
    images = tiny_processors.processor(family).image_processor
    for size in [(1, 1), (56, 112), (300, 40), (40, 300), (333, 177), (480, 640), (101, 99), (27, 2000), (1000, 999)]:
        found = images.get_number_of_image_patches(*size)
        assert found[1:] == cuts(one.stock.config.vision_config, size), size
