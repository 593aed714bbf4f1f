"""What commands have in common: options that say what a prompt shows."""

from __future__ import annotations

import argparse
import math


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Declares --image-size, --images and --frames."""
    parser.add_argument(
        "--image-size",
        type=_image_size,
        metavar="N|HxW",
        help="pixels of an image or frame (default: the vision tower's own size, 448x448 for Qwen); LLaVA-1.5 ignores it, so does "
        "OneVision for videos and several images",
    )
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    parser.add_argument(
        "--frames",
        type=int,
        default=1,
        metavar="N",
        help="frames per image, which makes it a video (default: %(default)s, a still)",
    )


def number(text: str) -> float:
    """A finite number, as the type of an option."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number; write one such as 0.5")
    return found


def _image_size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; write 336 or 480x640 (height x width)")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
