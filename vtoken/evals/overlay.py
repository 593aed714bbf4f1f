"""Pictures of a decision: which cells of an image a pipeline kept. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from vtoken.run import Trace
from vtoken.stages import Grid

LINE = (255, 255, 255)
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
) -> Image.Image:
    """Draws the kept cells in colour behind thin borders; dropped cells lie under a grey veil.

    Args:
        picture: the image as the model saw it, so that the grid covers all of it.
        kept: raster indices of the kept tokens (a list or an int tensor).
        grid: (frames, rows, columns); frames must be 1, draw the frames of a video one by one.
        into: for every token the kept token that absorbed it, -1 = dropped. Merged cells keep half their light
            and share a tint with the kept cell, whose border has that tint.
        dim: how far dropped cells show through the veil, 0 to 1.
        side: least length of the shorter side, in pixels (grids of one long row stay lower). Cells get whole pixels,
            so the result may be larger.
        caption: a line under the picture.

    Returns:
        RGB, rows x columns cells of equal whole size, plus the caption.

    Raises:
        ValueError: a grid with several frames, or an index outside the grid.
    """
    frames, rows, columns = grid
    alive = sorted(int(k) for k in kept)
    if frames != 1:
        raise ValueError(f"the grid has {frames} frames; draw one frame at a time")
    if alive and not 0 <= alive[0] <= alive[-1] < rows * columns:
        raise ValueError(f"kept token {alive[-1]} lies outside a grid of {rows} x {columns}")

    cell = min(math.ceil(side / min(rows, columns)), max(4, MOST // max(rows, columns)))
    size = (columns * cell, rows * cell)
    seen = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    out = Image.blend(Image.new("RGB", size, VEIL), seen.convert("L").convert("RGB"), dim)
    merged = _merged(alive, into)
    tint = {token: GROUPS[k % len(GROUPS)] for k, token in enumerate(sorted(set(merged.values())))}
    if merged:
        colours = Image.new("RGB", (columns, rows))
        for token, owner in merged.items():
            colours.putpixel((token % columns, token // columns), tint[owner])
        veil = Image.blend(ImageEnhance.Brightness(seen).enhance(0.5), _stretch(colours, size), 0.25)
        out.paste(veil, mask=_stretch(_mask(merged, rows, columns), size))
    out.paste(seen, mask=_stretch(_mask(alive, rows, columns), size))

    draw = ImageDraw.Draw(out)
    for token in alive:
        left, top = token % columns * cell, token // columns * cell
        right, bottom = min(left + cell, size[0] - 1), min(top + cell, size[1] - 1)  # neighbours share a line
        draw.rectangle((left, top, right, bottom), outline=tint.get(token, LINE))
    return _captioned(out, caption) if caption else out


def sheet(pictures: Sequence[Image.Image], columns: int = 0, gap: int = 12, background: str = "#808080") -> Image.Image:
    """Pictures side by side, `columns` per row (0: all in one row), `gap` pixels between and around them."""
    columns = columns or len(pictures)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = math.ceil(len(pictures) / columns)
    out = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), background)
    for k, picture in enumerate(pictures):
        out.paste(picture, (gap + k % columns * (width + gap), gap + k // columns * (height + gap)))
    return out


def as_seen(processor: Any, pixel_values: Any, picture: Image.Image) -> list[Image.Image]:
    """What the vision tower saw: the processed pixels with the normalisation undone, one picture per crop.

    Args:
        processor: a Hugging Face processor or image processor.
        pixel_values: [1, 3, H, W] or [1, crops, 3, H, W]. Other shapes (flattened patches) belong to processors that
            resize without cropping: the original picture is returned, since the grid covers all of it.
        picture: the original.
    """
    if pixel_values is None or pixel_values.dim() not in (4, 5):
        return [picture.convert("RGB")]
    images = getattr(processor, "image_processor", processor)
    pixels = pixel_values.float().cpu().reshape(-1, *pixel_values.shape[-3:])
    if getattr(images, "do_normalize", True) and images.image_mean is not None:
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (images.image_mean, images.image_std))
        pixels = pixels * std + mean
    levels = (pixels * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(level) for level in levels]


def owners(trace: Trace, image: int) -> list[int] | None:
    """For every unpruned token of an image the kept token it ended in after all stages, -1 = dropped; None if none merged."""
    last = next((stage for stage in reversed(trace.stages) if stage.kept), None)
    return last.into[image].tolist() if last and last.into else None


def _merged(alive: Sequence[int], into: Sequence[int] | None) -> dict[int, int]:
    """Tokens that live on in another one, and that one."""
    slots = set(alive)
    pairs = enumerate(int(t) for t in into) if into is not None else ()
    return {token: owner for token, owner in pairs if owner in slots and token != owner}


def _mask(tokens: Iterable[int], rows: int, columns: int) -> Image.Image:
    mask = Image.new("L", (columns, rows))
    for token in tokens:
        mask.putpixel((token % columns, token // columns), 255)
    return mask


def _stretch(cells: Image.Image, size: tuple[int, int]) -> Image.Image:
    return cells.resize(size, Image.Resampling.NEAREST)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    size = max(14, picture.width // 34)
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
