"""EVS: keep the tokens of a video that changed since the frame before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners.tokens._video import counts_of_videos, whole_videos
from vtoken.stages import Keep, Parts, Pruner, VisualTokens, image_of, keep_all, size_of

NEW = 255.0  # above any dissimilarity, which is at most 2


class EVS(Pruner):
    """Scores each token of a video by 1 - cosine similarity of its embedding with the one at the same row and column a
    frame earlier; the first frame is new throughout. The `keep` highest of the whole video stay, so still scenes get
    fewer tokens than moving ones, but never fewer than one frame holds: a smaller `keep` leaves the first frame. Of a
    video that was thinned out before, a token is held against the latest earlier frame that still has its place.

    Images, one-frame videos among them, pass untouched and use up nothing of `keep: {total: ...}`. A frame is what the
    model makes of one: Qwen merges two into one.

    Paper: https://arxiv.org/abs/2510.14624. Deterministic, training-free. The published pruning rate q is `keep: 100% -
    q`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14624"
    deviations: ClassVar[str] = (
        "A share is rounded to the nearest where vLLM rounds it down. Text after the video keeps its unpruned "
        "positions (positions: original), as in vLLM."
    )

    _whole_videos = model_validator(mode="after")(whole_videos)

    def score(self, tokens: VisualTokens) -> Tensor:
        image, device = image_of(tokens.lengths, tokens.x.device), tokens.x.device
        cells = torch.tensor([_frame(parts) for parts in tokens.parts], device=device)
        cell = image * int(max(_frame(parts) for parts in tokens.parts)) + tokens.raster_index % cells[image]
        # The stable order keeps the tokens of one place together, frame after frame.
        order = cell.argsort(stable=True)
        again = cell[order[1:]] == cell[order[:-1]]
        x = tokens.x[order].float()
        change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
        score = torch.full_like(cell, NEW, dtype=torch.float32)
        score[order[1:]] = torch.where(again, change, NEW)
        return score

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.expected_counts(tokens.lengths, tokens.parts, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        return Keep(topk_tokens(self.score(tokens), tokens.offsets, list(counts)), counts)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return counts_of_videos(self.keep, lengths, parts, row, lambda grid: grid[1] * grid[2])

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """As if every image were a video: lengths do not tell."""
        return 6 * sum(lengths) * width


def _frame(parts: Parts) -> int:
    """Tokens of a frame; an anyres image is one frame."""
    return parts[0][1] * parts[0][2] if len(parts) == 1 else size_of(parts)
