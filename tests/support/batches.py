"""Prompts for every family: rows of text, pictures and videos, and pipelines where a family's tower can have them."""

from __future__ import annotations

import tiny
from probes import Deep, Inside

BATCHES = {
    "one": [[3, "img", 5]],
    "ragged": [[3, "img", 5], [1, "img", 2, "other", 7], [4]],
    "video": [[2, "video", 3], [1, ("video", 2), 6]],
    "video and image": [[2, "video", 3, "other", 1], [1, "img", 6], [3]],
}


def with_other(family, rows):
    """The rows with this family's own second picture where they say "other"."""
    one = tiny.family(family)
    other = "img" if one.other == one.image else ("img", one.other)
    return [[other if item == "other" else item for item in row] for row in rows]


def suited(family, rows):
    """The rows with videos in place of images where a call of this family holds either."""
    if not tiny.family(family).one_placeholder or not any(video(item) for row in rows for item in row):
        return rows
    return [[item if isinstance(item, int) or video(item) else "video" for item in row] for row in rows]


def video(item):
    return item == "video" or (isinstance(item, tuple) and item[0] == "video")


def rows_for(family, name):
    """The rows of BATCHES for this family; None where it cannot have them."""
    if "video" in name and family not in tiny.VIDEO:
        return None
    rows = with_other(family, BATCHES[name])
    if tiny.family(family).equal_videos and name == "video":
        rows = [[("video", 3) if isinstance(i, tuple) else i for i in row] for row in rows]
    return suited(family, rows)


def inside(family, stages):
    """The pipeline with its encoder stages where the family's tower attends fully, and those that read a decoder
    layer's attention behind a layer that has one."""
    full = tiny.family(family).full_attention
    if full is not None:
        stages = [s.model_copy(update={"at": full[:1]}) if isinstance(s, Inside) else s for s in stages]
    return [_behind(family, s) for s in stages]


def behind(family, *layers):
    """These decoder layers, or the next (the last) one where the layer in front keeps a state."""
    states = tiny.family(family).states
    there = [k for k in range(1, tiny.TEXT["num_hidden_layers"]) if k - 1 not in states]
    return tuple(sorted({min((k for k in there if k >= layer), default=there[-1]) for layer in layers}))


def _behind(family, stage):
    if isinstance(stage, Deep):
        return stage.model_copy(update={"at": behind(family, *stage.at)})
    if isinstance(stage, dict) and "fastv" in stage:
        (layer,) = behind(family, stage["fastv"].get("layer", 2))
        return {"fastv": {**stage["fastv"], "layer": layer}}
    return stage


LONG = [[3, "img", 1, "img", 9]]


def long(family):
    """One row of more than two blocks of 16."""
    return suited(family, [[2, "video", 3, "img", 1]]) if family in tiny.VIDEO else LONG


def uneven(family):
    """Rows of one picture, more visual tokens, none."""
    if tiny.family(family).crops_one_only:
        return [[3, ("img", (56, 56)), 5], [1, "img", 7], [4]]
    return [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
