"""What became of every unpruned visual token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vtoken.stages import Keep, image_of, offsets_of


@dataclass(frozen=True)
class TokenHistory:
    """What became of every unpruned visual token of a batch of images.

    Attributes:
        full: unpruned tokens per image.
        raster_index: [ΣK] position of each live token in its image's unpruned raster.
        lengths: live tokens per image; None means `full`.
        slot: [Σfull] index, among all live tokens, of the one that stands for each unpruned one, -1 = dropped; None
            while nothing was merged.
        complete: `slot` holds no -1.
        known_size: `size`, where the decision tells it.
    """

    full: tuple[int, ...]
    raster_index: Tensor
    lengths: tuple[int, ...] | None = None
    slot: Tensor | None = None
    complete: bool = True
    known_size: Tensor | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Live tokens per image."""
        return self.full if self.lengths is None else self.lengths

    @property
    def short(self) -> bool:
        """Whether any token is gone."""
        return self.counts != self.full

    @cached_property
    def places(self) -> Tensor:
        """[ΣK] position of each live token among the unpruned ones of all images."""
        if len(self.full) == 1:
            return self.raster_index
        device = self.raster_index.device
        return self.raster_index + offsets_of(self.full, device)[:-1][image_of(self.counts, device)]

    def mask(self) -> Tensor | None:
        """[Σfull] bool: which tokens are live; None where all are."""
        if not self.short:
            return None
        dead = torch.zeros(sum(self.full), dtype=torch.bool, device=self.raster_index.device)
        return dead.index_fill_(0, self.places, True)

    def advance(self, keep: Keep) -> TokenHistory:
        """The history after a decision."""
        index = keep.index.to(self.raster_index.device)
        # In a single image that is whole, the index of a token is its raster index.
        raster_index = index if len(self.full) == 1 and not self.short else self.raster_index[index]
        if keep.into is None and self.slot is None:
            return TokenHistory(self.full, raster_index, keep.lengths)
        complete = self.complete and keep.complete and (self.slot is not None or not self.short)
        size = keep.total if complete and keep.weight is self.size else None
        return TokenHistory(self.full, raster_index, keep.lengths, self._moved(keep, index, complete), complete, size)

    def _moved(self, keep: Keep, index: Tensor, complete: bool) -> Tensor:
        """`slot` after a decision."""
        if keep.into is None:
            into = self.raster_index.new_full((len(self.raster_index),), -1)
            into[index] = torch.arange(len(index), device=index.device)
        else:
            into = keep.into.to(index.device)
        if self.slot is not None:
            return into[self.slot] if complete else _last_for_none(into)[self.slot]
        if not self.short:
            return into
        moved = into.new_full((sum(self.full),), -1)
        moved[self.places] = into
        return moved

    @cached_property
    def absorbed_by(self) -> Tensor | None:
        """[Σfull] position, in its image's raster, of the live token that stands for each unpruned one, -1 = dropped;
        None while nothing was merged."""
        if self.slot is None:
            return None
        return (self.raster_index if self.complete else _last_for_none(self.raster_index))[self.slot]

    def absorbing(self, absorbed_by: Tensor) -> TokenHistory:
        """The same live tokens, standing for others: `absorbed_by` as above, on the same device."""
        device = absorbed_by.device
        slot_at = absorbed_by.new_full((sum(self.full),), -1)
        slot_at[self.places] = torch.arange(len(self.raster_index), device=device)
        place = absorbed_by + offsets_of(self.full, device)[:-1][image_of(self.full, device)]
        return replace(self, slot=torch.where(absorbed_by < 0, -1, slot_at[place.clamp(min=0)]), complete=False)

    @cached_property
    def size(self) -> Tensor | None:
        """[ΣK] float32, unpruned tokens that each live one stands for; None while nothing was merged."""
        if self.slot is None or self.known_size is not None:
            return self.known_size
        live = len(self.raster_index)
        slot = self.slot if self.complete else self.slot.remainder(live + 1)
        ones = torch.ones(len(slot), device=slot.device)
        return torch.zeros(live + 1, device=slot.device).index_add_(0, slot, ones)[:live]

    def kept(self) -> list[Tensor]:
        """Per image, unpruned positions of its live tokens."""
        return list(self.raster_index.split(self.counts))

    def into(self) -> list[Tensor] | None:
        """`absorbed_by`, per image."""
        return None if self.absorbed_by is None else list(self.absorbed_by.split(self.full))


def _last_for_none(values: Tensor) -> Tensor:
    """The values and a -1 behind them, so that index -1 finds -1."""
    return torch.cat([values, values.new_full((1,), -1)])
