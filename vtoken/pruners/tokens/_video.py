"""Shared by methods for videos. Pictures and one-frame videos keep all tokens and do not count towards a total."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import ClassVar, NamedTuple, Self, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from vtoken.kernels.merge_tokens import totals
from vtoken.pruners._pools import merged
from vtoken.stages import Fused, Grid, Keep, Parts, Pruner, VisualTokens, keep_all
from vtoken.stages.base import key_weights
from vtoken.stages.budget import Budget, apportion

AnyPruner = TypeVar("AnyPruner", bound=Pruner)


def whole_videos(stage: AnyPruner) -> AnyPruner:
    """Refuses budgets per frame or crop.

    Raises:
        ValueError: names the budgets that fit.
    """
    if stage.keep.per is not None:
        raise ValueError(
            f"{stage.name} spends one budget over all frames of a video, so {stage.keep.per} does not fit; give the "
            "video's (keep: 64) or a share (keep: 25%)"
        )
    return stage


def counts_of_videos(
    keep: Budget, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], least: Callable[[Grid], int]
) -> tuple[int, ...]:
    """Tokens to keep of each image: for a video its budget, but at least `least(raster)`; for a picture all."""
    videos = [i for i, image in enumerate(parts) if is_video(image)]
    wanted = keep.counts([lengths[i] for i in videos], [row[i] for i in videos])
    counts = list(lengths)
    for i, k in zip(videos, wanted, strict=True):
        counts[i] = min(lengths[i], max(k, least(parts[i][0])))
    return tuple(counts)


def is_video(image: Parts) -> bool:
    """Whether the image is a video of several frames."""
    return len(image) == 1 and image[0][0] > 1


def frame_numbers(tokens: VisualTokens, image: int) -> tuple[Tensor, list[int]]:
    """[n] frame of each token of a video; how many tokens each frame still has. Waits for the device if some were
    dropped."""
    frames, height, width = tokens.parts[image][0]
    start = sum(tokens.lengths[:image])
    frame = tokens.raster_index[start : start + tokens.lengths[image]] // (height * width)
    if tokens.whole(image):
        return frame, [height * width] * frames
    lengths: list[int] = torch.bincount(frame, minlength=frames).tolist()
    return frame, lengths


def by_place(tokens: VisualTokens, image: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """[F, P, D] fp32 tokens of a video, by frame and place, 0 where one was dropped; [F, P] their rows in the video, -1
    where one was dropped; [n] place of each token; how many tokens each frame still has."""
    frame, lengths = frame_numbers(tokens, image)
    _, height, width = tokens.parts[image][0]
    start, n = sum(tokens.lengths[:image]), len(frame)
    x, place = tokens.x[start : start + n].float(), tokens.raster_index[start : start + n] % (height * width)
    own = torch.arange(n, device=x.device)
    if tokens.whole(image):
        return x.unflatten(0, (len(lengths), -1)), own.unflatten(0, (len(lengths), -1)), place, lengths
    table, rows = (
        x.new_zeros(len(lengths), height * width, x.shape[1]),
        own.new_full((len(lengths), height * width), -1),
    )
    table[frame, place], rows[frame, place] = x, own
    return table, rows, place, lengths


def frames_of(tokens: VisualTokens, image: int) -> list[int]:
    """Tokens of each frame of a video that still has any."""
    return [n for n in frame_numbers(tokens, image)[1] if n]


def segments(means: Tensor, cut: float, least: int) -> list[int]:
    """Frames of each segment of a video with the frame means [F, D]: cut where the cosine of neighbours is below `cut`,
    and at the least similar others until there are `least` segments. Waits for the device."""
    alike = torch.cosine_similarity(means[1:].float(), means[:-1].float(), dim=-1).cpu()
    cuts = max(int((alike < cut).sum()), min(least, len(means)) - 1)
    begins = alike.argsort(stable=True)[:cuts].sort().values + 1
    return torch.diff(begins, prepend=begins.new_zeros(1), append=begins.new_tensor([len(means)])).tolist()


def sums(values: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Sum of the values of each group; `groups` are the sizes of the groups."""
    ends = [0, *accumulate(groups)]
    return [sum(values[begin:end]) for begin, end in pairwise(ends)]


class Folded(NamedTuple):
    """What a method makes of a video of n tokens. A slot is a kept token with all that it absorbs, its members.

    Attributes:
        kept: [k] rows that stay, in any order.
        home: [n] row that absorbs each token, itself for one that stays, -1 for none.
        weight: [n] weight of each token in its slot, which becomes the weighted mean of its members.
        share: [n] if given, a slot is the weighted sum of its members divided by the sum of their shares, not weights.
        made: if given, rows that stay, ascending, and the embeddings [., D] that take their place.
    """

    kept: Tensor
    home: Tensor
    weight: Tensor
    share: Tensor | None = None
    made: tuple[Tensor, Tensor] | None = None


def fold_videos(tokens: VisualTokens, fold: Callable[[int, slice], Folded | None]) -> Keep:
    """The decision that `fold(image, rows)` makes on each video, given its number and its rows of the packed tokens;
    a video for which it returns None keeps all its tokens, as pictures do. Loops over videos."""
    home = torch.arange(len(tokens.x), device=tokens.x.device)
    weight = torch.ones(len(home), device=home.device)
    share, other, index, start = weight.clone(), False, [], 0
    made: list[tuple[Tensor, Tensor]] = []
    for image, n in enumerate(tokens.lengths):
        rows = slice(start, start + n)
        found = fold(image, rows) if n and is_video(tokens.parts[image]) else None
        if found is None:
            index.append(torch.arange(start, start + n, device=home.device))
        else:
            index.append(found.kept + start)
            home[rows] = torch.where(found.home < 0, -1, found.home + start)
            weight[rows] = found.weight
            share[rows], other = (found.weight if found.share is None else found.share), found.share is not None
            made += [] if found.made is None else [(found.made[0] + start, found.made[1])]
        start += n
    lengths = tuple(map(len, index))
    if lengths == tokens.lengths:
        return keep_all(tokens)
    keep = merged(Keep(torch.cat(index).sort().values, lengths), home, weight)
    if made:
        at, values = (torch.cat(parts) for parts in zip(*made, strict=True))
        slot = torch.searchsorted(keep.index, at)
        return replace(keep, fused=Fused(slot, torch.ones(len(slot), device=home.device), values=values))
    if not other or keep.into is None:
        return keep
    slots = len(keep.index)
    into = torch.where(keep.into < 0, slots, keep.into)
    factor = totals(into, slots, weight) / totals(into, slots, share)
    return replace(keep, fused=Fused(torch.arange(slots, device=home.device), factor))


class VideoPruner(Pruner):
    """Methods that decide video by video and know how many tokens each frame may keep. A video keeps at least one
    token per frame; pictures keep all."""

    videos_only: ClassVar[bool] = True

    @model_validator(mode="after")
    def _no_crops(self) -> Self:
        if self.keep.per == "per_crop":
            raise ValueError(
                f"{self.name} works on videos, which have no crops, so per_crop does not fit; give a share (keep: 25%) "
                "or a budget per frame (keep: {per_frame: 32})"
            )
        return self

    def fold(self, tokens: VisualTokens, image: int, rows: slice, lengths: list[int], budgets: list[int]) -> Folded:
        """The decision on the video that has these rows of the packed tokens.

        Args:
            image: its number.
            lengths, budgets: tokens of each frame, and tokens to keep of it.
        """
        raise NotImplementedError

    def budgets(self, x: Tensor, lengths: Sequence[int], k: int) -> list[int]:
        """Tokens to keep of each frame of a video x [n, D]: those that the budget gives each frame, or k for the whole
        video, divided in proportion to the tokens of the frames."""
        if self.keep.key_weight is not None:
            return list(
                self.keep.counts(lengths, (0,) * len(lengths), key_weights(x, lengths, (0,) * len(lengths), self.keep))
            )
        if self.keep.per is not None:
            return list(self.keep.counts(lengths, range(len(lengths))))
        return apportion(torch.tensor(lengths, dtype=torch.float64) * (k / sum(lengths)), lengths, k)

    def even_per(self) -> None:
        """None: how many tokens a frame keeps depends on its trees, clusters or segments."""
        return

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.expected_counts(tokens.lengths, tokens.parts, tokens.row)

        def fold(image: int, rows: slice) -> Folded | None:
            lengths = frames_of(tokens, image)
            budgets = self.budgets(tokens.x[rows], lengths, counts[image])
            return None if sum(budgets) == sum(lengths) else self.fold(tokens, image, rows, lengths, budgets)

        return fold_videos(tokens, fold)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        if self.keep.per is None:
            return counts_of_videos(self.keep, lengths, parts, row, lambda grid: grid[0])
        assert self.keep.tokens is not None
        each = [
            self.keep.tokens * image[0][0] if is_video(image) else n for n, image in zip(lengths, parts, strict=True)
        ]
        return tuple(map(min, lengths, each))
