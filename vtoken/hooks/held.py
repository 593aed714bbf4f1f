"""What the slots of a layer hold after a cache stage: rows, padded on the left, and the logical positions behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtoken.hooks.cache import Slots
from vtoken.hooks.layout import take


@dataclass(frozen=True)
class Row:
    """One row of a prefill in the current layout, and what a layer holds of it.

    Attributes:
        prompt, tail: tokens of the prompt; of what follows it (drafts, an answer), which all stay.
        slots: per image, where its visual tokens are among the row's tokens.
        stay: prompt tokens that every head holds; counts: visual tokens of each image, None where that is not known.
    """

    prompt: int
    tail: int
    slots: tuple[tuple[int, ...], ...]
    stay: int = 0
    counts: tuple[int, ...] | None = None

    def columns(self) -> list[int]:
        """Slots that stand for those it holds. Heads may hold different visual tokens, so of each image it is the first ones: masks only
        ask whether a slot is real, and crop() whether the newest tokens are all there and in order."""
        if self.counts is None:
            kept = list(range(self.stay))
        else:
            gone = {slot for slots, k in zip(self.slots, self.counts, strict=True) for slot in slots[k:]}
            kept = [slot for slot in range(self.prompt) if slot not in gone]
        return [*kept, *range(self.prompt, self.prompt + self.tail)]


def left_padded(rows: Any) -> Tensor:
    """[B, Hk, longest, d] of rows [Hk, length, d]."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])


def slots_of(before: Slots, rows: tuple[Row, ...], dense: bool) -> Slots:
    """The slots of a layer that holds these rows.

    Args:
        before: those it had with everything in it; dense: whether earlier turns left it without padding.
    """
    columns = [row.columns() for row in rows]
    longest, total = max(map(len, columns)), before.logical.shape[1]
    past = total - max(row.prompt + row.tail for row in rows)
    starts = [total - row.prompt - row.tail for row in rows]
    padded = [[-1] * (longest - len(c)) + [start + i for i in c] for start, c in zip(starts, columns, strict=True)]
    index = torch.tensor(padded, device=before.logical.device)
    new = take(before.logical, index.clamp(min=0), 1).masked_fill(index < 0, -1)
    logical = torch.cat([before.logical[:, :past], new], 1)
    return replace(before, logical=logical, dense=dense and len(set(map(len, columns))) == 1)
