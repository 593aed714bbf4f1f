"""InternVL: which crops are of one picture is read off the prompt."""

from __future__ import annotations

import pytest
import tiny
import torch
from modes import VERSION, Version
from probes import Failing

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.session import session_of

ONE = (1, 4, 4)


@pytest.fixture
def model():
    return tiny.make("internvl")


def crops(model):
    return [len(parts) for parts in vtoken.trace(model).parts]


ROWS = [[3, ("img", (1, 2)), 2, "img", 1], [("img", (1, 3)), 4], [6]]


def test_crops_of_a_picture_stand_side_by_side(model):
    """By a forward, by generate, by embeddings; several pictures, rows and paddings."""
    batch = tiny.build(model, ROWS)
    embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embeds["input_ids"]
    with vtoken.wrapped(model, "fastervlm:4"), torch.no_grad():
        model(**batch)
        assert crops(model) == [3, 1, 4] and vtoken.trace(model).tokens_out == [4, 4, 4]
        kept = [k.tolist() for k in vtoken.trace(model).kept]
        for inputs in (batch, embeds):
            model.generate(**inputs, max_new_tokens=2)
            assert crops(model) == [3, 1, 4] and [k.tolist() for k in vtoken.trace(model).kept] == kept
        model(**embeds)
        assert crops(model) == [3, 1, 4]
        assert vtoken.trace(model).parts[0] == (ONE,) * 3


def test_a_budget_per_crop(model):
    batch = tiny.build(model, ROWS)
    with vtoken.wrapped(model, {"stages": [{"uniform": {"keep": {"per_crop": 2}}}]}), torch.no_grad():
        model(**batch)
        assert vtoken.trace(model).tokens_out == [6, 2, 8]
        for k in vtoken.trace(model).kept:
            assert (k // 16).bincount().tolist() == [2] * (len(k) // 2)


@pytest.mark.skipif(Version("5.18") > VERSION, reason="up to 5.17 a forward takes no encoded pictures")
def test_without_a_prompt_every_crop_is_a_picture(model):
    """And what a prompt said before is forgotten."""
    batch = tiny.build(model, ROWS[:1])
    pixels = batch["pixel_values"]
    with vtoken.wrapped(model, "fastervlm:4"), torch.no_grad():
        model(**batch)
        encoded = model.model.get_image_features(batch.pop("pixel_values"), return_dict=True)
        model(**batch, mm_encoder_outputs={"image": encoded})
        assert vtoken.trace(model).visual_tokens == [16] * 4
        model(**batch, pixel_values=pixels)
        assert vtoken.trace(model).visual_tokens == [48, 16]


def test_a_failed_forward_leaves_no_prompt(model):
    """Of pictures that are encoded afterwards it tells nothing."""
    batch = tiny.build(model, [[3, ("img", (1, 2)), 2]])
    vtoken.wrap(model, [Failing(keep=1)])
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    model.model.get_image_features(batch["pixel_values"])
    assert [len(layout.parts) for layout in session_of(model).context.run.encodes["image"].layouts] == [1, 1, 1]


def test_a_new_picture_on_a_returned_cache(model):
    """`generate` is told the whole conversation, and the pixels of the new picture."""
    first = tiny.build(model, [[3, ("img", (1, 2)), 2]], seed=1)
    more = tiny.build(model, [[2, ("img", (1, 3)), 3]], seed=2)
    with vtoken.wrapped(model, "fastervlm:4"):
        out = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert crops(model) == [3]
        ids = torch.cat([out.sequences, more["input_ids"]], 1)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=more["pixel_values"],
            past_key_values=out.past_key_values,
            max_new_tokens=2,
            do_sample=False,
        )
        assert crops(model) == [4] and vtoken.trace(model).tokens_out == [4]


@pytest.mark.skipif(Version("5.18") > VERSION, reason="up to 5.17 transformers mixes up the crops of a picture")
def test_beams_and_return_sequences(model):
    batch = tiny.build(model, ROWS)
    with vtoken.wrapped(model, "fastervlm:4"):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        kept = [k.tolist() for k in vtoken.trace(model).kept]
        for more in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
            model.generate(**{"do_sample": False, **more}, **batch, max_new_tokens=2)
            rows = vtoken.trace(model).row
            twice = [k for row in (0, 1) for _ in range(2) for k, r in zip(kept, [0, 0, 1], strict=True) if r == row]
            assert [k.tolist() for k in vtoken.trace(model).kept] == twice and rows == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("size", [(28, 28), (112, 112), (28, 112)], ids=str)
def test_crops_of_another_size_are_refused(model, size):
    """The tower would take them, and make other tokens of them."""
    batch = tiny.build(model, [[3, "img", 2]])
    with vtoken.wrapped(model, "fastervlm:4"), pytest.raises(ValueError, match=r"needs pixel_values .crops, 3, 56, 56"):
        model(**{**batch, "pixel_values": torch.ones(1, 3, *size)})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"vision_feature_select_strategy": "full"}, "drops the CLS token"),
        ({"vision_feature_layer": [1, 2]}, "one layer of the tower"),
        ({"vision_feature_layer": -9}, "not the output of one of the tower.s 4 layers"),
    ],
)
def test_what_is_refused(model, change, says):
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedError, match=says):
        vtoken.wrap(model, "fastervlm:4")
    with pytest.raises(UnsupportedError, match="wrap the whole VLM"):
        registry.adapter("internvl")(model.model)


def test_features_of_an_earlier_layer():
    model = tiny.make("internvl")
    model.config.vision_feature_layer = -2
    batch = tiny.build(model, ROWS)
    with torch.no_grad():
        dense = model(**batch).logits
        with vtoken.wrapped(model, {"stages": [{"flowcut": {"keep": "50%"}}]}):
            model(**batch)
            assert vtoken.trace(model).tokens_out == [24, 8, 32]
        with vtoken.wrapped(model, "fastervlm:100%"):
            assert torch.equal(model(**batch).logits, dense)
            with pytest.raises(UnsupportedError, match="vision_feature_layer=-1 at call time"):
                model(**batch, vision_feature_layer=-1)


@pytest.mark.parametrize("text", ["qwen3", "llama"])
def test_decoders(text):
    model = tiny.make("internvl", model_type=text)
    batch = tiny.build(model, ROWS)
    with vtoken.wrapped(model, "fastervlm:4"):
        model.generate(**batch, max_new_tokens=2)
        assert vtoken.trace(model).tokens_out == [4, 4, 4]
