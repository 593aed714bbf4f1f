"""FlowCut's arithmetic on packed scores. Units are the segments that are cut by themselves: images, crops or frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from vtoken.stages import Keep, Parts, VisualTokens, image_of, offsets_of, size_of
from vtoken.stages.budget import Budget


def targets(keep: Budget, lengths: Sequence[int], parts: Sequence[Parts]) -> tuple[int, ...]:
    """Tokens that stay of each image in the end; shares are of the unpruned tokens, whatever earlier layers dropped."""
    wanted = keep.counts([size_of(image) for image in parts], range(len(parts)))
    return tuple(min(n, k) for n, k in zip(lengths, wanted, strict=True))


def losses(attention: Tensor, held: Sequence[int], target: Sequence[int], ahead: int) -> list[int]:
    """How many tokens the entropy of each unit lets go of. Asks the device once.

    Args:
        attention: [ΣN] float32, none negative.
        target: tokens that stay in the end, per unit.
        ahead: layers from here to the last cut, at least 1.
    """
    both = torch.stack([attention, torch.special.entr(attention)], 1)
    lengths = torch.tensor(held, device=both.device)
    sums = torch.segment_reduce(both, "sum", lengths=lengths, unsafe=True).tolist()
    return [loss(total, entropies, n, k, ahead) for (total, entropies), n, k in zip(sums, held, target, strict=True)]


def loss(total: float, entropies: float, n: int, k: int, ahead: int) -> int:
    """Of one unit of n tokens, whose attention has this sum, and this sum of -a log a. Shares p = a / total have the
    entropy log(total) + entropies / total."""
    entropy = (log(total) + entropies / total) / log(max(n, 2)) if total > 0 else 0.0
    return max(0, round((n - k) / ahead**0.5 * (1 - entropy**2)))


@dataclass
class Scores:
    """Scores [ΣN] cumulated over the layers so far, of the tokens with this raster index, so many per image; `keep` is
    what was then left of them."""

    values: Tensor
    raster_index: Tensor
    lengths: tuple[int, ...]
    keep: Keep | None = None

    def now(self, tokens: VisualTokens) -> Tensor:
        """[ΣK] of the tokens that are live now; other stages may have dropped some in between."""
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
    """`flow` [ΣN] mixed with what earlier layers left in `tokens.memory`, and left there for the next one."""
    past: Scores | None = tokens.memory.get("score")
    mixed = flow if past is None else torch.add(momentum * past.now(tokens), flow, alpha=1 - momentum)
    tokens.memory["score"] = scores = Scores(mixed, tokens.raster_index, tokens.lengths)
    return scores
