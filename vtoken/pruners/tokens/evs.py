"""EVS: keep the tokens of a video that changed since the previous frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners.tokens._video import counts_of_videos, whole_videos
from vtoken.stages import Keep, Parts, Pruner, VisualTokens, image_of, keep_all, size_of, uploaded

NEW = 255.0  # above any dissimilarity, which is at most 2


class EVS(Pruner):
    """Scores each token of a video by 1 - cosine similarity of its embedding to that of the token at the same row and
    column one frame earlier; all tokens of the first frame count as new. The `keep` highest scores of the whole video
    stay, so still scenes get fewer tokens than moving ones. At least as many tokens stay as one frame holds: with a
    smaller `keep`, that is the first frame. If an earlier stage dropped tokens of the video, a token is compared with
    the latest earlier frame that still has a token at its place.

    Pictures and one-frame videos are left unpruned and do not count towards `keep: {total: ...}`. A frame is what the
    model treats as one: Qwen merges two into one.

    Paper: https://arxiv.org/abs/2510.14624. Deterministic, training-free. The published pruning rate q is `keep: 100% -
    q`.
    """

    videos_only: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14624"
    deviations: ClassVar[str] = (
        "A share is rounded to the nearest where vLLM rounds it down. Text after the video keeps its unpruned "
        "positions (positions: original), as in vLLM."
    )

    _whole_videos = model_validator(mode="after")(whole_videos)

    def score(self, tokens: VisualTokens) -> Tensor:
        image, device = image_of(tokens.lengths, tokens.x.device), tokens.x.device
        cells = uploaded([_frame(parts) for parts in tokens.parts], device)
        cell = image * int(max(_frame(parts) for parts in tokens.parts)) + tokens.raster_index % cells[image]
        # The stable sort groups the tokens at one place, in the order of their frames.
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
        """Counts every image as a video, because lengths do not tell them apart."""
        return 6 * sum(lengths) * width


def _frame(parts: Parts) -> int:
    """Tokens of a frame; an anyres image is one frame."""
    return parts[0][1] * parts[0][2] if len(parts) == 1 else size_of(parts)
