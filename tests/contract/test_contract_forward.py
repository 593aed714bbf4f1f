"""What every stage owes to those who call the model themselves, on every family: training and scoring lay rows out
otherwise than `generate`."""

from __future__ import annotations

import pytest
import tiny
import torch
from modes import families, mrope
from padded_right import BATCH, NAMES, right, with_positions, wrapped_or_skip
from usual import stage

import vtoken
from vtoken.errors import UnsupportedError


def saved(model, folder):
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@families
@pytest.mark.parametrize("name", NAMES)
def test_padding_packing_and_saving(family, name, tmp_path):
    """Padding on either side gives the same logits, samples packed into one row are refused, and the checkpoint stays
    the stock model's."""
    model = tiny.make(family)
    stock = saved(model, tmp_path / "stock")
    wrapped_or_skip(model, [stage(name, seed=18)])
    left = tiny.build(model, BATCH, seed=3)
    batches = [with_positions(model, batch) for batch in (left, right(left))]
    with torch.no_grad():
        one, other = (model(**batch).logits[batch["attention_mask"].bool()] for batch in batches)
    torch.testing.assert_close(one, other, atol=3e-4, rtol=1e-4)
    packed = tiny.build(model, [[3, "img", 5, "img", 4]], seed=3)
    del packed["attention_mask"]
    length = packed["input_ids"].shape[1]
    positions = torch.arange(length)[None] % (length // 2)
    if mrope(model):
        axes = torch.stack([torch.arange(length), torch.arange(length) // 2, torch.arange(length) % 5])[:, None]
        positions = torch.cat([positions[None], axes])
    with pytest.raises(UnsupportedError, match="several samples in one row"), torch.no_grad():
        model(**packed, position_ids=positions, use_cache=False)
    assert saved(model, tmp_path / "wrapped") == stock


@pytest.mark.parametrize("family", tiny.each("deepstack", window=None))
@pytest.mark.parametrize("name", NAMES)
def test_lora_before_or_after(family, name):
    from lora import lora, outcome, same

    pipeline, batch = [stage(name, seed=18)], tiny.build(tiny.make(family), BATCH, seed=3)
    first = wrapped_or_skip(lora(tiny.make(family)), pipeline)
    second = lora(vtoken.wrap(tiny.make(family), pipeline))
    same(outcome(second, batch), outcome(first, batch))
