"""FlowCut's arithmetic on packed scores. Units are the segments that are cut by themselves: images, crops or frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.stages import Parts, VisualTokens, image_of, offsets_of, size_of
from vtoken.stages.budget import Budget


def targets(keep: Budget, lengths: Sequence[int], parts: Sequence[Parts]) -> tuple[int, ...]:
    """Tokens that stay of each image in the end; shares are of the unpruned tokens, whatever earlier layers dropped."""
    wanted = keep.counts([size_of(image) for image in parts], range(len(parts)))
    return tuple(min(n, k) for n, k in zip(lengths, wanted, strict=True))


def share(x: Tensor, held: Sequence[int]) -> Tensor:
    """x [ΣN], none negative, over the sum of its unit; zeros where that is 0. `held`: tokens per unit."""
    counts = torch.tensor(held, device=x.device)
    total = torch.segment_reduce(x, "sum", lengths=counts, unsafe=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x / total.repeat_interleave(counts, output_size=len(x))


def losses(p: Tensor, held: Sequence[int], target: Sequence[int], ahead: int) -> Tensor:
    """[units] int64: how many tokens the entropy of each unit lets go of.

    Args:
        p: [ΣN] shares of the attention.
        target: tokens that stay in the end, per unit.
        ahead: layers from here to the last cut, at least 1.
    """
    n, k = (torch.tensor(counts, device=p.device) for counts in (held, target))
    entropy = torch.segment_reduce(torch.special.entr(p), "sum", lengths=n, unsafe=True) / n.clamp(min=2).log()
    return ((n - k) / ahead**0.5 * (1 - entropy**2)).round().clamp(min=0).long()


def cumulated(tokens: VisualTokens, order: Tensor, flow: Tensor, momentum: float) -> Tensor:
    """`flow` [ΣN] (in `order`) mixed with what earlier layers left in `tokens.memory`, and left there for the next one.

    Kept by place, so that other stages may drop tokens in between.
    """
    sizes = [size_of(parts) for parts in tokens.parts]
    starts = offsets_of(sizes, flow.device)[:-1].long()
    at = (starts[image_of(tokens.lengths, flow.device)] + tokens.raster_index)[order]
    past = tokens.memory.get("score")
    if past is None:
        tokens.memory["score"] = past = flow.new_zeros(sum(sizes))
        score = flow
    else:
        score = momentum * past[at] + (1 - momentum) * flow
    past[at] = score
    return score
