"""Attention exit: all visual tokens are dropped once the end of the prompt barely attends to them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors.decoder._exits import asked, behind_all, leave, mass
from vtoken.kernels import topk_tokens
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens


class AttentionExit(Compressor):
    """Acts before every decoder layer from `first` on. If in each of the `patience` layers before it, the last `window`
    text tokens gave the images less than `threshold` of their attention (softmax over everything a token sees, mean
    over tokens and heads), all visual tokens of the row are dropped. Rows exit at different layers, or never; the plan
    (FLOPs) counts on none. A prompt that ends with an image keeps it.

    `sinks` leaves out the tokens attended to most: early tokens can draw attention without carrying information.
    Nothing guarantees that the question has read the image by then: exits before half of the depth are destructive in
    ToDRE's table. `vtoken calibrate attention_exit` finds the threshold of a model at which a given share of its
    answers stays unchanged.

    No paper: a baseline; ToDRE's rule applied at every layer, to the last token.
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "no paper"

    threshold: float = Field(default=0.1, gt=0, le=1, description="share of attention below which images are dropped")
    first: int | None = Field(
        default=None, ge=1, description="first decoder layer that may run without images; null: 7/8 of the depth"
    )
    window: int = Field(default=1, ge=1, description="text tokens at the end of the prompt whose attention counts")
    patience: int = Field(default=1, ge=1, description="consecutive layers that must stay below the threshold")
    sinks: int = Field(
        default=0, ge=0, le=50, description="percent of each image's tokens, those attended to most, that do not count"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("text_attention"), Fact("later_text"))

    def layers(self, depth: int) -> tuple[int, ...]:
        first = max(1, depth * 7 // 8) if self.first is None else self.first
        return tuple(range(first, depth))

    def query_tokens(self, tokens: VisualTokens) -> list[Tensor]:
        return [index[-self.window :] for index in behind_all(tokens)]

    def heard(self, tokens: VisualTokens) -> Tensor:
        """[images] share of attention that is compared with the threshold, summed over all images of a row."""
        attention = tokens.fact("text_attention")
        if self.sinks:
            counts = [-(-n * self.sinks // 100) for n in tokens.lengths]
            attention = attention.index_fill(0, topk_tokens(attention, tokens.offsets, counts), 0.0)
        return mass(tokens, attention)

    def select(self, tokens: VisualTokens) -> Keep:
        calm = torch.where(self.heard(tokens) < self.threshold, tokens.memory.get("calm", 0) + 1, 0)
        tokens.memory["calm"] = calm
        long = (calm >= self.patience).tolist()
        return leave(tokens, [a and b for a, b in zip(asked(tokens), long, strict=True)])
