"""FlowCut's arithmetic on packed scores. A unit is what loses tokens on its own: an image, a crop or a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from vtoken.stages import Keep, Parts, VisualTokens, image_of, offsets_of, size_of, uploaded
from vtoken.stages.budget import Budget


def targets(keep: Budget, lengths: Sequence[int], parts: Sequence[Parts]) -> tuple[int, ...]:
    """Tokens of each image that stay in the end; shares are of the unpruned tokens, whatever earlier layers dropped."""
    wanted = keep.counts([size_of(image) for image in parts], range(len(parts)))
    return tuple(min(n, k) for n, k in zip(lengths, wanted, strict=True))


def losses(attention: Tensor, sizes: Sequence[int], target: Sequence[int], ahead: int) -> list[int]:
    """How many tokens each unit may lose, given the entropy of its attention. Waits for the device once.

    Args:
        attention: [ΣN] float32, non-negative.
        target: tokens that stay in the end, per unit.
        ahead: layers from here to the last cut, at least 1.
    """
    both = torch.stack([attention, torch.special.entr(attention)], 1)
    lengths = uploaded(sizes, both.device)
    sums = torch.segment_reduce(both, "sum", lengths=lengths, unsafe=True).tolist()
    return [loss(total, entropies, n, k, ahead) for (total, entropies), n, k in zip(sums, sizes, target, strict=True)]


def loss(total: float, entropies: float, n: int, k: int, ahead: int) -> int:
    """How many tokens a unit of n tokens may lose, given `total`, the sum of its attention a, and `entropies`, the sum
    of -a log a. The shares a / total have the entropy log(total) + entropies / total."""
    entropy = (log(total) + entropies / total) / log(max(n, 2)) if total > 0 else 0.0
    return max(0, round((n - k) / ahead**0.5 * (1 - entropy**2)))


@dataclass
class Scores:
    """Scores [ΣN] accumulated over the layers so far, of the tokens with these raster indices, `lengths` per image;
    `keep` is the cut that the layer made by them, if any."""

    values: Tensor
    raster_index: Tensor
    lengths: tuple[int, ...]
    keep: Keep | None = None

    def now(self, tokens: VisualTokens) -> Tensor:
        """[ΣK] scores of the tokens that are live now; other stages may have dropped some in between."""
        if self.keep is None and self.lengths == tokens.lengths:
            return self.values
        if self.keep is not None and self.keep.lengths == tokens.lengths:
            return self.values[self.keep.index]
        sizes = [size_of(parts) for parts in tokens.parts]
        starts = offsets_of(sizes, self.values.device)[:-1]
        by_place = self.values.new_zeros(sum(sizes))
        by_place[starts[image_of(self.lengths, starts.device)] + self.raster_index] = self.values
        return by_place[starts[image_of(tokens.lengths, starts.device)] + tokens.raster_index]


def cumulated(tokens: VisualTokens, flow: Tensor, momentum: float) -> Scores:
    """`flow` [ΣN] mixed with the score that earlier layers left in `tokens.memory`; stores the result there for the
    next layer."""
    past: Scores | None = tokens.memory.get("score")
    mixed = flow if past is None else torch.add(momentum * past.now(tokens), flow, alpha=1 - momentum)
    tokens.memory["score"] = scores = Scores(mixed, tokens.raster_index, tokens.lengths)
    return scores
