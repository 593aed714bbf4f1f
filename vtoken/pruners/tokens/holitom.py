"""HoliTom, its part before the LLM: places that do not change over a window of frames are kept once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners._dpc import density_peaks
from vtoken.pruners._pools import rest_of
from vtoken.pruners.tokens._video import Folded, VideoPruner, by_place
from vtoken.pruners.tokens._windows import grouped, static_windows
from vtoken.stages import Fact, VisualTokens, offsets_of
from vtoken.stages.budget import apportion

NEIGHBOURS = 7  # nearest rows that the density of a row is measured by


class HoliTom(VideoPruner):
    """A place is still between two frames if the cosine of its tokens is above `similarity`. The video is cut into
    windows, those that leave out the most tokens: a place that is still through a whole window is averaged over it and
    stands once, in its first frame. What is left is cut to the budget, every group by the same share: of the tokens of
    each frame that are not still, those with most attention in the encoder stay; of the still ones of a window, the
    centres of density peaks (7 neighbours). Every other still token joins its nearest centre, which becomes `beta`
    times itself plus 1 - beta times the mean of those. With `contextual`, that share of the tokens kept of a frame are
    centres too, which the rest of the frame joins; without, the rest is dropped.

    The budget is spent exactly, but a video so still that fewer tokens are left after averaging keeps fewer, so
    `expected_counts` is an upper bound. `as_released: true` rounds every group as the authors do, up for frames and to
    the nearest for windows, which may exceed it. Pictures and one-frame videos are left unpruned and do not count
    towards `keep: {total: ...}`. The choice of windows takes time that grows with the square of the frames, on the
    host. Waits for the device twice per video.

    Paper: https://arxiv.org/abs/2505.21334. Training-free. Its optional merge inside the LLM is left out.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.21334"
    deviations: ClassVar[str] = (
        "The budget is exact (as_released: true for the authors' rounding). Reading order; theirs puts the still "
        "tokens of a window before the others of its first frame. No random numbers among equal densities. "
        "Similarities are float32. The merge inside the LLM is left out."
    )

    similarity: float = Field(
        default=0.8, ge=-1, le=1, description="cosine above which a place is still (the authors: 0.65 at 10 %)"
    )
    beta: float = Field(default=0.6, gt=0, le=1, description="weight of a centre against the mean of what joins it")
    contextual: float = Field(default=0.0, ge=0, le=1, description="share of a frame's budget for centres (D)")
    as_released: bool = Field(default=False, description="round groups as the authors' code does")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def fold(self, tokens: VisualTokens, image: int, rows: slice, lengths: list[int], budgets: list[int]) -> Folded:
        table, row, place, each = by_place(tokens, image)
        alike = torch.cosine_similarity(table[1:], table[:-1], dim=2) > self.similarity
        alike &= (row[1:] >= 0) & (row[:-1] >= 0)
        windows, _ = static_windows(alike)
        still = torch.stack([alike[a:b].all(0) if a < b else torch.zeros_like(row[0]).bool() for a, b in windows])
        order, slot, sizes, values, members = grouped(tokens.x[rows], row, place, each, windows, still)
        counts = self._counts(sizes, len(windows), sum(budgets), len(place))
        home = self._homes(values, tokens.fact("cls_attention")[rows][order].float(), sizes, counts, len(windows))
        centre, at = home == torch.arange(len(order), device=home.device), home.clamp(min=0)
        joined = torch.zeros_like(values[:, 0]).index_add_(0, at, ((home >= 0) & ~centre).float())
        blend = torch.where(centre, torch.where(joined > 0, self.beta, 1.0), (1 - self.beta) / joined[at])
        kept = order[(~centre).sort(stable=True).indices[: sum(counts)]]
        return Folded(kept, torch.where(home < 0, -1, order[at])[slot], (blend / members)[slot])

    def _counts(self, sizes: list[int], windows: int, k: int, n: int) -> list[int]:
        """Tokens to keep of each group; k in all, unless `as_released`."""
        wanted = n * float(self.keep.share) if self.as_released and self.keep.share is not None else k
        ratio = min(1.0, wanted / sum(sizes))
        if self.as_released:
            return [round(s * ratio) if i < windows else math.ceil(s * ratio) for i, s in enumerate(sizes)]
        return apportion(torch.tensor(sizes, dtype=torch.float64) * ratio, sizes, min(k, sum(sizes)))

    def _homes(self, values: Tensor, attention: Tensor, sizes: list[int], counts: list[int], windows: int) -> Tensor:
        """[R] which of the values [R, D] each of them joins, -1 if it is dropped. Groups of still tokens come first."""
        s = sum(sizes[:windows])
        frames, most = sizes[windows:], [round(k * (1 - self.contextual)) for k in counts[windows:]]
        chosen = topk_tokens(attention[s:], offsets_of(frames, values.device), most)
        rest, others = rest_of(len(values) - s, chosen), [n - k for n, k in zip(frames, most, strict=True)]
        centres = [k - m for k, m in zip(counts[windows:], most, strict=True)]
        to = density_peaks(values[s:][rest], others, centres, NEIGHBOURS)
        home = torch.full((len(values),), -1, device=values.device)
        home[:s] = density_peaks(values[:s], sizes[:windows], counts[:windows], NEIGHBOURS)
        home[s + chosen] = s + chosen
        home[s + rest] = torch.where(to < 0, -1, s + rest[to.clamp(min=0)]) if len(rest) else rest
        return home

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return False

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Cosines between frames, and distances within windows as if half the tokens were still, in frames of 196."""
        return sum((6 * n + n * min(n, 196)) * width for n in lengths)
