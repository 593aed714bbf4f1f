"""Batches for the tiny models, without processors, and the models themselves under one name."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from families import FOUND
from family import Family, Picture
from tiny_models import GRID, IMG, PAD, SIZE, TEXT, TOKENS, TOWERS, VID, VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from vtoken import registry
from vtoken.adapters.base import Adapter

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
    "adapter",
    "build",
    "each",
    "families",
    "family",
    "llava",
    "make",
    "normed",
    "segments",
    "types",
]

Item = int | str | tuple[Any, ...]


class Segment(NamedTuple):
    """All placeholders of one image or video, newline tokens included: their batch row and columns, ascending."""

    row: int
    columns: Tensor
    kind: str


def families(**traits: Any) -> tuple[str, ...]:
    """The families, as config.model_type names them, of which all this is true: `families(anyres=True)`; see
    `family.Family`."""
    return tuple(name for name, found in FOUND.items() if all(getattr(found, t) == v for t, v in traits.items()))


def each(*traits: str, **given: Any) -> tuple[str, ...]:
    """One family for every combination of these traits, the first by name, leading ones before others, among those of
    which all of `given` is true."""
    found: dict[tuple[Any, ...], str] = {}
    for name in (*families(**given, leading=True), *families(**given, leading=False)):
        found.setdefault(tuple(getattr(FOUND[name], trait) for trait in traits), name)
    return tuple(found.values())


FAMILIES = families()
VIDEO = families(takes_video=True)


def family(of: str | PreTrainedModel) -> Family:
    """By name, or that of a model."""
    name = of if isinstance(of, str) else of.config.model_type
    if name not in FOUND:
        raise ValueError(f"no tiny model of family {name!r}; there are {', '.join(FOUND)}")
    return FOUND[name]


def adapter(model: PreTrainedModel) -> Adapter:
    """A new adapter around a model."""
    return registry.adapter(model.config.model_type)(model)


_MADE: dict[str, PreTrainedModel] = {}  # copies cost half of what models do


def make(name: str, attn: str = "sdpa", seed: int = 0, **text_overrides: Any) -> PreTrainedModel:
    """A model of a family, in evaluation mode, float32 on the CPU: the same weights for the same arguments, whatever
    ran before.

    Args:
        name: one of `FAMILIES`.
        attn: attention implementation of tower and decoder.
        seed: of the weights; torch's global generator is left as it was.
        text_overrides: fields of the decoder's config, over `TEXT`; for "llava" also `tower` (see `TOWERS`) and `text`,
            the model_type of the decoder.
    """
    key = repr((name, attn, seed, sorted(text_overrides.items())))
    if key not in _MADE:
        if len(_MADE) == 64:
            _MADE.pop(next(iter(_MADE)))
        _MADE[key] = family(name).make(attn, seed, **text_overrides)
    return deepcopy(_MADE[key])


def normed(model: PreTrainedModel, x: Tensor) -> Tensor:
    """Hidden states through the decoder's last norm."""
    lm: Any = model.get_decoder()
    out: Tensor = getattr(lm, registry.adapter(model.config.model_type).final_norm)(x)
    return out


def llava(attn: str = "sdpa", seed: int = 0, **options: Any) -> PreTrainedModel:
    return make("llava", attn, seed, **options)


def build(model: PreTrainedModel, rows: Sequence[Sequence[Item]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch for `model(**batch)` and `model.generate(**batch)`.

    Args:
        model: from this file; gives family and device.
        rows: one list per batch row: an int is that many random text tokens, "img" a random image, "video" a random
            video. `("img", (100, 60))` gives an anyres image by its height and width in pixels, `("img", (1, 4, 8))` a
            Qwen image by its grid in patches; `("video", 4)` has 4 frames, `("video", 4, 4, 8)` is a Qwen grid of 4
            frames (pairs of frames of the video) of 4 x 8 patches. For LLaVA `[[3, "img", 5], [2]]` is a row of 24
            tokens and a text-only row of 2, padded to 24.
        seed: of text and pictures.

    Returns:
        `input_ids` and `attention_mask` [B, L] int64, and what the family's processor returns for these pictures:
        `pixel_values` and `pixel_values_videos`, `image_sizes` [images, 2] and `batch_num_images` [B] (OneVision, when
        a row has several images), or `image_grid_thw`, `video_grid_thw` [n, 3], `mm_token_type_ids` [B, L] and, for
        Qwen2.5-VL, `second_per_grid_ts` [videos].

    Raises:
        ValueError: an item that is none of these, or that the family cannot take.
    """
    kind, generator = family(model), torch.Generator().manual_seed(seed)

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
            picture = _picture(kind, item, single=kind.crops_one_only and images > 1)
            pictures.append(picture)
            ids[-1] += kind.placeholders(picture, words)
    length = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    batch |= kind.inputs(pictures, lambda *shape: torch.randn(*shape, generator=generator))
    batch |= kind.beside(batch["input_ids"], images_of)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def types(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What a processor says of the ids [B, L] of a prompt with images: which are theirs, for families that ask."""
    name = family(model).types
    return {name: (ids == IMG).long()} if name else {}


def segments(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Segment]:
    """The images and videos of a batch from `build`, in reading order: rows from top to bottom, columns from left to
    right."""
    ids, one = batch["input_ids"].cpu(), family(model)
    images, videos = one.found(batch)
    found = []
    for kind, pictures in (("image", images), ("video", videos)):
        own = ids == one.marker(kind)
        line, column = (own | one.breaks(ids) if kind == "image" else own).nonzero(as_tuple=True)
        start = 0
        for picture in pictures:
            stop = start + one.tokens(picture)
            (row,) = set(line[start:stop].tolist())
            found.append(Segment(row, column[start:stop], kind))
            start = stop
    return sorted(found, key=lambda s: (s.row, int(s.columns[0])))


def _picture(kind: Family, item: str | tuple[Any, ...], single: bool) -> Picture:
    name, *given = (item,) if isinstance(item, str) else item
    spec = kind.sized(name, tuple(*given) if name == "img" else tuple(given))
    if spec is None:
        takes = 'a number of text tokens, "img"' + (', "video"' if kind.takes_video else "")
        raise ValueError(f"{item!r} in rows: {kind.name} takes {takes}; see tiny.build for how their sizes are given")
    # A video is never cut into crops.
    return Picture("image", spec, single) if name == "img" else Picture("video", spec)
