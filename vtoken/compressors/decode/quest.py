"""Quest: a generated token reads the pages whose keys might answer its query best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.kernels import gather_cache
from vtoken.stages.budget import Budget
from vtoken.stages.decode import Choice, DecodeStage, DecodeStep, among, highest, packed
from vtoken.stages.tokens import uploaded


class Quest(DecodeStage):
    """Cached visual tokens form pages of `size` neighbours, of which the smallest and largest value of every key
    channel are kept. The score of a page is an upper bound of q . k for its keys: the sum over channels of
    max(q min, q max), the highest among the query heads of a key head. Every key head reads its best pages, as many as
    `keep` tokens fill; the last tokens, which fill no page, are always read and count as one page.

    With `chunks`, a page has bounds for that many parts, and its best part counts; with `every`, a choice is made once
    in that many tokens. `size: 64, chunks: 4, every: 4, least: 3` is LServe's variant.

    Paper: https://arxiv.org/abs/2406.10774, and LServe's https://arxiv.org/abs/2502.14866
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    deviations: ClassVar[str] = (
        "Pages are made of visual tokens alone; text and what was generated are always read and do not count in "
        "`keep`, the authors' budget counts the whole context. One choice per key head: the authors' code repeats "
        "keys, so that every query head chooses. A number of tokens that no whole number of pages has is rounded up."
    )

    keep: Budget = Field(description="visual tokens of each image that a generated token reads, in whole pages")
    size: int = Field(default=16, ge=1, description="visual tokens of a page")
    chunks: int = Field(default=1, ge=1, description="parts of a page with bounds of their own")
    every: int = Field(default=1, ge=1, description="tokens for which a choice stands")
    least: int = Field(default=1, ge=1, description="pages that are read at least")
    dense_layers: tuple[int, ...] = Field(default=(0, 1), description="decoder layers that read everything")

    @model_validator(mode="after")
    def _parts(self) -> Quest:
        if self.size % self.chunks:
            raise ValueError(f"size {self.size} is no multiple of chunks {self.chunks}")
        return self

    def layers(self, depth: int) -> tuple[int, ...]:
        dense = {k % depth if -depth <= k < depth else k for k in self.dense_layers}
        return tuple(k for k in range(depth) if k not in dense)

    def choose(self, step: DecodeStep) -> Choice | None:
        pages = [n // self.size for n in step.lengths]
        taken = [self._pages(n, k) for n, k in zip(step.lengths, step.budgets, strict=True)]
        if taken == pages:
            return None
        counts = tuple(n % self.size + k * self.size for n, k in zip(step.lengths, taken, strict=True))
        since = step.since("chosen")
        if since is None or since >= self.every:
            step.mark("chosen")
            worth = among(self._worth(step.queries, *self._bounds(step, pages)), pages)
            places = self._places(highest(worth, taken), step.lengths, pages)
            step.memory["index"] = packed(places, counts)
        return Choice(step.memory["index"], counts)

    def _pages(self, visual: int, budget: int) -> int:
        """Full pages that are read of a row with `visual` visual tokens."""
        wanted = max(self.least, -(-budget // self.size)) - (visual % self.size > 0)
        return max(0, min(wanted, visual // self.size))

    def _bounds(self, step: DecodeStep, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, Hk, pages * chunks, d] smallest and largest values of the keys; only those of new pages are computed, and
        added to the others."""
        memory, most = step.memory, max(pages)
        if "low" not in memory or memory["low"].shape[2] < most * self.chunks or memory["whole"] < min(pages):
            first = memory.get("whole", 0)  # what all rows had before; of longer rows some is worked out again
            keys = gather_cache(step.keys, step.visual[:, None, first * self.size : most * self.size])
            parts = keys.unflatten(2, (-1, self.size // self.chunks))
            for name, found in (("low", parts.amin(3)), ("high", parts.amax(3))):
                memory[name] = torch.cat([memory[name][:, :, : first * self.chunks], found], 2) if first else found
            memory["whole"] = min(pages)
        return memory["low"], memory["high"]

    def _worth(self, queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """[B, Hk, pages] score of each page."""
        q = queries.unflatten(1, (low.shape[1], -1))
        # max(q min, q max) is q max where q is positive, q min where it is negative.
        bound = q.clamp(min=0) @ high.transpose(2, 3) + q.clamp(max=0) @ low.transpose(2, 3)
        return bound.float().amax(2).unflatten(2, (-1, self.chunks)).amax(3)

    def _places(self, best: Tensor, lengths: Sequence[int], pages: Sequence[int]) -> Tensor:
        """[B, Hk, K] visual tokens of these pages [B, Hk, P], and those that fill no page."""
        inside = torch.arange(self.size, device=best.device)
        full = (best[..., None] * self.size + inside).masked_fill(best[..., None] < 0, -1).flatten(2)
        left = [n - p * self.size for n, p in zip(lengths, pages, strict=True)]
        ends, sizes = (uploaded(each, best.device)[:, None] for each in (lengths, left))
        rest = torch.arange(max(left), device=best.device)
        rest = (ends - sizes + rest).masked_fill(rest >= sizes, -1)
        return torch.cat([full, rest[:, None].expand(-1, best.shape[1], -1)], 2)

    def visual_read(self, layer: int, acting: Sequence[int], images: Sequence[int], step: int) -> int:
        visual = sum(images)
        return visual % self.size + self.size * self._pages(visual, self.budget(images))

    def read_to_choose(self, layer: int, acting: Sequence[int], prompt: int, images: Sequence[int], step: int) -> float:
        """The bounds: two vectors of a key's width for every part of a page."""
        visual = sum(images)
        chooses = step % self.every == 0 and self._pages(visual, self.budget(images)) < visual // self.size
        return visual // self.size * self.chunks if chooses else 0
