"""FlashVID: in every frame the tokens that are attended to and differ, and of the rest trees across frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import farthest_tokens, merge_tokens
from vtoken.pruners._dpc import density_peaks
from vtoken.pruners._pools import rest_of
from vtoken.pruners.tokens._trees import clusters, grow
from vtoken.pruners.tokens._video import Folded, VideoPruner, segments, sums
from vtoken.stages import Fact, VisualTokens, image_of

NEIGHBOURS = 7  # nearest rows that the density of a row is measured by


class FlashVID(VideoPruner):
    """A video is cut into segments where the cosine of the means of consecutive frames is below `cut`, and at the least
    similar other places until there are `segments`. Of each frame's budget B, `alpha` B tokens (rounded up) are chosen
    by attention and diversity: starting with the token whose nearest neighbour in the frame is farthest, the one that
    is farthest from all chosen ones comes next, where distance is (1 - cosine) times the attention that the candidate
    gets in the encoder and, with `relevance`, times its mean dot product with the frame means of its segment.

    Every other token is linked to the most similar other token of the frame before, if that is in the same segment and
    their cosine is above `similarity`; if fewer than the budgets would be left, only the closest links hold. Linked
    tokens form trees across frames, and each tree becomes its mean at the place of its earliest token. The rest of a
    segment's budget is shared among its frames in proportion to their trees. In each frame these are clustered by
    density peaks (7 neighbours); a cluster becomes the mean of its trees at the place of its centre.

    The budget is spent exactly. `as_released: true` does what the authors' code does: a tree is the sum of its tokens
    divided by 1 + the tokens linked to its root directly, which makes embeddings of long chains too large (of T
    identical frames, T / 2 times); budgets of frames are rounded up, and the total then varies around the budget.

    Pictures and one-frame videos are left unpruned and do not count towards `keep: {total: ...}`. A frame is what the
    model treats as one: Qwen merges two into one. Loops over videos and waits for the device three times per video, for
    its segments, its trees and, where an earlier stage dropped tokens, its frames.

    Paper: https://arxiv.org/abs/2602.08024. Training-free. A published retention R on average over the layers is `keep:
    1.25 R` here and a cut to 30 % before decoder layer 20 of 28 (fastv), as in the presets.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.08024"
    deviations: ClassVar[str] = (
        "A tree is the mean of its tokens, and the budget is exact (as_released: true for the authors' sums and "
        "rounding). No random numbers among equal densities. In a segment of one frame they cluster the chosen tokens "
        "once more, so that some stand twice in the prompt; here only the rest. Negative relevance counts as 0. "
        "Similarities are float32. DeepStack features are merged like the tokens; they take the centre's."
    )

    alpha: float = Field(default=0.7, ge=0, le=1, description="share of a frame's budget that is chosen, not merged")
    relevance: bool = Field(
        default=True, description="count relevance to the segment in the choice (the authors: not on Qwen)"
    )
    similarity: float = Field(default=0.8, ge=-1, le=1, description="cosine of two tokens above which they are linked")
    cut: float = Field(default=0.9, ge=-1, le=1, description="cosine of two frames below which a segment begins")
    segments: int = Field(default=8, ge=1, description="least number of segments (the authors: 4 on Qwen)")
    as_released: bool = Field(default=False, description="sums and rounding of the authors' code")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def budgets(self, x: Tensor, lengths: Sequence[int], k: int) -> list[int]:
        if self.as_released and self.keep.share is not None:
            return [math.ceil(n * self.keep.share) for n in lengths]
        return super().budgets(x, lengths, k)

    def fold(self, tokens: VisualTokens, image: int, rows: slice, lengths: list[int], budgets: list[int]) -> Folded:
        x, worth = tokens.x[rows], tokens.fact("cls_attention")[rows].float()
        frame = image_of(lengths, x.device)
        means = merge_tokens(x.float(), frame, len(lengths))
        events = segments(means, self.cut, self.segments)
        if self.relevance:
            event = image_of(events, x.device)
            worth = worth * (x.float() * merge_tokens(means, event, len(events))[event[frame]]).sum(1).clamp(min=0)
        first = [math.ceil(self.alpha * budget) for budget in budgets]
        chosen = farthest_tokens(x, lengths, first, worth=worth)
        home, one = torch.full_like(frame, -1).index_copy_(0, chosen, chosen), torch.ones_like(worth)
        left = [budget - taken for budget, taken in zip(budgets, first, strict=True)]
        if not any(left):
            return Folded(chosen, home, one)
        rest, others = rest_of(len(x), chosen), [n - taken for n, taken in zip(lengths, first, strict=True)]
        most = [n - k for n, k in zip(sums(lengths, events), sums(budgets, events), strict=True)]
        trees = grow(x[rest], others, events, most, self.similarity)
        divisor = trees.near if self.as_released else trees.size
        standing, roots, slot = trees.standing(frame[rest], len(lengths))
        counts = clusters(standing, events, sums(left, events), rounded_up=self.as_released)
        values = merge_tokens(x[rest].float(), slot, len(roots)) * (trees.size / divisor)[roots, None]
        centres = density_peaks(values, standing, counts, NEIGHBOURS)
        home[rest] = torch.where(centres < 0, -1, rest[roots[centres.clamp(min=0)]])[slot]
        absorbed = home != torch.arange(len(x), device=x.device)
        kept = absorbed.sort(stable=True).indices[: sum(first) + sum(counts)]
        weight, share = (one.index_copy(0, rest, 1 / each) for each in (divisor, trees.size))
        return Folded(kept, home, weight, share if self.as_released else None)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return not self.as_released and super().counts_are_exact(layer, whole)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Cosines within frames and between them, and distances within them, as if every frame had 196 tokens."""
        return sum(6 * n * min(n, 196) * width for n in lengths)
