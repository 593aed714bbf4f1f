"""Pictures and videos from disk. A video is a folder of frames or an animation; Pillow reads both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence, UnidentifiedImageError

from vtoken.errors import ConfigError


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
    """Reads pictures, or one video, of which at most `frames` evenly spaced frames.

    Raises:
        ConfigError: a file that Pillow does not read, a folder without pictures, `frames` below 1, or a video beside others.
    """
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    found = [_read(path) for path in paths]
    videos = [path for path, media in zip(paths, found, strict=True) if media.video]
    if videos and len(paths) > 1:
        raise ConfigError(f"{videos[0]} is a video; give one video, or pictures only")
    if videos:
        all_of = found[0].pictures
        count = min(frames, len(all_of))
        return Media(tuple(all_of[(2 * k + 1) * len(all_of) // (2 * count)] for k in range(count)), video=True)
    return Media(tuple(picture for media in found for picture in media.pictures))


def _read(path: Path) -> Media:
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in Image.registered_extensions())
            if not files:
                raise ConfigError(
                    f"folder {path} holds no pictures; frames of a video are files such as 000.png, 001.png"
                )
            return Media(tuple(_open(file) for file in files), video=True)
        with Image.open(path) as file:
            frames = tuple(frame.convert("RGB") for frame in ImageSequence.Iterator(file))
    except (OSError, UnidentifiedImageError) as error:
        raise _unreadable(path, error) from error
    return Media(frames, video=len(frames) > 1)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read picture {path}: {error}")
