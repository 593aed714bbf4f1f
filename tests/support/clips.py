"""Short videos made for a test: by PyAV, or where that is not needed by Pillow."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

CODECS = {".mp4": "mpeg4", ".webm": "libvpx"}
KINDS = (*CODECS, ".gif")


def write(folder: Path, kind: str, frames: int = 8, side: int = 64) -> Path:
    """clip.mp4, clip.webm or clip.gif of squares that get brighter; skips the test where PyAV is missing."""
    file = folder / f"clip{kind}"
    pictures = [Image.new("RGB", (side, side), (30 * k,) * 3) for k in range(frames)]
    if kind == ".gif":
        pictures[0].save(file, save_all=True, append_images=pictures[1:])
        return file
    av = pytest.importorskip("av", reason="video files are decoded by PyAV, the extra `video`")
    with av.open(str(file), "w", format=kind[1:].lower()) as out:
        stream = out.add_stream(CODECS[kind.lower()], rate=5)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_image(picture).reformat(format="yuv420p")))
        out.mux(stream.encode())
    return file
