"""Prompts for every family: rows of text, pictures and videos, and pipelines where a family's tower can have them."""

from __future__ import annotations

import tiny
from probes import Inside

IMAGES = {
    "llava": "img",
    "llava_next": ("img", (50, 100)),
    "llava_onevision": ("img", (112, 112)),
    "qwen2_vl": ("img", (1, 8, 4)),
    "qwen2_5_vl": ("img", (1, 8, 12)),
    "qwen3_vl": ("img", (1, 4, 4)),
}
QWEN = tuple(f for f in tiny.FAMILIES if f.startswith("qwen"))


BATCHES = {
    "one": [[3, "img", 5]],
    "ragged": [[3, "img", 5], [1, "img", 2, "other", 7], [4]],
    "video": [[2, "video", 3], [1, ("video", 2), 6]],
    "video and image": [[2, "video", 3, "other", 1], [1, "img", 6], [3]],
}


def rows_for(family, name):
    """The rows of BATCHES with this family's own second picture; None where it cannot have them."""
    rows = [[IMAGES[family] if item == "other" else item for item in row] for row in BATCHES[name]]
    if "video" in name and family not in tiny.VIDEO:
        return None
    if family == "llava_onevision" and name == "video":
        rows = [[("video", 3) if isinstance(i, tuple) else i for i in row] for row in rows]
    return rows


def inside(stages):
    """The pipeline with its encoder stages where Qwen2.5-VL attends fully."""
    return [s.model_copy(update={"at": (1,)}) if isinstance(s, Inside) else s for s in stages]


LONG = {"llava": [[3, "img", 1, "img", 9]], "video": [[2, "video", 3, "img", 1]]}


def long(family):
    """One row of more than two blocks of 16."""
    return LONG["video" if family in tiny.VIDEO else "llava"]


def uneven(family):
    """Rows of one picture, more visual tokens, none. OneVision does not cut pictures into crops where a row holds several."""
    if family == "llava_onevision":
        return [[3, ("img", (56, 56)), 5], [1, "img", 7], [4]]
    return [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
