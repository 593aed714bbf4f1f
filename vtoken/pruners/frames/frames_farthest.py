"""Farthest frames: a fixed number of frames that differ most from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vtoken.pruners.frames._frames import FramePruner, products, unit
from vtoken.stages import Keep, VisualTokens, keep_all, offsets_of


class FramesFarthest(FramePruner):
    """Starts with a video's first frame and repeatedly adds the frame whose highest cosine similarity to the chosen
    frames is lowest (ties to the earlier frame), until `keep` are chosen. Frames are compared by the pixels of their
    thumbnails, before the vision tower runs, so the tower's cost falls too. Neither what the pictures show nor the
    question plays a part.

    No paper: a baseline.
    """

    paper: ClassVar[str] = "no paper"

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        starts = offsets_of(tokens.lengths, tokens.x.device)[:-1]
        videos = unit(tokens.x).split(tokens.lengths)
        kept = [farthest(x, k) + start for x, k, start in zip(videos, counts, starts, strict=True)]
        return Keep(torch.cat(kept), counts)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return products(lengths, self.keep.counts(lengths, range(len(lengths))), width)


def farthest(x: Tensor, k: int) -> Tensor:
    """[k] rows of x [F, D] (length 1), ascending; the first row is always among them."""
    chosen = [torch.zeros(1, dtype=torch.long, device=x.device)]
    nearest = x @ x[0]
    for _ in range(k - 1):
        nearest = nearest.index_fill(0, chosen[-1], torch.inf)
        chosen.append(nearest.argmin(0, keepdim=True))
        nearest = torch.maximum(nearest, x @ x[chosen[-1]][0])
    return torch.cat(chosen).sort().values
