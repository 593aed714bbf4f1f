"""Shared by methods that decide pool by pool: image by image or, with a budget per frame or crop, by segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtoken.stages import Keep, Pruner, VisualTokens, keep_all, offsets_of


def choose(stage: Pruner, tokens: VisualTokens, pick: Callable[[Tensor, int], Tensor]) -> Keep:
    """Calls `pick(rows, k)` for each pool that loses tokens: it gets the pool's packed rows [n], ascending, and returns
    the k that stay, in any order; 1 <= k < n. Loops over pools."""
    return choose_alike(stage, tokens, lambda rows, k: torch.stack([pick(pool, k) for pool in rows]))


def choose_alike(stage: Pruner, tokens: VisualTokens, pick: Callable[[Tensor, int], Tensor]) -> Keep:
    """As choose, for functions that take several pools of equal size and budget: `pick(rows [pools, n], k)` returns
    [pools, k]. Loops over pairs of size and budget."""
    order, sizes, counts, lengths = pools_of(stage, tokens)
    if counts == sizes:
        return keep_all(tokens)
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for rows, *size in zip(order.split(list(sizes)), sizes, counts, strict=True):
        alike.setdefault((size[0], size[1]), []).append(rows)
    if len(alike) == 1:
        return Keep(pick(order.unflatten(0, (len(sizes), -1)), counts[0]).flatten().sort().values, lengths)
    kept = [(torch.stack(rows) if k == n else pick(torch.stack(rows), k)).flatten() for (n, k), rows in alike.items()]
    return Keep(torch.cat(kept).sort().values, lengths)


def choose_together(
    stage: Pruner, tokens: VisualTokens, pick: Callable[[Tensor, list[int], list[int]], Tensor]
) -> Keep:
    """As choose, for functions that take a ragged batch: `pick(rows, sizes, counts)` gets the packed rows [Σn] of all
    pools that lose tokens, and their sizes and budgets. It returns positions [Σk] in `rows`, pool by pool, in any order
    within a pool."""
    order, sizes, counts, lengths = pools_of(stage, tokens)
    if counts == sizes:
        return keep_all(tokens)
    pools = list(zip(order.split(list(sizes)), sizes, counts, strict=True))
    rows = torch.cat([rows for rows, n, k in pools if k < n])
    chosen = rows[pick(rows, [n for _, n, k in pools if k < n], [k for _, n, k in pools if k < n])]
    return Keep(torch.cat([chosen, *(rows for rows, n, k in pools if k == n)]).sort().values, lengths)


def pools_of(stage: Pruner, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Order [ΣN] of the tokens, pool by pool; tokens per pool; tokens to keep per pool; tokens to keep per image."""
    if stage.keep.per is not None and tokens.segment is not None:
        return stage.per_segment(tokens)
    counts = stage.keep.counts(tokens.lengths, tokens.row)
    return torch.arange(len(tokens.x), device=tokens.x.device), tokens.lengths, counts, counts


def offsets_on_host(lengths: Sequence[int]) -> Tensor:
    """[len + 1] packed offsets on the host; ops copy them to a device without waiting for it."""
    return offsets_of(lengths, torch.device("cpu"))


def merged(keep: Keep, home: Tensor, weight: Tensor | None = None, complete: bool = False) -> Keep:
    """The decision with `Keep.into` made from `home` [ΣN], the packed row that absorbs each dropped token (-1: none).
    With `complete`, `home` must hold no -1, and every kept token must be its own home."""
    slot = torch.full_like(home, -1)
    slot[keep.index] = torch.arange(len(keep.index), device=home.device)
    if complete:
        return Keep(keep.index, keep.lengths, slot[home], weight, complete=True)
    into = torch.where(slot >= 0, slot, torch.where(home >= 0, slot[home.clamp(min=0)], -1))
    return Keep(keep.index, keep.lengths, into, weight)


def top(scores: Tensor, k: int) -> Tensor:
    """[..., k] positions of the highest scores [..., n], best first, ties to the lower index."""
    return scores.sort(descending=True, stable=True).indices[..., :k]


def rest_of(n: int, taken: Tensor) -> Tensor:
    """[n - len(taken)] positions that are not taken, ascending; does not wait for the device."""
    free = torch.ones(n, dtype=torch.int8, device=taken.device).index_fill_(0, taken, 0)
    return top(free, n - len(taken))
