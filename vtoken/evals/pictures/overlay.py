"""Draws which cells of an image a pipeline kept. Pillow only."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import accumulate
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from vtoken.evals.shared.media import Media
from vtoken.hooks.state.trace import Trace
from vtoken.stages import Grid, Parts, size_of

LINE = (255, 255, 255)
GAP = 12  # pixels between pictures of a sheet
MOST = 4096  # pixels of the longer side, for grids that are one long row
VEIL = (72, 72, 72)  # lighter than a dark photograph, darker than a bright one: kept cells stand out from both
# Okabe and Ito's palette: neighbouring groups of merged tokens stay apart for colour-blind readers too.
GROUPS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def overlay(
    picture: Image.Image,
    kept: Iterable[int],
    grid: Grid,
    into: Sequence[int] | None = None,
    dim: float = 0.45,
    side: int = 480,
    caption: str | None = None,
    first: int = 0,
) -> Image.Image:
    """Draws the kept cells in colour within thin borders; dropped cells lie under a grey veil.

    Args:
        picture: the image as the model saw it, so that the grid covers all of it.
        kept: indices of the image's kept tokens (a list or an int tensor); those of other rasters are left out.
        grid: (frames, rows, columns); frames must be 1, `drawn` takes videos apart.
        into: for every token of the image the kept token that absorbed it, -1 = dropped. Merged cells keep half their
            light and share a tint with the kept cell, whose border has that tint.
        dim: how far dropped cells show through the veil, 0 to 1.
        side: least pixels of the shorter side (grids of one long row stay lower). Cells get whole pixels, so it may be
            longer.
        caption: a line under the picture.
        first: index of the grid's first token in the image.
    """
    frames, rows, columns = grid
    if frames != 1:
        raise ValueError(f"the grid has {frames} frames; draw one frame at a time")
    here = range(first, first + rows * columns)
    survivors = sorted(int(k) for k in kept)
    absorbed = _merged(survivors, into)
    # Tints are given out over the whole image: a token may end in one of another frame.
    tints = {token: GROUPS[k % len(GROUPS)] for k, token in enumerate(sorted(set(absorbed.values())))}
    alive = [token - first for token in survivors if token in here]
    merged = {token - first: tints[owner] for token, owner in absorbed.items() if token in here}

    cell = min(math.ceil(side / min(rows, columns)), max(4, MOST // max(rows, columns)))
    size = (columns * cell, rows * cell)
    seen = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    out = Image.blend(Image.new("RGB", size, VEIL), seen.convert("L").convert("RGB"), dim)

    def cells(mode: str, values: dict[int, Any]) -> Image.Image:
        """A picture of whole cells, black where there is no value."""
        small = Image.new(mode, (columns, rows))
        for token, value in values.items():
            small.putpixel((token % columns, token // columns), value)
        return small.resize(size, Image.Resampling.NEAREST)

    if merged:
        tinted = Image.blend(ImageEnhance.Brightness(seen).enhance(0.5), cells("RGB", merged), 0.25)
        out.paste(tinted, mask=cells("L", dict.fromkeys(merged, 255)))
    out.paste(seen, mask=cells("L", dict.fromkeys(alive, 255)))
    draw = ImageDraw.Draw(out)
    for token in alive:
        left, top = token % columns * cell, token // columns * cell
        right, bottom = min(left + cell, size[0] - 1), min(top + cell, size[1] - 1)  # neighbours share a line
        draw.rectangle((left, top, right, bottom), outline=tints.get(token + first, LINE))
    return captioned(out, caption) if caption else out


def drawn(
    views: Sequence[Image.Image],
    parts: Parts,
    kept: Iterable[int],
    into: Sequence[int] | None = None,
    side: int = 480,
    columns: int = 0,
) -> Image.Image:
    """All rasters of one image or video, each over its view, as one picture; several get a label with their counts.

    Args:
        views: a picture per raster, as `views` below gives them; for a video its frames, one or more per raster.
        parts: rasters of the image, as in the trace.
        kept, into: over the tokens of all rasters.
        side: as in `overlay`, of each tile.
        columns: tiles per row, 0: all in one.

    Raises:
        ValueError: views that do not fit the rasters, or a kept token outside of them.
    """
    alive = [int(k) for k in kept]
    if alive and not 0 <= min(alive) <= max(alive) < size_of(parts):
        raise ValueError(f"kept token {max(alive)} lies outside rasters of {size_of(parts)} tokens")
    grids = [(1, h, w) for t, h, w in parts for _ in range(t)]
    video, whole = len(parts) == 1 and len(grids) > 1, len(set(parts)) > 1
    step = max(1, math.ceil(len(views) / len(grids))) if video else 1
    if math.ceil(len(views) / step) != len(grids):
        raise ValueError(f"{len(grids)} rasters but {len(views)} pictures to draw them on")
    tiles, first = [], 0
    for k, grid in enumerate(grids):
        frames = range(k * step + 1, min((k + 1) * step, len(views)) + 1)
        size = size_of((grid,))
        count = sum(first <= token < first + size for token in alive)
        number = f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]}-{frames[-1]}"
        name = number if video else ("whole", "crops")[k] if whole else f"crop {k + 1}"
        label = f"{name}: {count} of {size}" if len(grids) > 1 else None
        tiles.append(overlay(views[k * step], alive, grid, into, side=side, caption=label, first=first))
        first += size
    return sheet(tiles, columns, background="white")


def sheet(pictures: Sequence[Image.Image], columns: int = 0, background: str = "#808080") -> Image.Image:
    """Pictures side by side, `columns` per row (0: all in one row), with a gap between and around them; a single one as
    it is."""
    if len(pictures) == 1:
        return pictures[0]
    columns = min(columns or len(pictures), len(pictures))
    lines = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    heights = [max(p.height for p in line) for line in lines]
    widths = [max(p.width for p in pictures[k::columns]) for k in range(columns)]
    lefts, tops = ([*accumulate(lengths, lambda a, b: a + b + GAP, initial=GAP)] for lengths in (widths, heights))
    out = Image.new("RGB", (lefts[-1], tops[-1]), background)
    for k, picture in enumerate(pictures):
        out.paste(picture, (lefts[k % columns], tops[k // columns]))
    return out


def encoded(picture: Image.Image, kind: Literal["JPEG", "PNG"]) -> bytes:
    """The file of a picture."""
    file = BytesIO()
    picture.convert("RGB").save(file, kind, quality=85)
    return file.getvalue()


def data_uri(picture: Image.Image, kind: Literal["JPEG", "PNG"]) -> str:
    """A picture for HTML, whole in its address."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(picture, kind)).decode()}"


def scaled(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(width * picture.height / picture.width)), Image.Resampling.BICUBIC)


def views(processor: Any, pixel_values: Any, media: Media, parts: Sequence[Parts]) -> list[list[Image.Image]]:
    """For every image the picture behind each of its rasters: as the tower saw it, or the original.

    Args:
        processor: a Hugging Face processor or image processor.
        pixel_values: [images, 3, H, W] or [images, crops, 3, H, W], crop 0 being the whole; [crops, 3, H, W] or
            [rows, crops, 3, H, W], padded with zeros, where every raster is a crop; pictures of their own size are
            padded to the largest; or [crops, patches, channels], padded.
            With patches [patches, channels], or None, the processor resized without cropping, so that a raster covers
            the original.
        media: the originals.
        parts: rasters of each image, as in the trace.
    """
    if media.video:
        return [list(media.pictures)]
    found: list[list[Image.Image]] = []
    if pixel_values is not None and pixel_values.dim() >= 4 and all(len(set(rasters)) == 1 for rasters in parts):
        shown = pixel_values.reshape(-1, *pixel_values.shape[-3:])
        real = (shown != 0).flatten(1).any(1)
        if int(real.sum()) == sum(map(len, parts)):
            crops = iter(shown[real])
            return [[as_seen(processor, within(next(crops), raster, parts)) for raster in rasters] for rasters in parts]
    if pixel_values is not None and pixel_values.dim() == 3 and len(pixel_values) == sum(map(len, parts)):
        crops = iter(pixel_values)
        return [
            [as_seen(processor, of_patches(processor, next(crops), raster)) for raster in rasters] for rasters in parts
        ]
    for k, (picture, rasters) in enumerate(zip(media.pictures, parts, strict=True)):
        pixels = None if pixel_values is None or pixel_values.dim() < 4 else pixel_values[k]
        whole = picture if pixels is None else as_seen(processor, pixels.reshape(-1, *pixels.shape[-3:])[0])
        found.append([whole, picture][: len(rasters)])
    return found


def of_patches(processor: Any, patches: Any, raster: Grid) -> Any:
    """[3, H, W] of a crop's patches [P, side * side * 3], row by row and padded."""
    images = getattr(processor, "image_processor", processor)
    side, (rows, columns) = images.encoder_patch_size, (n * images.downsample_factor for n in raster[1:])
    cells = patches[: rows * columns].view(rows, columns, side, side, -1)
    return cells.permute(4, 0, 2, 1, 3).reshape(-1, rows * side, columns * side)


def within(pixels: Any, raster: Grid, parts: Sequence[Parts]) -> Any:
    """Pixels [3, H, W] without what pads them to those of the largest raster of all images."""
    _, rows, columns = raster
    most, widest = (max(each[k] for rasters in parts for each in rasters) for k in (1, 2))
    return pixels[:, : pixels.shape[1] * rows // most, : pixels.shape[2] * columns // widest]


def as_seen(processor: Any, pixels: Any) -> Image.Image:
    """Processed pixels [3, H, W] with the normalisation undone."""
    images = getattr(processor, "image_processor", processor)
    pixels = pixels.float().cpu()
    if getattr(images, "do_normalize", True) and images.image_mean is not None:
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (images.image_mean, images.image_std))
        pixels = pixels * std + mean
    levels = (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(levels)


def owners(trace: Trace, image: int) -> list[int] | None:
    """For every unpruned token of an image the kept token it ended in after all stages, -1 = dropped; None if none
    merged."""
    last = next((stage for stage in reversed(trace.stages) if stage.kept and stage.site != "cache"), None)
    return last.into[image].tolist() if last and last.into else None


def _merged(alive: Sequence[int], into: Sequence[int] | None) -> dict[int, int]:
    """Token that was merged -> the kept token it is in."""
    slots = set(alive)
    pairs = enumerate(int(t) for t in into) if into is not None else ()
    return {token: owner for token, owner in pairs if owner in slots and token != owner}


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture with a caption below, broken into lines."""
    size = min(max(16, picture.width // 40), 24)
    font = ImageFont.load_default(size)
    words, lines = caption.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > picture.width - 16:
            lines.append(word)
        else:
            lines[-1] = longer
    step = int(size * 1.4)
    out = Image.new("RGB", (picture.width, picture.height + step * len(lines) + 10), "white")
    out.paste(picture)
    for k, line in enumerate(lines):
        ImageDraw.Draw(out).text((8, picture.height + 5 + k * step), line, font=font, fill="black")
    return out
