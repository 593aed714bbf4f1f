"""One forward of the language model on a cache that holds a pruned prompt: slots of its tokens, and keys they see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.state.layer_kinds import widen
from vtoken.hooks.state.left_padding import take
from vtoken.hooks.state.pruned_cache import CacheOwner, PrunedCache, SlotMap, adopt, unmasked

# For all that happens at prefill: torch.compile misreads thread-local state (it sees the defaults of the class), and so
# would see no images.
eager = torch.compiler.disable


def steps(hidden: Tensor, cache: Any) -> bool:
    """Whether a layer is in a decode step for which `Run.flow` has no state. The cache tells, because a decode step may
    be compiled."""
    return hidden.shape[1] == 1 and cache is not None and not getattr(cache, "busy", False)


@dataclass
class ForwardState:
    """State of one forward on a cache that holds a pruned prompt, or (`PrefillState`) of one that prunes.

    Attributes:
        new: [B, L] which of this forward's logical tokens are real (not padding).
        counts: live tokens per row, on the host (padding of a text turn counts as live: only the mask shows it).
        past: logical tokens cached before; mask: the 2D mask of logical length, if any.
        positions: logical position ids [..., B or 1, L].
        alive: [B, L] which logical columns are still in the sequence.
        index, valid: [B, P] the physical layout: column of each slot, and whether it is real.
        group: first layer of the current layer group; `key_mask` its 2D mask over `slots` past and new slots (None: all
            real), `masks` that mask in the backend's form, by kind of layer, for kinds that asked.
        chosen: [B, P] slots of the layout with which the decoder was entered, where the current one is another;
            `numbers` [..., B, P]: renumbered positions of the current one. `layer_kwargs`: kind of layer -> RoPE and
            position ids in place of the model's own.
        blocks: [B, L] columns of the same number see each other both ways; -1: causal; None: all are causal.
        renumbers: positions are compact; owner: of the cache.
        unmerged: how attention sees merged tokens at all their places, when it does; steered: what stages that
            steer attention must know of this forward.
        slots_of_rows: `valid`, and per row the slots [n] where it is True: see `real_slots`.
    """

    new: Tensor
    counts: list[int]
    past: int
    mask: Tensor | None
    positions: Tensor
    cache: Any
    hidden: Tensor
    alive: Tensor
    index: Tensor
    valid: Tensor
    group: int = 0
    key_mask: Tensor | None = None
    slots: int = 0
    masks: dict[str, Any] = field(default_factory=dict)
    chosen: Tensor | None = None
    numbers: Tensor | None = None
    layer_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: Tensor | None = None
    unmerged: Any = None
    steered: Any = None
    slots_of_rows: tuple[Tensor, list[Tensor]] | None = None
    renumbers: bool = field(default=False, kw_only=True)
    owner: CacheOwner = field(kw_only=True)

    @property
    def dense(self) -> bool:
        """No padding in the current layout, as far as the host knows."""
        return len(set(self.counts)) == 1 and self.counts[0] == self.index.shape[1]

    def cached_rows(self, start: int) -> tuple[Tensor, Tensor]:
        """Of the layer group that `start` belongs to, what earlier forwards left in its slots: logical positions [B, S]
        (-1: padding), and which of them are real and not masked by the user."""
        old = self.cache.logical(self.cache.group(start), self.past)
        return old, self.unmasked(old)

    def unmasked(self, old: Tensor) -> Tensor:
        """[B, S] which of these past logical positions (-1: padding) are real and not masked by the user."""
        return unmasked(old, self.mask, self.past)

    def real_slots(self) -> list[Tensor]:
        """Per row, which slots [n] of the current layout are no padding. Asks the device once per layout."""
        if self.slots_of_rows is None or self.slots_of_rows[0] is not self.valid:
            self.slots_of_rows = self.valid, [row.nonzero()[:, 0] for row in self.valid.cpu()]
        return self.slots_of_rows[1]

    def shift(self, start: int) -> Tensor:
        """[B] how far the group's positions lag behind the logical ones once this forward is cached (compact
        positions)."""
        now = (self.new & ~self.alive).sum(1)
        before = self.cache.groups[self.cache.group(start)].shift if isinstance(self.cache, PrunedCache) else None
        return now if before is None else now + before

    def enter(self, start: int) -> Tensor | None:
        """Opens the layer group from `start` on and returns its 2D mask over physical slots, past and new; None when
        all are real."""
        cache, mask, before, old = self.cache, self.valid, None, None
        if cache is not None:
            adopt(cache, len(mask), mask.device, self.owner)
            before = cache.groups[cache.group(start)]
            if self.past:
                widen(cache, start, self.index.shape[1] - min(self.counts))
                old, real = self.cached_rows(start)
                mask = torch.cat([real, mask.to(real.device)], 1)
        self._note_slots(start, before, old)
        self.slots = mask.shape[1]
        # The device is asked only when nothing but the user's mask can tell.
        dense = self.dense and (before is None or before.dense)
        self.key_mask = None if dense and (self._knows_padding() or bool(mask.all())) else mask.long()
        return self.key_mask

    def _note_slots(self, start: int, before: SlotMap | None, old: Tensor | None) -> None:
        """Notes what a group's slots hold once this forward is over; before: their map so far, old: their logical
        positions."""

    def _knows_padding(self) -> bool:
        """Whether `counts` leave out all that the mask hides."""
        return self.mask is None

    def slot_blocks(self) -> Tensor | None:
        """[B, slots] `blocks` in the current layout; -1 at padding and in slots of earlier turns."""
        if self.blocks is None:
            return None
        now = take(self.blocks, self.index, 1).to(self.valid.device).masked_fill(~self.valid, -1)
        return torch.nn.functional.pad(now, (self.slots - now.shape[1], 0), value=-1)

    def compact(self, start: int) -> Tensor:
        """[..., B, P] renumbered positions of the current layout."""
        dropped = self.new & ~self.alive
        before = self.shift(start)[:, None] - dropped.sum(1, keepdim=True) + dropped.cumsum(1)
        return take(self.positions, self.index, -1) - before.gather(1, self.index).to(self.positions.device)


@dataclass
class StaticStep:
    """A decode step on a static cache whose layer groups differ: fixed shapes, nothing read back from the device."""

    cache: Any
    hidden: Tensor
    masks: dict[tuple[int, str], Any] = field(default_factory=dict)
