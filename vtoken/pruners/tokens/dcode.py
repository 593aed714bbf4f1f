"""D-CoDe's tokens: keep the embeddings with the largest norm in each frame, and merge those that are similar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.stages import Keep, Pruner, VisualTokens, image_of, keep_where, offsets_of, place_in_image
from vtoken.stages.budget import Budget

FRAMES = 32  # frames compared at a time; bounds the memory


class DCoDe(Pruner):
    """In every frame (image), the `keep` embeddings with the largest L2 norm stay. Then, in order of falling norm, each
    one that is still there absorbs the later ones whose cosine similarity to it is at least `similarity`, and becomes
    their mean. How many are left depends on the picture: the plan counts `keep`, an upper bound.

    This is the token half of the method. Its choice of frames compares embeddings of CLIP ViT-L/14, a second encoder
    that no VLM contains: `vtoken.distinct_frames` makes it, for frames_relevant before this stage; 75 to 85 % of those
    frames are just evenly spaced (frames_uniform). Its decomposition of the question, which asks another LLM, is left
    out.

    Paper: https://arxiv.org/abs/2510.08818
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.08818"
    deviations: ClassVar[str] = (
        "Only the token half (see above). The authors' loop lets a token absorb ones that others absorbed before, "
        "takes means of means, and loses a group whose lowest-ranked index was absorbed already; here each token is "
        "absorbed once. Reading order; theirs is by norm. Their maximum and norm-weighted mean are left out."
    )

    keep: Budget = Field(
        default=Budget({"per_frame": 288}),
        description="tokens of each frame before merging: {per_frame: 288} as published for 576 a frame (360 on "
        "NExT-QA)",
    )
    similarity: float = Field(
        default=0.8,
        gt=-1,
        le=1,
        description="cosine similarity at or above which tokens are merged (the authors: 0.9 on NExT-QA)",
    )

    def select(self, tokens: VisualTokens) -> Keep:
        """One step per kept token of a frame, for all frames at once. Waits for the device once, for the counts."""
        device = tokens.x.device
        norm = tokens.x.float().norm(dim=-1)
        if self.keep.per is not None and tokens.segment is not None:
            order, sizes, counts, _ = self.per_segment(tokens)
        else:
            order, sizes = torch.arange(len(norm), device=device), tokens.lengths
            counts = self.keep.counts(sizes, tokens.row)
        chosen = order[topk_tokens(norm[order], offsets_of(sizes, device), list(counts))]
        frame = image_of(counts, device)
        ranked = norm[chosen].argsort(descending=True, stable=True)
        chosen = chosen[ranked[frame[ranked].argsort(stable=True)]]
        at = place_in_image(counts, device)
        token = chosen.new_full((len(counts), max(counts)), -1)
        token[frame, at] = chosen
        owner = torch.cat([self._owners(tokens.x, some) for some in token.split(FRAMES)])
        absorber = token.gather(1, owner)[frame, at]
        stay = torch.zeros_like(norm, dtype=torch.bool).index_put((chosen,), absorber == chosen)
        keep = keep_where(tokens, stay)
        if len(keep.index) == len(chosen):
            return keep
        slot = torch.full_like(norm, -1, dtype=torch.long)
        slot[keep.index] = torch.arange(len(keep.index), device=device)
        into = torch.full_like(slot, -1)
        into[chosen] = slot[absorber]
        return Keep(keep.index, keep.lengths, into)

    def _owners(self, x: Tensor, token: Tensor) -> Tensor:
        """[F, K] rank of the token that absorbs each of `token` [F, K], which are rows of x in order of falling norm;
        -1 is padding."""
        free = token >= 0
        unit = torch.nn.functional.normalize(x[token.clamp(min=0)].float(), dim=-1)
        alike = unit @ unit.transpose(1, 2) >= self.similarity
        rank = torch.arange(token.shape[1], device=x.device)
        owner = rank.expand_as(token)
        for i in range(token.shape[1]):
            joins = alike[:, i] & free & free[:, i, None] & (rank > i)
            owner = torch.where(joins, i, owner)
            free = free & ~joins
        return owner

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return False

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Norms, and an upper bound for the similarities: every token with all kept tokens of its frame."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * (k + 1) * width for n, k in zip(lengths, counts, strict=True))
