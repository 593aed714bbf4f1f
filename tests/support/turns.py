"""Conversations of two turns, with a cache and as one prompt."""

from __future__ import annotations

import modes
import tiny
import torch
from packaging.version import Version

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
    whole |= tiny.types(model, ids)
    found = [(row, number, picture) for number, b in enumerate((first, turn)) for row, picture in of_rows(model, b)]
    found.sort(key=lambda f: f[:2])
    return whole | modes.join([picture for *_, picture in found]), [f[:2] for f in found]


def of_rows(model, batch):
    return [(picture[0], picture) for picture in modes.pictures(model, batch)]


def second(model, whole, turn):
    """What the second turn passes to `generate`: the new pictures, and for Qwen the grids of the whole conversation."""
    given = {k: v for k, v in whole.items() if k in ("input_ids", "attention_mask", tiny.family(model).types)}
    pixels = {k: turn[k] for k in modes.INPUTS["image"] if k in turn}
    if not modes.mrope(model):
        return given | pixels
    if not pixels:
        return given
    if not IMAGE_TURNS:
        return given | pixels
    encoded = model.model.get_image_features(**pixels, return_dict=True)
    return given | {"image_grid_thw": whole["image_grid_thw"], "mm_encoder_outputs": {"image": encoded}}


def both(traces, order):
    """One stage's traces of the turns that had images -> what it kept in the whole conversation, in reading order."""
    turns = [iter(t.kept) for t in traces]
    numbers = sorted({number for _, number in order})
    each = {number: turn for number, turn in zip(numbers, turns, strict=True)}
    return type(traces[0])(**{**vars(traces[0]), "kept": [next(each[number]) for _, number in order]})
