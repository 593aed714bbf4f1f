"""Digits in one frame of a video: photographs without any around it, and a question that only that frame answers.

The answer names all of them from left to right. Its first word comes from the prefill; the others are what a cache, or
what is read of it, has left. Everything follows from length, depth and number of a needle. Photographs and fonts are
those of the held-out set.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .dialogue import ask
from .pictures import picture

LENGTHS = (8, 16, 32, 64)  # frames
SIDE = 96  # pixels of a frame
DEPTHS = (0, 25, 50, 75, 100)  # percent of the video in front of the needle
DIGITS = 2
SEED = 20269


@dataclass(frozen=True)
class Needle:
    """A question about the digits in frame `place`, and its answer."""

    frames: tuple[Image.Image, ...]
    place: int
    question: str
    answer: str


def needle(length: int, depth: int, number: int) -> Needle:
    """Draws one of `length` frames.

    Args:
        depth: percent, 0 for the first frame, 100 for the last.
        number: which one of these.
    """
    rng = np.random.RandomState([SEED, length, depth, number])
    place = round(depth / 100 * (length - 1))
    shown = picture(rng, "test", SIDE, (DIGITS, DIGITS))
    question, answer = ask(shown, "read", rng)
    empty = [picture(rng, "test", SIDE, (0, 0)).image for _ in range(length - 1)]
    return Needle((*empty[:place], shown.image, *empty[place:]), place, question, answer)
