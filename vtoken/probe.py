"""What some queries of a prompt attend to in one decoder layer, worked out once for all stages that ask."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor


class Probe:
    """One row of a prefill in one decoder layer. A stage of site attention comes first, one of site cache finds what it left.

    Attributes:
        q: [H, N, d] queries with RoPE; k: [Hk, N, d] keys, query head h reads key head h // (H / Hk); scale: factor on q . k.
        announced: numbers of last queries whose sums will be asked for later. A pass over as many or more leaves them behind.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, announced: tuple[int, ...] = ()) -> None:
        self.q, self.k, self.scale, self.announced = q, k, scale, announced
        self._found: dict[Hashable, Any] = {}

    def rows(self, count: int) -> Iterator[Tensor]:
        """[H / Hk, count, N] fp32 attention of the last `count` queries, key head by key head: of all it would be H x count x N."""
        sums: dict[int, list[Tensor]] = {n: [] for n in self.announced if n <= count and n not in self._found}
        for q, k in self.heads():
            found = last_rows(q, k, count, self.scale)
            for n, each in sums.items():
                each.append(found[:, -n:].sum(1))
                if len(each) == len(self.k):
                    self._found[n] = torch.stack(each)
            yield found

    def received(self, count: int) -> Tensor:
        """[Hk, H / Hk, N] fp32: attention that every token receives from the last `count` queries, summed over them."""
        return self.once(count, lambda: torch.stack([found.sum(1) for found in self.rows(count)]))

    def heads(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Queries [H / Hk, N, d] and keys [1, N, d] of every key head."""
        return zip(self.q.split(len(self.q) // len(self.k)), self.k.split(1), strict=True)

    def once(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """What `work` returns, from the first time it was asked for under this key."""
        if key not in self._found:
            self._found[key] = work()
        return self._found[key]


def shared(given: Probe | None, q: Tensor, k: Tensor, scale: float) -> Probe:
    """The probe that was handed on, if it is of these very queries and keys; else one of its own."""
    if given is not None and (same(given.q, q) and same(given.k, k)) and given.scale == scale:
        return given
    return Probe(q, k, scale)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one view of the same memory."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def last_rows(q: Tensor, k: Tensor, rows: int, scale: float) -> Tensor:
    """[H, rows, N] fp32 attention of the last queries of [H, N, d] over keys [H or 1, N, d], causal."""
    return rows_at(q, k, torch.arange(k.shape[1] - rows, k.shape[1], device=q.device), scale)


def rows_at(q: Tensor, k: Tensor, at: Tensor, scale: float) -> Tensor:
    """[H, R, N] fp32 attention of the queries at these positions [R] of [H, N, d] over keys [H or 1, N, d], causal."""
    scores = (q[:, at].float() @ k.float().transpose(1, 2)) * scale
    ahead = torch.arange(k.shape[1], device=q.device) > at[:, None]
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)
