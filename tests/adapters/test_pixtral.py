"""Pixtral towers: prompts with row breaks, what is refused, and LLaVA's class with such a tower."""

from __future__ import annotations

from typing import Any

import families
import oracle
import pytest
import tiny
import torch
from against_oracle import compare
from families._pixtral import BREAK, END, Pixtral
from tiny_models import IMG

import vtoken
from vtoken.errors import NotWholeError, UnsupportedError

FAMILY = "mistral3"


class Pixtral12B(Pixtral):
    """What `tiny.build` knows of LLaVA's class with a Pixtral tower."""

    classes = "Llava"
    image, other, odd = (56, 42), (28, 56), (14, 56)


@pytest.fixture
def pixtral(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = tiny.make("llava", tower="pixtral", text="mistral", sliding_window=None)
    monkeypatch.setitem(families.FOUND, "llava", Pixtral12B("llava"))
    return model


ROWS: list[list[tiny.Item]] = [[3, "img", 5], [1, ("img", (28, 56)), ("img", (14, 56)), 7], [4]]
PIPELINES: dict[str, dict[str, Any]] = {
    "tokens": {"stages": [{"uniform": {"keep": "30%"}}]},
    "drop": {"stages": [{"uniform": {"keep": "30%"}}], "newline": "drop"},
    "keep": {"stages": [{"uniform": {"keep": "30%"}}], "newline": "keep", "positions": "compact"},
    "encoder": {"stages": [{"flowcut": {"keep": "50%"}}]},
    "decoder": {"stages": [{"fastv": {"keep": "50%", "layer": 1}}]},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_llava_with_a_pixtral_tower_equals_a_recomputation(pixtral: Any, name: str) -> None:
    compare(pixtral, tiny.build(pixtral, ROWS, seed=3), PIPELINES[name])


def test_everything_kept_is_the_stock_model(pixtral: Any) -> None:
    batch = tiny.build(pixtral, ROWS, seed=3)
    stock = pixtral.generate(**batch, max_new_tokens=5, do_sample=False)
    with vtoken.wrapped(pixtral, "uniform:100%"):
        assert torch.equal(pixtral.generate(**batch, max_new_tokens=5, do_sample=False), stock)


def test_merging_inside_is_refused(pixtral: Any) -> None:
    with pytest.raises(UnsupportedError, match="merges single patches inside encoder layers"):
        vtoken.wrap(pixtral, "tome:r=1")


def test_another_strategy_is_refused(pixtral: Any) -> None:
    pixtral.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedError, match="drops the first patch; use 'full'"):
        vtoken.wrap(pixtral, "uniform:50%")


@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_row_breaks_are_found_by_their_place(given: str) -> None:
    """What ends a picture is text, also between two that touch."""
    model = tiny.make(FAMILY)
    batch = tiny.build(model, [[2, "img", "img", 3], [4], [("img", (28, 84)), 1]])
    ids, adapter = batch["input_ids"], tiny.adapter(model)
    embeds = None if given == "ids" else model.get_input_embeddings()(ids)
    kinds = adapter.visual_kinds(ids if embeds is None else None, embeds)
    assert torch.equal(kinds > 0, (ids == IMG) | (ids == BREAK))
    assert bool((ids == BREAK).any()) and int((ids == END).sum()) == 3


def test_a_prompt_without_breaks_is_refused() -> None:
    model = tiny.make(FAMILY)
    batch = tiny.build(model, [[3, "img", 5]])
    stay = batch["input_ids"][0] != BREAK
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, stay]
    model.generate(**batch, max_new_tokens=1)  # the model itself does not mind
    with (
        vtoken.wrapped(model, "uniform:50%"),
        pytest.raises(NotWholeError, match=r"holds 12 visual .* with the tokens between their rows"),
    ):
        model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        (None, "needs pixel_values and image_sizes"),
        ([[112, 84], [28, 28]], "do not hold the pictures"),
        ([[112, 112]], "do not hold the pictures"),
        ([[112, 70]], "whole numbers of 28 pixels"),
    ],
    ids=["none", "two for one", "too large", "half a token"],
)
def test_sizes_that_do_not_fit_are_refused(sizes: Any, match: str) -> None:
    model = tiny.make(FAMILY)
    pixels = tiny.build(model, [["img", 1]])["pixel_values"]
    given = {"pixel_values": pixels} | ({} if sizes is None else {"image_sizes": torch.tensor(sizes)})
    with pytest.raises(ValueError, match=match):
        tiny.adapter(model).layouts("image", given)


def test_breaks_follow_the_policy() -> None:
    """A break stays if a token of its row does; what ends the picture stays whatever is kept."""
    model = tiny.make(FAMILY)
    batch = tiny.build(model, [[2, "img", 3]])
    p = oracle.prompt(model, batch)
    rows, columns = 4, 3
    assert int(p.newline.sum()) == rows - 1 and int(p.visual.sum()) == rows * columns
    for policy, breaks in (("keep", 3), ("drop", 0), ("keep_if_row_has_token", 1)):
        with vtoken.wrapped(model, {"stages": [{"uniform": {"keep": 1}}], "newline": policy}):
            model.generate(**batch, max_new_tokens=1, do_sample=False)
            (kept,), (length,) = vtoken.trace(model).stages[-1].kept, vtoken.trace(model).prompt_tokens
        in_last_row = int(kept[0]) // columns == rows - 1
        assert length == 2 + 1 + 1 + 3 + (0 if policy == "keep_if_row_has_token" and in_last_row else breaks)


def test_a_decoder_that_scales_queries_by_position_is_refused() -> None:
    """Ministral 3 in the class of Mistral Small 3."""
    model = tiny.make(FAMILY, model_type="ministral3", head_dim=8)
    assert model.get_decoder().config.rope_parameters["llama_4_scaling_beta"]
    with pytest.raises(UnsupportedError, match="'ministral3' scales its queries by their position"):
        vtoken.wrap(model, "uniform:50%")
