"""FastVID: in every frame the tokens that are attended to, and anchors in every few frames that take up the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.kernels import merge_tokens, topk_tokens
from vtoken.pruners._dpc import density_peaks
from vtoken.pruners._pools import rest_of
from vtoken.pruners.tokens._video import Folded, VideoPruner, segments
from vtoken.stages import Fact, VisualTokens, image_of, offsets_of
from vtoken.stages.budget import apportion

NEIGHBOURS = 4  # nearest rows that the density of a row is measured by


class FastVID(VideoPruner):
    """A video is cut into segments where the cosine of the means of consecutive frames is below `cut`, and at the least
    similar other places until there are `segments`. Of each frame's budget B, B - int(`contextual` B) tokens are those
    with most attention in the encoder. The rest of a segment's budget goes to anchors in every `every`-th of its
    frames, counted from the last, the same number in each: the centres of density peaks (4 neighbours) among the
    frame's other tokens. Every token of the segment that was not chosen by attention joins, once in each of these
    frames, the anchor that it is most similar to. An anchor that c tokens join, itself included, becomes w times itself
    plus 1 - w times their mean, where w = max(1 / (c + 1), `beta`).

    The budget is spent exactly. `as_released: true` rounds down the budgets of frames and of anchors as the authors do.
    Where frames with anchors cannot hold a segment's share, its other frames have anchors too. In the trace a token
    belongs to the most similar of its anchors. Pictures and one-frame videos are left unpruned and do not count towards
    `keep: {total: ...}`. A frame is what the model treats as one: Qwen merges two into one. Loops over videos and
    segments; waits for the device once per video, twice where an earlier stage dropped tokens.

    Paper: https://arxiv.org/abs/2503.11187. Training-free.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11187"
    deviations: ClassVar[str] = (
        "Frames are compared by the mean of their tokens, and attention is that of the encoder; the authors take both "
        "from SigLIP's pooling head, which checkpoints of LLaVA-OneVision lack. The budget is exact (as_released: true "
        "for their rounding). No random numbers among equal densities. Similarities and means are float32. DeepStack "
        "features of an anchor are the mean of what belongs to it in the trace."
    )

    contextual: float = Field(default=0.4, ge=0, le=1, description="share of a frame's budget that goes to anchors (d)")
    every: int = Field(default=4, ge=1, description="of so many frames of a segment, one has anchors (p)")
    beta: float = Field(default=0.6, gt=0, le=1, description="least weight of an anchor against what joins it")
    cut: float = Field(0.9, ge=-1, le=1, description="cosine of frames below which a segment begins (Qwen: 0.84)")
    segments: int = Field(default=8, ge=1, description="least number of segments (c)")
    as_released: bool = Field(default=False, description="rounding of the authors' code")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def budgets(self, x: Tensor, lengths: Sequence[int], k: int) -> list[int]:
        if self.as_released and self.keep.share is not None:
            return [max(1, int(n * self.keep.share)) for n in lengths]
        return super().budgets(x, lengths, k)

    def fold(self, tokens: VisualTokens, image: int, rows: slice, lengths: list[int], budgets: list[int]) -> Folded:
        x, device = tokens.x[rows].float(), tokens.x.device
        events = segments(merge_tokens(x, image_of(lengths, device), len(lengths)), self.cut, self.segments)
        most = [budget - int(budget * self.contextual) for budget in budgets]
        chosen = topk_tokens(tokens.fact("cls_attention")[rows].float(), offsets_of(lengths, device), most)
        home = torch.full((len(x),), -1, device=device).index_copy_(0, chosen, chosen)
        rest, others = rest_of(len(x), chosen), [n - k for n, k in zip(lengths, most, strict=True)]
        spare = [budget - k for budget, k in zip(budgets, most, strict=True)]
        ends = [0, *accumulate(events)]
        counts = [n for a, b in pairwise(ends) for n in self._anchors(spare[a:b], others[a:b])]
        values, made = x[rest], []
        centre = density_peaks(values, others, counts, NEIGHBOURS, limited=False)
        joins = centre != torch.arange(len(rest), device=device)
        anchors = joins.sort(stable=True).indices[: sum(counts)]  # which of the rest, frame by frame
        of, at = list(accumulate(others, initial=0)), list(accumulate(counts, initial=0))
        for a, b in pairwise(ends):
            mine, own = values[of[a] : of[b]], anchors[at[a] : at[b]]
            if not len(own):
                continue
            alike = normalize(mine, dim=1) @ normalize(values[own], dim=1).T
            home[rest[of[a] : of[b]]] = rest[own[alike.argmax(1)]]
            for part, anchor in zip(alike.split(counts[a:b], 1), own.split(counts[a:b]), strict=True):
                if len(anchor):
                    made.append(self._filled(values[anchor], mine, part.argmax(1)))
        kept = rest[anchors]
        home[kept] = kept
        new = (kept, torch.cat(made)) if made else None
        return Folded(torch.cat([chosen, kept]), home, torch.ones(len(x), device=device), made=new)

    def _anchors(self, spare: list[int], others: list[int]) -> list[int]:
        """Anchors of each frame of a segment: `spare` is left of its budget, `others` are its tokens not chosen yet."""
        frames = [t for t in range(len(spare)) if (len(spare) - 1 - t) % self.every == 0]
        total, counts = sum(spare), [0] * len(spare)
        each = total // len(frames)
        if self.as_released:
            return [min(each, others[t]) if t in frames else 0 for t in range(len(spare))]
        if total > sum(others[t] for t in frames):
            frames = list(range(len(spare)))
        wanted = torch.full((len(frames),), total / len(frames), dtype=torch.float64)
        given = apportion(wanted, [others[t] for t in frames], min(total, sum(others))) if total else counts
        return [dict(zip(frames, given, strict=False)).get(t, 0) for t in range(len(spare))]

    def _filled(self, anchors: Tensor, values: Tensor, slot: Tensor) -> Tensor:
        """[A, D] anchors after the values [R, D] joined them, each the one at its slot [R]."""
        joined = torch.zeros_like(anchors[:, :1]).index_add_(0, slot, torch.ones_like(values[:, :1]))
        mean = torch.zeros_like(anchors).index_add_(0, slot, values) / joined.clamp(min=1)
        weight = (1 / (joined + 1)).clamp(min=self.beta)
        return weight * anchors + (1 - weight) * mean

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return not self.as_released and super().counts_are_exact(layer, whole)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Distances within frames of 196 tokens, and cosines to 80 anchors, a tenth of the tokens of four frames."""
        return sum(2 * n * (min(n, 196) + min(n, 80)) * width for n in lengths)
