"""HiPrune: what a middle encoder layer looks at, its neighbours, and what the last layer looks at."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from vtoken.pruners._pools import choose_alike, top
from vtoken.stages import Fact, Keep, Parts, Pruner, VisualTokens, image_of, offsets_of, size_of


class HiPrune(Pruner):
    """Of k tokens to keep, round(alpha * k / 5) are anchors: those with the highest received attention in encoder layer
    `object_layer`, in the middle, where attention rests on objects. The four neighbours of every anchor in its raster
    stay with it. The rest are the tokens with the highest received attention in the layer of the features. Exactly k
    stay; where alpha is so large that anchors and neighbours are more, neighbours with the least attention go.

    Paper: https://arxiv.org/abs/2508.00553. Images (or frames, or crops) of equal size and budget together; a neighbour
    in another frame, crop or raster is none.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"
    deviations: ClassVar[str] = (
        "Neighbours are those of the raster; the authors add and subtract 1 and the width, so that at the left and "
        "right edge a token of the next row comes in, and at the corners the first or last of all (wrapped: true). "
        "Newline tokens follow the newline policy."
    )

    alpha: float = Field(default=0.1, ge=0, le=1, description="share of the kept tokens for anchors and neighbours")
    object_layer: int = Field(
        default=8,
        description="encoder layer of the anchors, counted from 0: 8 on LLaVA, 15 on Qwen2.5-VL (the authors count "
        "from 1); negative: from the end",
    )
    wrapped: bool = Field(default=False, description="neighbours as in the authors' code, across the raster's edges")

    def needs(self) -> tuple[Fact, ...]:
        return Fact("received_attention", self.object_layer), Fact("received_attention")

    def select(self, tokens: VisualTokens) -> Keep:
        middle, last = (tokens.fact(need.name, need.layer) for need in self.needs())
        beside = self._beside(tokens)

        def pick(rows: Tensor, k: int) -> Tensor:
            anchors = rows.gather(1, top(middle[rows], round(k * self.alpha / 5)))
            # Index -1 is the extra last place, which stands for no token.
            pool = rows.new_full((len(last) + 1,), -1)
            pool[rows] = torch.arange(len(rows), device=rows.device)[:, None]
            near = beside[anchors]
            near = near.masked_fill(pool[near] != pool[anchors][..., None], -1)
            rank = last.new_zeros(len(last) + 1)
            rank[near.flatten()] = 1
            rank[anchors.flatten()] = 2
            # Attention is at most 1, so no token passes one of a higher rank.
            return rows.gather(1, top(last[rows] + 2 * rank[rows], k))

        return choose_alike(self, tokens, pick)

    def _beside(self, tokens: VisualTokens) -> Tensor:
        """[ΣN, 4] packed rows of each token's neighbours; -1 where there is none, or none any more."""
        device = tokens.x.device
        sizes = [size_of(parts) for parts in tokens.parts]
        start = offsets_of(sizes, device)[:-1][image_of(tokens.lengths, device)]
        place = start + tokens.raster_index
        row = place.new_full((sum(sizes) + 1,), -1)
        row[place] = torch.arange(len(place), device=device)
        table = torch.cat([neighbours(parts, self.wrapped) for parts in tokens.parts]).to(device, non_blocking=True)
        near = table[place]
        return row[torch.where(near < 0, -1, near + start[:, None])]


def neighbours(parts: Parts, wrapped: bool = False) -> Tensor:
    """[tokens of the rasters, 4] raster index of the tokens to the left, to the right, above and below, -1 where there
    is none; `wrapped` as in HiPrune."""
    found, start = [], 0
    for frames, height, width in parts:
        n = frames * height * width
        place = torch.arange(start, start + n)
        if wrapped:
            steps = torch.tensor([-1, 1, -width, width])
            near = (place[:, None] + steps).clamp(start, start + n - 1)
        else:
            around = pad(place.view(frames, height, width), (1, 1, 1, 1), value=-1)
            inner = slice(1, -1)
            sides = around[:, inner, :-2], around[:, inner, 2:], around[:, :-2, inner], around[:, 2:, inner]
            near = torch.stack(sides, -1).flatten(0, 2)
        found.append(near)
        start += n
    return torch.cat(found)
