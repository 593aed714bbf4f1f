"""The attention of some queries of a prompt in one decoder layer, computed once for all stages that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from vtoken.kernels import probe_sums, received_attention


class Once:
    """Something whose results are computed once, and kept in `known`."""

    known: dict[Hashable, Any]

    def once(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """`work()`, computed once per key."""
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]


class QueryAttention(Once):
    """The attention of one row of a prefill in one decoder layer. A stage of site attention runs first; a stage of site
    cache reuses its results.

    Attributes:
        q: [H, N, d] queries with RoPE; k: [Hk, N, d] keys; scale: factor on q . k. Query head h reads key head
            h // (H / Hk).
        announced: for how many last queries a later stage will ask `received`, 0 for none. A pass over more queries
            stores that result too.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, announced: int = 0) -> None:
        self.q, self.k, self.scale, self.announced = q, k, scale, announced
        self.known = {}

    def lines(self, count: int) -> tuple[Tensor, Tensor]:
        """[Hk, H / Hk, N] fp32 each: attention of the last `count` queries, summed per key and per distance."""

        def work() -> tuple[Tensor, Tensor]:
            recent = self.announced if self.announced < count else 0
            sums = probe_sums(self.q[None, :, -count:], self.k[None], self.scale, recent=recent)
            vertical, slash, late = (x[0].unflatten(0, (len(self.k), -1)) for x in sums)
            self.known.setdefault(count, vertical)
            if recent:
                self.known.setdefault(recent, late)
            return vertical, slash

        found: tuple[Tensor, Tensor] = self.once(("lines", count), work)
        return found

    def received(self, count: int) -> Tensor:
        """[Hk, H / Hk, N] fp32: attention of the last `count` queries to every key, summed."""

        def work() -> Tensor:
            q, k = (x.transpose(0, 1) for x in (self.q[:, -count:], self.k))
            q_ends, k_ends = (torch.tensor([0, len(x)]) for x in (q, k))
            sums = received_attention(q, k, q_ends, k_ends, self.scale, causal=True)
            return sums.T.unflatten(0, (len(self.k), -1))

        found: Tensor = self.once(count, work)
        return found

    def heads(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For every key head, its queries [H / Hk, N, d] and keys [1, N, d]."""
        return zip(self.q.split(len(self.q) // len(self.k)), self.k.split(1), strict=True)


def shared(given: QueryAttention | None, q: Tensor, k: Tensor, scale: float) -> QueryAttention:
    """The given object if it belongs to these very queries and keys; else a new one."""
    if given is not None and same(given.q, q) and same(given.k, k) and given.scale == scale:
        return given
    return QueryAttention(q, k, scale)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
