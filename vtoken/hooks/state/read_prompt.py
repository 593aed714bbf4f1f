"""A prompt that a model has read, in the form in which a draft is given it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReadPicture:
    """A picture of a prompt, or a piece of one where text stands between its pieces.

    Attributes:
        embeds: [N, D] of its tokens as they entered the language model; newline tokens are among them.
        last: place of its last token, whether that entered or not.
    """

    embeds: Tensor
    last: int


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt, without its padding and what was dropped. A place counts from 0 through the prompt as it was given,
    padding left out.

    Attributes:
        hidden: [T, D] last hidden states of the tokens that the last layer had.
        embeds: [T, D] these tokens as they entered the language model.
        places: [T] where they stand, ascending.
        visual: [T] which of them are parts of pictures.
        pictures: in reading order; those of which nothing entered are left out.
        length: tokens of the prompt as it was given.
    """

    hidden: Tensor
    embeds: Tensor
    places: Tensor
    visual: Tensor
    pictures: tuple[ReadPicture, ...]
    length: int
