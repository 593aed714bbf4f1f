"""Conversations on every family: a turn on the returned cache equals the oracle over the kept tokens of all turns."""

from __future__ import annotations

import modes
import oracle
import pytest
import tiny
import torch
from modes import STAGES, every, greedy
from packaging.version import Version

import vtoken
from vtoken.errors import UnsupportedError

NEW = 4
# Before, transformers itself gives a new image in a cached turn of Qwen the positions of text.
IMAGE_TURNS = Version("5.21") <= modes.VERSION
TURNS = {
    "text": (modes.ROWS[:2], [[5], [5]]),
    "image": (modes.ROWS[:2], [[3, "img", 2], [3, "img", 2]]),
    "first image": ([[6], [4]], [[3, "img", 2], [3, "img", 2]]),
}


def conversation(model, first, turn, said):
    """The prompt of the whole conversation, as `generate` takes it without a cache."""
    n = len(first["input_ids"])
    ids = torch.cat([said, turn["input_ids"]], 1)
    extra = ids.shape[1] - first["input_ids"].shape[1]
    whole = {
        "input_ids": ids,
        "attention_mask": torch.cat([first["attention_mask"], torch.ones(n, extra, dtype=torch.long)], 1),
    }
    if modes.qwen(model):
        whole["mm_token_type_ids"] = (ids == tiny.IMG).long()
    found = [(row, number, picture) for number, b in enumerate((first, turn)) for row, picture in of_rows(model, b)]
    found.sort(key=lambda f: f[:2])
    return whole | modes.join([picture for *_, picture in found]), [f[:2] for f in found]


def of_rows(model, batch):
    return [(picture[0], picture) for picture in modes.pictures(model, batch)]


def second(model, whole, turn):
    """What the second turn passes to `generate`: the new pictures, and for Qwen the grids of the whole conversation."""
    given = {k: v for k, v in whole.items() if k in ("input_ids", "attention_mask")}
    pixels = {k: turn[k] for k in modes.INPUTS["image"] if k in turn}
    if not modes.qwen(model):
        return given | pixels
    given["mm_token_type_ids"] = whole["mm_token_type_ids"]
    if not pixels:
        return given
    if not IMAGE_TURNS:
        return given | pixels
    encoded = model.get_image_features(**pixels, return_dict=True)
    return given | {"image_grid_thw": whole["image_grid_thw"], "mm_encoder_outputs": {"image": encoded}}


@every
@pytest.mark.parametrize("rows", TURNS.values(), ids=TURNS)
def test_second_turn(family, pipeline, rows):
    model, pipeline = tiny.make(family), STAGES[pipeline]
    first, turn = tiny.build(model, rows[0], seed=3), tiny.build(model, rows[1], seed=9)
    image = "pixel_values" in turn
    fed, stages = [], []
    with vtoken.wrapped(model, pipeline):
        a = greedy(model, first, NEW, return_dict_in_generate=True)
        stages.append(vtoken.trace(model).stages)
        whole, order = conversation(model, first, turn, a.sequences)
        more = second(model, whole, turn)
        if image and modes.qwen(model) and not IMAGE_TURNS:
            with pytest.raises(UnsupportedError, match="M-RoPE"):
                greedy(model, more, NEW, past_key_values=a.past_key_values)
            return
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: fed.append((a[0] if a else k["hidden_states"]).shape[1]), with_kwargs=True
        )
        options = {"return_dict_in_generate": True, "output_logits": True}
        b = greedy(model, more, NEW, past_key_values=a.past_key_values, **options)
        hook.remove()
        stages.append(vtoken.trace(model).stages if image else [])
    # The last generated token was never cached, so it is fed with the turn.
    assert fed[0] <= turn["input_ids"].shape[1] + 1
    p = oracle.prompt(model, whole)
    merged = [both(each, order) for each in zip(*(s for s in stages if s), strict=True)]
    got = torch.stack(b.logits)
    want = modes.forced(model, p, merged, b.sequences[:, -NEW:], pipeline.get("positions") == "compact")
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def both(traces, order):
    """One stage's traces of the turns that had images -> what it kept in the whole conversation, in reading order."""
    turns = [iter(t.kept) for t in traces]
    numbers = sorted({number for _, number in order})
    each = {number: turn for number, turn in zip(numbers, turns, strict=True)}
    return type(traces[0])(**{**vars(traces[0]), "kept": [next(each[number]) for _, number in order]})


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f.startswith("qwen")])
def test_images_with_positions_of_text_are_refused(family):
    """Without mm_token_type_ids, transformers numbers Qwen's image tokens as a line of text and says nothing."""
    model = tiny.make(family)
    batch = tiny.build(model, modes.ROWS, seed=3)
    types = batch.pop("mm_token_type_ids")
    model.generate(**batch, max_new_tokens=1)
    with vtoken.wrapped(model, "random:3"):
        with pytest.raises(UnsupportedError, match="mm_token_type_ids"):
            model.generate(**batch, max_new_tokens=1)
        model.generate(**batch, mm_token_type_ids=types, max_new_tokens=1)
