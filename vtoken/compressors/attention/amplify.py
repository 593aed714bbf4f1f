"""Amplify: text looks at visual tokens by a factor more, or at the salient ones among them."""

from __future__ import annotations

from functools import cached_property
from math import log
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vtoken.compressors.attention._heads import Heads, read
from vtoken.kernels import topk_tokens
from vtoken.stages import NAMES_FILE, image_of, offsets_of, uploaded
from vtoken.stages.budget import Budget
from vtoken.stages.steering import SteeredAttention, SteeredLayer


class Amplify(SteeredAttention):
    """Where text after a picture attends, multiplies the weights of chosen visual tokens by `gamma` before a row is
    normalised, that is, adds ln gamma to their scores: in every layer and head that is named, in the prompt and at
    every generated token. With gamma 1 nothing changes. Meant to make up for the visual attention that pruning took
    away; the right gamma is a matter of trial.

    `tokens: salient` amplifies only the `keep` most salient tokens of each image. A token is salient if attention to it
    rises from one text token after the image to the next: its score is the sum of all rises (falls count 0) of the head
    mean, in layer `measured` of the prefill. Layers up to that one stay as they are. This rule follows GIFT's abstract
    and is experimental.

    Paper: https://arxiv.org/abs/2407.21771 (PAI), which adds a multiple of the scores' magnitudes instead.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.21771"
    deviations: ClassVar[str] = (
        "One factor on the weights of visual tokens; PAI adds alpha times the magnitude of each score, so that what is "
        "far from 0 gains most, and acts on the last token alone. Its contrast with an answer without the picture is "
        "the key `contrast:` of pipeline files."
    )

    gamma: float = Field(gt=0, description="factor on attention weights of visual tokens; below 1 it damps them")
    tokens: Literal["all", "salient"] = Field(default="all", description="visual tokens that are amplified")
    keep: Budget = Field(
        default_factory=lambda: Budget("10%"), description="salient tokens of every image: 64, 25% or {total: 640}"
    )
    measured: int = Field(default=0, ge=0, description="decoder layer in which salience is read")
    heads: Heads | str | None = Field(
        default=None,
        description="[layer, query head] pairs, or a JSON file of them; null: all heads",
        json_schema_extra=NAMES_FILE,
    )

    @field_validator("heads")
    @classmethod
    def _readable(cls, heads: Heads | str | None) -> Heads | str | None:
        if isinstance(heads, str):
            read(heads)
        return heads

    @field_validator("keep")
    @classmethod
    def _of_images(cls, keep: Budget) -> Budget:
        return keep.of_images("inside the decoder")

    @cached_property
    def named(self) -> Heads | None:
        """The heads, read once."""
        return read(self.heads) if isinstance(self.heads, str) else self.heads

    def layers(self, depth: int) -> tuple[int, ...]:
        layers, named = super().layers(depth), None if self.named is None else {layer for layer, _ in self.named}
        after = -1 if self.tokens == "all" else self.measured
        return tuple(k for k in layers if k > after and (named is None or k in named))

    def unknown_heads(self, depth: int, heads: int) -> str:
        lacking = [f"[{k}, {h}]" for k, h in self.named or () if not (0 <= k < depth and 0 <= h < heads)]
        return f"no head {lacking[0]} in {depth} decoder layers of {heads} heads; name others" if lacking else ""

    def marked_by(self, layer: int) -> int | None:
        return None if self.tokens == "all" else self.measured

    def mark(self, layer: SteeredLayer) -> Tensor:
        out = torch.zeros_like(layer.behind)
        gains, new = torch.zeros_like(out, dtype=torch.float32), out.shape[1]
        for rows, at in layer.text_rows():
            before: Tensor | None = None
            for _, weights in layer.attention(rows, at):
                mean = weights[0, :, :, -new:].mean(0)  # [R, P]
                earlier = mean[:1] if before is None else before
                gains[rows] += (mean - torch.cat([earlier, mean[:-1]])).clamp(min=0).sum(0)
                before = mean[-1:]
        lengths = [len(slots) for _, slots in layer.images]
        at, row = torch.cat([slots for _, slots in layer.images]), [row for row, _ in layer.images]
        of = uploaded(row, at.device)[image_of(lengths, at.device)]
        chosen = topk_tokens(gains[of, at], offsets_of(lengths, at.device), list(self.keep.counts(lengths, row)))
        out[of[chosen], at[chosen]] = True
        return out

    def steer(self, layer: SteeredLayer) -> Tensor | None:
        keys = layer.visual if self.tokens == "all" else layer.marked
        if self.gamma == 1 or keys is None or layer.layer not in self.layers(layer.layer + 1):
            return None
        gain = torch.full((layer.q.shape[1],), log(self.gamma), device=layer.q.device)
        if self.named is not None:
            mine = [head for k, head in self.named if k == layer.layer]
            gain = torch.zeros_like(gain).index_fill(0, uploaded(mine, gain.device), log(self.gamma))
        return layer.biased(gain, layer.behind, keys)
