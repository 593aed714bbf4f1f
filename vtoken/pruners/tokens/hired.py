"""HiRED: divide the budget among the crops of a high-resolution picture by what the downscaled whole shows there."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners._pools import offsets_on_host, top
from vtoken.stages import Fact, Keep, Parts, Pruner, VisualTokens, keep_all, size_of


class HiRED(Pruner):
    """Of the K tokens of an anyres picture, floor(alpha * K) go to the downscaled whole and the rest to the crops, in
    proportion to their hits. The content of the picture is the floor((1 - alpha) * n) of the whole's n tokens with the
    highest CLS attention in layer `initial_layer`; each of these is a hit for the crop that shows the same place.
    Within the whole and within each crop, the tokens with the highest CLS attention in the feature layer stay. A
    picture of one crop (LLaVA-1.5, Qwen) and a video have nothing to divide: the highest CLS attention stays, as in
    FasterVLM.

    Shares are whole numbers (largest remainder, ties to the earlier crop). What a crop cannot hold goes to the others,
    so K is exact. Towers without CLS rank by received attention in both layers (if the early layer attends within
    windows, by that of the next layer with full attention).

    Paper: https://arxiv.org/abs/2408.10945.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2408.10945"
    deviations: ClassVar[str] = (
        "The authors' code (August 2024) splits by float ratios, rounds down and drops the remainder; cuts the whole's "
        "raster into runs of equal length instead of regions (region: reference); spends budget on padding tokens that "
        "unpadding then drops; and prunes nothing when LLaVA-NeXT has one crop."
    )

    alpha: float = Field(default=0.5, ge=0, le=1, description="share of the budget for the downscaled whole")
    region: Literal["quadrant", "reference"] = Field(
        default="quadrant",
        description="quadrant: a token of the whole belongs to the crop that shows its place; reference: the authors' "
        "runs of the raster",
    )
    initial_layer: int = Field(
        default=0, description="encoder layer whose attention locates the content; negative: from the end"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> HiRED:
        if self.keep.per is not None:
            raise ValueError(
                f"hired shares one budget out among the crops itself, so {self.keep.per} does not fit; give the "
                "budget of the image (keep: 640 instead of {per_crop: 128} on five crops) or a share (keep: 20%)"
            )
        return self

    def needs(self) -> tuple[Fact, ...]:
        return Fact("cls_attention", self.initial_layer), Fact("cls_attention")

    def select(self, tokens: VisualTokens) -> Keep:
        """Waits for the device once per anyres picture, for its tokens and hits per crop."""
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        score, order, lengths, keep, start = tokens.fact("cls_attention"), [], [], [], 0
        anyres = [len(parts) == 2 and tokens.segment is not None for parts in tokens.parts]
        if not any(anyres):
            return Keep(topk_tokens(score, offsets_on_host(tokens.lengths), counts), counts)
        for n, k, parts, several in zip(tokens.lengths, counts, tokens.parts, anyres, strict=True):
            here = slice(start, start + n)
            if several and tokens.segment is not None:
                order.append(start + tokens.segment[here].argsort(stable=True))
                tokens_of, keep_of = self._split(tokens, here, tokens.segment[here], parts, k)
            else:
                order.append(torch.arange(start, start + n, device=score.device))
                tokens_of, keep_of = [n], [k]
            lengths += tokens_of
            keep += keep_of
            start += n
        rows = torch.cat(order)
        return Keep(rows[topk_tokens(score[rows], offsets_on_host(lengths), keep)].sort().values, counts)

    def _split(
        self, tokens: VisualTokens, here: slice, segment: Tensor, parts: Parts, k: int
    ) -> tuple[list[int], list[int]]:
        """Tokens of the whole and of each crop of one image, and tokens to keep of each; `here` is the image's slice of
        the packed axis."""
        alpha, place = Fraction(str(self.alpha)), tokens.raster_index[here]
        lengths = torch.bincount(segment).tolist()
        base, *crops = lengths
        whole = max(min(int(alpha * k), base), k - sum(crops))
        if not crops:
            return lengths, [whole]
        found = top(tokens.fact("cls_attention", self.initial_layer)[here][:base], int((1 - alpha) * base))
        if self.region == "quadrant":
            crop = region(place[found], place[base:], segment[base:], parts, len(lengths))
        else:
            crop = 1 + place[found] * len(crops) // size_of(parts[:1])
        hits = crop.new_zeros(len(lengths)).index_add_(0, crop, torch.ones_like(crop)).tolist()
        return lengths, [whole, *share(k - whole, hits[1:], crops)]


def region(content: Tensor, place: Tensor, segment: Tensor, parts: Parts, most: int) -> Tensor:
    """[C] crop that shows the place of each token of the whole in `content` [C], raster indices. `place` and `segment`
    [n] are the raster index and crop of the crops' live tokens; `most` is the number of crops, the whole included."""
    (_, height, width), (_, rows, columns) = parts
    stitched = place - height * width
    at = torch.stack([stitched // columns, stitched % columns], 1)
    # Crops are numbered in reading order, so the place lies in the first one that reaches as far down and to the right.
    last = at.new_full((most, 2), -rows - columns).scatter_reduce_(0, segment[:, None].expand_as(at), at, "amax")
    y, x = content // width, content % width
    centre = torch.stack([(2 * y + 1) * rows // (2 * height), (2 * x + 1) * columns // (2 * width)], 1)
    return (centre[:, None] - last).clamp(min=0).sum(2).argmin(1)


def share(total: int, hits: Sequence[int], room: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `hits`, none above its `room`, exact if there is room for all; without hits, in
    proportion to `room`."""
    out = [0] * len(room)
    while left := total - sum(out):
        weight = [h if o < r else 0 for o, h, r in zip(out, hits, room, strict=True)]
        if not any(weight):
            weight = [r - o for o, r in zip(out, room, strict=True)]
        floors, rest = zip(*(divmod(left * w, sum(weight)) for w in weight), strict=True)
        extra = sorted(range(len(room)), key=lambda i: -rest[i])[: left - sum(floors)]
        out = [min(r, o + f + (i in extra)) for i, (o, f, r) in enumerate(zip(out, floors, room, strict=True))]
    return out
