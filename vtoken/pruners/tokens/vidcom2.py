"""VidCom2: more tokens for the frames that stand out, and in each frame the tokens that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners.tokens._video import counts_of_videos, whole_videos
from vtoken.stages import Keep, Parts, Pruner, VisualTokens, keep_all, offsets_of
from vtoken.stages.budget import apportion

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


class VidCom2(Pruner):
    """Uses the half of the channels that vary least over the video, with each token scaled to length 1 there. How
    common a token is in the video is the sum of exp(-distance² / 2a) over a = 1/8, 1/4, 1/2, 1, 2, where distance is
    that to the mean token of the video; how common it is in its frame is the same with the mean of the frame. A frame
    whose tokens are less common in the video (mean over them, softmax over frames at `temperature`) gets a larger part
    of the budget: n R (1 + softmax - its mean) of its n tokens, at least 1, where R is the share of the video that
    stays. In each frame, the tokens with the smallest sum of both stay.

    The budget is spent exactly: each remaining token goes to the frame that lacks most of its part. A video keeps at
    least one token per frame. With `exact: false`, every frame rounds by itself, as the authors do; the total then
    varies around the budget, and `expected_counts` returns the budget.

    Pictures and one-frame videos are left unpruned and do not count towards `keep: {total: ...}`. A frame is what the
    model treats as one: OneVision pools it, Qwen merges two into one. Loops over videos and frames, and waits for the
    device twice per video, for the budgets of the frames and for their sizes.

    Paper: https://arxiv.org/abs/2505.14454. Deterministic, training-free.
    """

    videos_only: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.14454"
    deviations: ClassVar[str] = (
        "The budget is exact (exact: false for the authors' rounding, whose total varies). Scores are "
        "float32 where the authors compute in the model's dtype. Kept tokens stay in reading order, newlines included."
    )

    temperature: float = Field(
        default=0.01, gt=0, description="temperature of the softmax that divides the budget among frames"
    )
    exact: bool = Field(default=True, description="spend the budget exactly; false: round each frame by itself")

    _whole_videos = model_validator(mode="after")(whole_videos)

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.expected_counts(tokens.lengths, tokens.parts, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        index, lengths, start = [], [], 0
        for n, k, parts in zip(tokens.lengths, counts, tokens.parts, strict=True):
            here = torch.arange(start, start + n, device=tokens.x.device)
            if k < n:
                frame = tokens.raster_index[start : start + n] // (parts[0][1] * parts[0][2])
                here = here[self._video(tokens.x[start : start + n].float(), frame, k)]
            index.append(here)
            lengths.append(len(here))
            start += n
        return Keep(torch.cat(index), tuple(lengths))

    def _video(self, x: Tensor, frame: Tensor, k: int) -> Tensor:
        """Indices of the tokens of a video x [N, D] that stay; `frame` [N] is ascending."""
        lengths = frame.unique_consecutive(return_counts=True)[1].tolist()
        steady = x.var(0, correction=0).argsort(stable=True)[: max(1, x.shape[1] // 2)]
        x = torch.nn.functional.normalize(x[:, steady], dim=-1)
        own = torch.cat([f - f.mean(0) for f in x.split(lengths)])
        in_video, in_frame = common(x - x.mean(0)), common(own)
        unusual = -torch.stack([f.mean() for f in in_video.split(lengths)]).double().cpu()
        share = (unusual / self.temperature).softmax(0)
        wanted = (1 + share - share.mean()) * torch.tensor(lengths) * (k / len(x))
        if self.exact:
            counts = apportion(wanted, lengths, k)
        else:
            counts = [min(n, max(1, round(w))) for n, w in zip(lengths, wanted.tolist(), strict=True)]
        return topk_tokens(-(in_video + in_frame), offsets_of(lengths, x.device), counts)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return counts_of_videos(self.keep, lengths, parts, row, lambda grid: grid[0])

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return self.exact

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Counts every image as a video, because lengths do not tell them apart."""
        return 10 * sum(lengths) * width


def common(x: Tensor) -> Tensor:
    """[N] sum of Gaussians of the lengths of the rows of x [N, D]."""
    square = x.square().sum(-1)
    return torch.stack([torch.exp(square / (-2 * a)) for a in ALPHAS]).sum(0)
