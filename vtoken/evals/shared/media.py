"""Pictures and videos from disk, the one place that opens them. A video is a folder of frames, an animation, or a file
that PyAV decodes.

Pictures look as in transformers' own loader (upright, RGB, the first of several in a file), but 16 bits are scaled down
to 8 and not cut off. Only formats of pixels are opened: some others that Pillow knows start a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vtoken.errors import ConfigError, shown

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
CONTAINERS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
Choose = Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class Media:
    """What a prompt shows, RGB: pictures, or the frames of one video (then `video` is true)."""

    pictures: tuple[Image.Image, ...]
    video: bool = False

    @property
    def items(self) -> int:
        """Images or videos in the prompt."""
        return 1 if self.video else len(self.pictures)


def read(paths: Sequence[Path], frames: int = 8) -> Media:
    """Reads pictures, or one video, of which at most `frames` evenly spaced frames."""
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    videos = [path for path in paths if is_video(path)]
    if videos and len(paths) > 1:
        raise ConfigError(f"{videos[0]} is a video; give one video, or pictures only")
    if not videos:
        return Media(tuple(map(still, paths)))

    def spread(total: int) -> Sequence[int]:
        count = min(frames, total)
        return [(2 * k + 1) * total // (2 * count) for k in range(count)]

    return Media(film(videos[0], spread), video=True)


def still(path: Path) -> Image.Image:
    """A picture, RGB; of an animation the first frame."""
    with _opened(path) as file:
        return rgb(file)


def film(path: Path, choose: Choose) -> tuple[Image.Image, ...]:
    """Frames of a folder, an animation or a video file, RGB.

    Args:
        choose: number of frames -> which of them, in order; only those are kept.
    """
    if os.path.isdir(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes())
        if not files:
            raise ConfigError(f"folder {path} holds no pictures; frames of a video are files such as 000.png, 001.png")
        return tuple(still(files[k]) for k in choose(len(files)))
    if path.suffix.lower() in CONTAINERS:
        return decoded(path, choose)[0]
    found = []
    with _opened(path) as file:
        for k in choose(getattr(file, "n_frames", 1)):
            file.seek(k)
            found.append(rgb(file))
    return tuple(found)


def decoded(path: Path, choose: Choose) -> tuple[tuple[Image.Image, ...], float, int]:
    """Frames of a video file, RGB, frames per second, and how many frames it says it has.

    Raises:
        ConfigError: it cannot be read, or PyAV is missing.
    """
    try:
        import av
    except ImportError:
        raise ConfigError(f"{path.name}: video files are decoded by PyAV: pip install 'av>=12,<16'") from None
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            rate = float(stream.average_rate or 1)
            total = stream.frames or sum(1 for _ in file.decode(video=0))  # WebM does not say
            file.seek(0)
            wanted = choose(total)
            frames = zip(range(wanted[-1] + 1), file.decode(video=0), strict=False)
            found = {k: frame.to_image() for k, frame in frames if k in wanted}
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise ConfigError(f"cannot read video {shown(str(path))[1:-1]}: {str(error)[:200]}") from error
    # Some containers promise more frames than they hold.
    return tuple(found[k] for k in wanted if k in found), rate, total


def is_video(path: Path) -> bool:
    """Whether it is a folder, an animation or a video file."""
    if os.path.isdir(path) or path.suffix.lower() in CONTAINERS:
        return True
    with _opened(path) as file:
        return file.format in ANIMATED and getattr(file, "n_frames", 1) > 1


def rgb(picture: Image.Image) -> Image.Image:
    """An opened picture upright, with three channels of 8 bits."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode[0] in "IF":  # Pillow cuts off what is above 255.
        levels = np.asarray(upright)
        if upright.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ConfigError("it holds fractions or more than 16 bits; save it with 8 or 16 bits per channel")
        upright = Image.fromarray(((levels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    return upright.convert("RGB")


def suffixes() -> set[str]:
    """What names of picture files end in: .png, .jpg and others."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with Image.open(path, formats=known) as file:
            yield file
    except Exception as error:  # Pillow has no base class for what damaged files, bombs and odd paths raise.
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}, or damaged"
        raise ConfigError(f"cannot read picture {shown(str(path))[1:-1]}: {reason[:200]}") from error
