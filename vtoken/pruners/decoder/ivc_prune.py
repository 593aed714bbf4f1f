"""IVC-Prune: keep the tokens whose positions RoPE reads coordinates from, and what the question is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.pruners._pools import choose, top
from vtoken.pruners.decoder._ivc_prune import weigh
from vtoken.stages import Fact, Keep, Parts, Pruner, Site, VisualTokens, keep_where
from vtoken.stages.budget import Budget


class IVCPrune(Pruner):
    """One cut before decoder layer `layer`. The weights that a token gives to the tokens of an image are computed from
    values of the layer before, which no RoPE turns: the softmax, over the image, of their dot products divided by the
    square root of the head width, averaged over heads.

    1. Seeds: the share `seeds` of an image with the highest weight, averaged over the text after the image.
    2. Foreground score: the weight, averaged over that text and the seeds.
    3. Coordinate tokens: the share `coordinates` with the largest cosine of RoPE at their position, averaged over
       channels and position axes, and as many with the largest sine.
    4. Seeds and coordinate tokens stay, then those with the highest foreground score until `keep` is reached. With
       `foreground`, seeds, coordinate tokens and that share of the highest foreground scores stay, whatever their
       number.

    With `retroactive`, what this cut or one before it dropped also leaves the KV cache of all earlier layers, once the
    prefill is over.

    Paper: https://arxiv.org/abs/2602.03060. Loops over images (or frames, or crops).
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.03060"
    deviations: ClassVar[str] = (
        "The weights are those of the authors' Qwen2.5-VL code; their LLaVA-1.5 code takes the softmax over the whole "
        "prompt. A `keep` smaller than seeds and coordinate tokens is kept to: seeds first, then coordinate tokens by "
        "rank; the authors exceed it. RoPE is compared in float32, theirs in the model's dtype. Several images, rows "
        "and any padding work, image by image; theirs takes one image. An image without text after it is weighed by "
        "its own tokens. Pictures cut into crops are chosen from as a whole or, by `per_crop`, crop by crop; their "
        "InternVL code reads the thumbnail alone and maps its choice to the crops."
    )

    keep: Budget = Field(default=Budget("50%"), description="tokens that stay after the cut; unused with `foreground`")
    layer: int | None = Field(
        default=None,
        ge=1,
        description="first decoder layer that sees fewer tokens; null: the middle, the authors' 16 of 32. They take 16 "
        "of 28 on Qwen2.5-VL-7B and 22 of 36 on 3B",
    )
    seeds: float = Field(default=0.01, ge=0, le=1, description="share of an image that are seeds, at least one token")
    coordinates: float = Field(
        default=0.1, ge=0, le=1, description="share of the tokens kept for their cosine, and as many for their sine"
    )
    foreground: float | None = Field(
        default=None, ge=0, le=1, description="share of the highest foreground scores; the authors' 0.2 on LLaVA-1.5"
    )
    skip: int = Field(
        default=0,
        ge=0,
        description="tokens after an image that are no question; the authors skip 2, which their templates put there",
    )
    retroactive: bool = Field(
        default=True,
        description="what is dropped also leaves the caches of earlier layers; false: they keep it. With true a "
        "forward whose prompt holds drafts or an answer to score is refused: later tokens would read what earlier ones "
        "do not",
    )

    def needs(self) -> tuple[Fact, ...]:
        return tuple(map(Fact, ("values", "later_values", "mean_cos", "mean_sin")))

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth // 2) if self.layer is None else self.layer,)

    def clears_earlier_layers(self) -> bool:
        return self.retroactive

    def select(self, tokens: VisualTokens) -> Keep:
        weight, score, seed = weigh(tokens, self.seeds, self.skip)

        def key(rows: Tensor) -> Tensor:
            """[n] what ranks the tokens: foreground scores up to 1, coordinate tokens in (1, 2], seeds from 3 on."""
            count = round(len(rows) * self.coordinates)
            best = torch.stack([top(tokens.fact(name)[rows], count) for name in ("mean_cos", "mean_sin")], 1).flatten()
            rank = torch.arange(len(best), device=rows.device) / max(1, len(best))
            placed = score[rows].scatter_reduce(0, best, 2 - rank, "amax")
            return torch.where(seed[rows], 3 + weight[rows], placed)

        if self.foreground is None:
            return choose(self, tokens, lambda rows, k: rows[top(key(rows), k)])
        stay = []
        for rows in torch.arange(len(score), device=score.device).split(list(tokens.lengths)):
            best = top(score[rows], round(len(rows) * self.foreground))
            stay.append((key(rows) > 1).index_fill(0, best, True))
        return keep_where(tokens, torch.cat(stay))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """With `foreground`, what stays if seeds, foreground, cosine and sine chose independently of each other."""
        if self.foreground is None:
            return super().expected_counts(lengths, parts, row, layer)
        gone = (1 - self.foreground) * (1 - self.seeds) * (1 - self.coordinates) ** 2
        return tuple(min(n, max(1, round(n * (1 - gone)))) for n in lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return self.foreground is None and super().counts_are_exact(layer, whole)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """The weights that seeds give; those of the text depend on the prompt and are left out."""
        return sum(2 * n * max(1, round(n * self.seeds)) * width for n in lengths)
