"""A trace as pictures: which cells of the prompt's images were kept, dropped and merged."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from vtoken.evals.pictures.overlay import captioned, drawn, owners, sheet, views
from vtoken.evals.shared.media import Media, rgb
from vtoken.hooks.state.run import pixels_of
from vtoken.hooks.state.trace import Trace

# Least side of a tile in pixels, by how many there are.
SIDES = {1: 720, 2: 480, 3: 480}
MANY = 280
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
        drawn(view, seen.parts[k], seen.kept[k], owners(seen, k), side=side, columns=COLUMNS)
        for k, view in enumerate(views(processor, pixel_values, media, seen.parts))
    ]
    whole = pictures[0] if len(pictures) == 1 else sheet(pictures, columns=2, background="white")
    return captioned(whole, caption) if caption else whole


def for_page(processor: Any, inputs: Any, media: Media, seen: Trace, columns: int) -> list[Image.Image]:
    """Every image with what was kept of it, for a page that shows it some 260 pixels wide: labels of several rasters
    stay legible there."""
    return [
        drawn(view, seen.parts[k], seen.kept[k], owners(seen, k), 480 if len(view) == 1 else 240, columns)
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
    file = BytesIO()
    picture(processor, pixels, media, seen).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
