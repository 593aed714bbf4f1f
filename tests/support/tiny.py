"""Batches for the tiny models, without processors, and the models themselves under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from tiny_models import (
    FAMILIES,
    GRID,
    IMG,
    PAD,
    PATCH,
    PINPOINTS,
    SIZE,
    TEXT,
    TOKENS,
    TOWERS,
    VID,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    llava,
    make,
)
from torch import Tensor
from transformers import PreTrainedModel

__all__ = [
    "FAMILIES",
    "GRID",
    "IMG",
    "PAD",
    "SIZE",
    "TEXT",
    "TOKENS",
    "TOWERS",
    "VID",
    "VIDEO",
    "VOCAB",
    "build",
    "llava",
    "make",
    "segments",
]

# What "img" and "video" stand for: (height, width) in pixels, frames, or a grid (frames, height, width) in patches.
IMAGES: dict[str, tuple[int, ...]] = {
    "llava": (SIZE, SIZE),
    "llava_next": (100, 60),
    "llava_onevision": (100, 60),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (1, 4, 8)),
}
VIDEOS: dict[str, tuple[int, ...]] = {
    "llava_onevision": (3,),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (2, 4, 4)),
}

Item = int | str | tuple[Any, ...]


class Picture(NamedTuple):
    """An image or video of a batch. `single`: OneVision encodes it as one crop, as every image of a row that has several."""

    kind: str
    spec: tuple[int, ...]
    single: bool = False


class Segment(NamedTuple):
    """All placeholders of one image or video, newline tokens included: their batch row and columns, ascending."""

    row: int
    columns: Tensor
    kind: str


def build(model: PreTrainedModel, rows: Sequence[Sequence[Item]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch for `model(**batch)` and `model.generate(**batch)`.

    Args:
        model: from this file; gives family and device.
        rows: one list per batch row: an int is that many random text tokens, "img" a random image, "video" a random video.
            `("img", (100, 60))` gives an anyres image by its height and width in pixels, `("img", (1, 4, 8))` a Qwen image by
            its grid in patches; `("video", 4)` has 4 frames, `("video", 4, 4, 8)` is a Qwen grid of 4 frames (pairs of frames
            of the video) of 4 x 8 patches. For LLaVA `[[3, "img", 5], [2]]` is a row of 24 tokens and a text-only row of 2,
            padded to 24.
        seed: of text and pictures.

    Returns:
        `input_ids` and `attention_mask` [B, L] int64, and what the family's processor returns for these pictures:
        `pixel_values` and `pixel_values_videos`, `image_sizes` [images, 2] and `batch_num_images` [B] (OneVision, when a row has
        several images), or `image_grid_thw`, `video_grid_thw` [n, 3], `mm_token_type_ids` [B, L] and, for Qwen2.5-VL,
        `second_per_grid_ts` [videos].

    Raises:
        ValueError: an item that is none of these, or that the family cannot take.
    """
    family = model.config.model_type
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(10, 180, (n,), generator=generator).tolist()

    ids: list[list[int]] = []
    pictures: list[Picture] = []
    images_of = [sum(not isinstance(i, int) and i[0] != "video" and i != "video" for i in row) for row in rows]
    for row, images in zip(rows, images_of, strict=True):
        ids.append([])
        for item in row:
            if isinstance(item, int):
                ids[-1] += words(item)
                continue
            picture = _picture(family, item, single=family == "llava_onevision" and images > 1)
            pictures.append(picture)
            ids[-1] += _placeholders(family, picture, words)
    length = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    batch |= _encoder_inputs(family, pictures, lambda *shape: torch.randn(*shape, generator=generator))
    if family == "llava_onevision" and max(images_of) > 1:
        batch["batch_num_images"] = torch.tensor(images_of)
    if family.startswith("qwen") and pictures:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMG).long() + 2 * (batch["input_ids"] == VID)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def segments(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Segment]:
    """The images and videos of a batch from `build`, in reading order: rows from top to bottom, columns from left to right."""
    family, ids = model.config.model_type, batch["input_ids"].cpu()
    images, videos = _specs(family, batch)
    found = []
    for kind, placeholder, specs in (("image", IMG, images), ("video", VID, videos)):
        line, column = (ids == placeholder).nonzero(as_tuple=True)
        start = 0
        for picture in specs:
            stop = start + _tokens(family, picture)
            (row,) = set(line[start:stop].tolist())
            found.append(Segment(row, column[start:stop], kind))
            start = stop
    return sorted(found, key=lambda s: (s.row, int(s.columns[0])))


def _specs(family: str, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
    """The images and the videos of a batch."""
    pixels, videos = (list(batch.get(name, ())) for name in ("pixel_values", "pixel_values_videos"))
    if family == "llava":
        return [Picture("image", IMAGES[family])] * len(pixels), []
    if family == "llava_onevision":
        clips = [Picture("video", (len(v),)) for v in videos]
    else:
        clips = [Picture("video", tuple(g)) for g in _rows(batch, "video_grid_thw")]
    sizes = _rows(batch, "image_grid_thw") or _rows(batch, "image_sizes")
    single = [n > 1 for n in _rows(batch, "batch_num_images") for _ in range(n)] or [False] * len(sizes)
    return [Picture("image", tuple(s), one) for s, one in zip(sizes, single, strict=True)], clips


def _rows(batch: dict[str, Tensor], name: str) -> list[Any]:
    return batch[name].tolist() if name in batch else []


def _picture(family: str, item: str | tuple[Any, ...], single: bool) -> Picture:
    name, *given = (item,) if isinstance(item, str) else item
    if name == "img" and (not given or (family != "llava" and len(*given) == len(IMAGES[family]))):
        return Picture("image", tuple(*given) or IMAGES[family], single)
    if name == "video" and family in VIDEO and len(given) <= len(VIDEOS[family]):
        return Picture("video", tuple(given) + VIDEOS[family][len(given) :])
    takes = 'a number of text tokens, "img"' + (', "video"' if family in VIDEO else "")
    raise ValueError(f"{item!r} in rows: {family} takes {takes}; see tiny.build for how their sizes are given")


def _placeholders(family: str, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
    """The ids that a processor writes for a picture."""
    run = [IMG if picture.kind == "image" else VID] * _tokens(family, picture)
    if not family.startswith("qwen"):
        return run
    if family != "qwen3_vl" or picture.kind == "image":
        return [VISION_START, *run, VISION_END]
    frames, ids = picture.spec[0], []
    for _ in range(frames):
        ids += [*words(2), VISION_START, *run[: len(run) // frames], VISION_END]  # two words stand for the timestamp
    return ids


def _encoder_inputs(family: str, pictures: Sequence[Picture], draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    images, videos = ([p for p in pictures if p.kind == kind] for kind in ("image", "video"))
    inputs: dict[str, Tensor] = {}
    if family.startswith("qwen"):
        for some, pixels, grid in ((images, "pixel_values", "image"), (videos, "pixel_values_videos", "video")):
            if some:
                inputs[pixels] = draw(sum(prod(p.spec) for p in some), 3 * 2 * PATCH * PATCH)
                inputs[f"{grid}_grid_thw"] = torch.tensor([p.spec for p in some])
        if family == "qwen2_5_vl" and videos:
            inputs["second_per_grid_ts"] = torch.ones(len(videos))
        return inputs
    if images and family == "llava":
        inputs["pixel_values"] = draw(len(images), 3, SIZE, SIZE)
    elif images:
        crops = [1 if p.single else _crops(family, p.spec) for p in images]
        inputs["pixel_values"] = torch.zeros(len(images), max(crops), 3, SIZE, SIZE)
        for pixels, n in zip(inputs["pixel_values"], crops, strict=True):
            pixels[:n] = draw(n, 3, SIZE, SIZE)
        inputs["image_sizes"] = torch.tensor([p.spec for p in images])
    if videos:
        frames = {p.spec[0] for p in videos}
        if len(frames) > 1:
            raise ValueError(
                f"videos of {sorted(frames)} frames in one batch: {family} takes videos of equal length only"
            )
        inputs["pixel_values_videos"] = draw(len(videos), *frames, 3, SIZE, SIZE)
    return inputs


def _crops(family: str, size: tuple[int, ...]) -> int:
    upstream = sys.modules[f"transformers.models.{family}.modeling_{family}"]
    return upstream.image_size_to_num_patches(list(size), PINPOINTS, SIZE)


@lru_cache
def _stock(family: str) -> Any:
    return make(family).model


@lru_cache
@torch.no_grad()
def _tokens(family: str, picture: Picture) -> int:
    """Placeholders of a picture, as many as the rows that an unwrapped model makes of it."""
    model = _stock(family)
    inputs = _encoder_inputs(family, [picture], torch.zeros)
    pixels = inputs.pop("pixel_values" if picture.kind == "image" else "pixel_values_videos")
    inputs.pop("second_per_grid_ts", None)
    if picture.single:
        inputs["batch_num_images"] = torch.tensor([2])
    features = getattr(model, f"get_{picture.kind}_features")(pixels, **inputs, return_dict=True).pooler_output[0]
    # Before 5.18 the newline that ends a OneVision video was added outside of the feature function.
    late = (
        family == "llava_onevision" and picture.kind == "video" and not torch.equal(features[-1], model.image_newline)
    )
    return len(features) + late
