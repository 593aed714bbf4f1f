"""A trace as pictures: which cells of the prompt's images were kept, dropped and merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vtoken.evals.pictures.overlay import captioned, data_uri, drawn, owners, scaled, sheet, views
from vtoken.evals.shared.media import Media, rgb
from vtoken.hooks.state.run import pixels_of
from vtoken.hooks.state.trace import Trace
from vtoken.stages import Parts, size_of

# Least side of a tile in pixels, by how many there are.
SIDES = {1: 720, 2: 480, 3: 480}
MANY = 280
SMOOTH = Image.Resampling.BICUBIC
COLUMNS = 4


def picture(processor: Any, pixel_values: Any, media: Media, seen: Trace, caption: str = "") -> Image.Image:
    """Kept cells bordered, dropped cells grey, merged cells tinted.

    Raises:
        ValueError: the trace is of another number of images.
    """
    if len(seen.parts) != media.items:
        raise ValueError(f"the prompt shows {media.items} images but the trace has {len(seen.parts)}")
    tiles = sum(t for parts in seen.parts for t, _, _ in parts)
    side = SIDES.get(tiles, MANY)
    pictures = [
        drawn(*as_resized(seen, k, view), side=side, columns=COLUMNS)
        for k, view in enumerate(views(processor, pixel_values, media, seen.parts))
    ]
    whole = sheet(pictures, columns=2, background="white")
    return captioned(whole, caption) if caption else whole


def as_resized(
    seen: Trace, image: int, view: list[Image.Image]
) -> tuple[list[Image.Image], Parts, Sequence[int], list[int] | None]:
    """Views of an image, its rasters, its kept tokens, and for every token the kept one it is merged into; of the
    smaller picture, where a stage resized it."""
    parts, kept, into = seen.parts[image], seen.kept[image].tolist(), owners(seen, image)
    first = next((stage.resized[image] for stage in seen.stages if stage.resized), None)
    if first is None or (first,) == parts:
        return view, parts, kept, into
    (_, height, width), (_, rows, columns) = parts[0], first
    # The smaller picture's tokens are those of the upper left corner.
    corner = np.arange(size_of(parts)).reshape(parts[0])[:, :rows, :columns].flatten().tolist()
    place = {-1: -1, **{token: k for k, token in enumerate(corner)}}
    if into is not None:
        into = [place[into[token]] for token in corner]
    small = [
        picture.resize((-(-picture.width * columns // width), -(-picture.height * rows // height)), SMOOTH)
        for picture in view
    ]
    return small, (first,), [place[token] for token in kept], into


def for_page(processor: Any, inputs: Any, media: Media, seen: Trace | None, columns: int) -> list[Image.Image]:
    """Every image with what was kept of it, for a page that shows it some 260 pixels wide: labels of several rasters
    stay legible there. Without a trace all pictures and frames as they are."""
    if seen is None:
        return [scaled(each, 480) for each in media.pictures]
    return [
        drawn(*as_resized(seen, k, view), 480 if len(view) == 1 else 240, columns)
        for k, view in enumerate(views(processor, pixels_of("image", inputs), media, seen.parts))
    ]


def uri(seen: Trace, pictures: Sequence[Image.Image], processor: Any) -> str:
    """`picture` as a data URI for HTML.

    Args:
        pictures: one per image of the trace, or the frames of its only video.
        processor: crops the pictures as the model saw them; None where it saw all of them.
    """
    video = len(seen.parts) == 1 and seen.parts[0][0][0] > 1
    media = Media(tuple(map(rgb, pictures)), video=video)
    images, pixels = getattr(processor, "image_processor", processor), None
    if images is not None and not video:
        pixels = pixels_of("image", images(images=list(media.pictures), return_tensors="pt"))
    return data_uri(picture(processor, pixels, media, seen), "PNG")
