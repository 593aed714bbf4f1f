"""GLM-4V: one placeholder for images and videos."""

from __future__ import annotations

import pytest
import tiny
import torch

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import KINDS

families = pytest.mark.parametrize("family", tiny.families(one_placeholder=True))


@families
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_images_and_videos_in_one_call_are_refused(family: str, call: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, [[2, "video", 3, "img", 1]])
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**batch, max_new_tokens=1)
    with vtoken.wrapped(model, "uniform:2"), pytest.raises(UnsupportedError, match="one placeholder"):
        model(**batch) if call == "forward" else model.generate(**batch, max_new_tokens=1)


@families
def test_what_was_encoded_tells_the_kinds_apart(family: str) -> None:
    adapter = tiny.adapter(tiny.make(family))
    ids = torch.tensor([[5, tiny.IMG, tiny.IMG, tiny.VID]])
    assert [adapter.visual_kinds(ids, None, {kind}).tolist() for kind in KINDS] == [[[0, 1, 1, 0]], [[0, 2, 2, 0]]]
    assert (adapter.visual_kinds(ids, None) > 0).tolist() == [[False, True, True, False]]


@families
def test_without_ids_the_model_looks_for_another_embedding(family: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, [[2, "video", 3]])
    words = torch.where(batch["input_ids"] == tiny.IMG, tiny.VID, batch["input_ids"])
    embeds = model.get_input_embeddings()(words)
    positions, _ = model.model.get_rope_index(**{k: v for k, v in batch.items() if "pixel" not in k})
    given = {k: v for k, v in batch.items() if k in ("pixel_values_videos", "video_grid_thw", "attention_mask")}
    with torch.no_grad(), vtoken.wrapped(model, "uniform:2"):
        want = model(**batch).logits
        got = model(inputs_embeds=embeds, position_ids=positions, **given).logits
        assert vtoken.trace(model).tokens_out == [2]
    torch.testing.assert_close(got[:, -1], want[:, -1])
