"""DToMe-post: rounds of threshold merging after the vision encoder, where merging inside it is impossible (Qwen)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vtoken.compressors._matching import match, merge
from vtoken.compressors._thresholds import Thresholds
from vtoken.stages import Compressor, Fact, Keep, Parts, Site, VisualTokens, image_of, keep_all


class DToMePost(Compressor, Thresholds):
    """In each round, the visual tokens of a picture (crop, frame) are dealt alternately to two sides, and each token of
    side A merges into its most similar token of side B if their similarity exceeds the round's threshold; at most half
    of the tokens merge. Similarity is the cosine of the keys in the encoder layer that attention is read from (the last
    with full attention), averaged over heads and over the patches of a token. The key of a merged token is the mean of
    its members' keys, weighted, like its embedding, by the number of tokens they represent.

    Not DyMU: a substitute for its first half where an encoder joins 2 x 2 patches. It saves nothing inside the encoder
    and needs thresholds of its own, which `vtoken calibrate dtome` finds for Qwen models. No published numbers.
    `expected_counts` uses the mean count of the calibration, or assumes that nothing merges if there was none. Waits
    for the device once per round, for the counts.

    Paper: https://arxiv.org/abs/2504.17040
    """

    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.17040"
    deviations: ClassVar[str] = "The authors merge inside the encoder only; this is an adaptation of ours."

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("mean_key"),)

    def taken(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
        """Number of merges per sequence in round `at`: value [S, W] similarities, -inf if there is no pair; `lengths`:
        tokens per sequence."""
        return self.above(value, lengths, at)

    def select(self, tokens: VisualTokens) -> Keep:
        owner, sizes, each = sequences(tokens)
        metric, size, device = tokens.fact("mean_key").float(), tokens.size, owner.device
        size = torch.ones(len(owner), device=device) if size is None else size
        order = torch.argsort(owner, stable=True)
        index = into = places = torch.arange(len(owner), device=device)
        for at in range(len(self.thresholds)):
            pairs = match(metric, order, sizes)
            taken = self.taken(pairs.value, sizes, at)
            if not any(taken):
                continue
            left, to, order = merge(pairs, sizes, taken, places)
            metric = Keep(left, (len(left),), to, size).apply(metric)
            size = torch.zeros(len(left), device=device).index_add_(0, to, size)
            sizes = [n - r for n, r in zip(sizes, taken, strict=True)]
            index, into = index[left], to[into]
        if len(index) == len(into):
            return keep_all(tokens)
        lengths = tuple(sum(sizes[i : i + each]) for i in range(0, len(sizes), each))
        return Keep(index, lengths, into, tokens.size, complete=True)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return self.expected(lengths, lengths, -1)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities and means, counted at the decoder's width and as if nothing had merged before the last round: an
        upper bound."""
        return len(self.thresholds) * sum(n * n // 2 + 2 * n for n in lengths) * width


def sequences(tokens: VisualTokens) -> tuple[Tensor, list[int], int]:
    """[ΣN] sequence of each token; tokens per sequence; sequences per image."""
    image = image_of(tokens.lengths, tokens.x.device)
    if tokens.segment is None:
        return image, list(tokens.lengths), 1
    each = int(tokens.segment.max()) + 1 if len(image) else 1
    owner = image * each + tokens.segment
    sizes = owner.new_zeros(each * len(tokens.lengths)).index_add_(0, owner, torch.ones_like(owner))
    return owner, sizes.tolist(), each
