"""Where the visual tokens of a cache are, and what a stage of site decode keeps about them from token to token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.state.pruned_cache import PrunedCache
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages.decode import DecodeStage


@dataclass(frozen=True)
class GroupSlots:
    """The slots of one layer group when the last prompt with visual tokens was read. Later slots are always read.

    Attributes:
        start: first layer of the group; end: how many slots there are.
        visual: [B, V] slots that may be left out, 0 after a row's last; text: [B, T] all others that hold a token, -1
            after a row's last.
        lengths, texts: how many slots of either kind each row has; budgets: how many of its `lengths` it may read.
        asides: per row, why no slot may be left out; None: some may.
    """

    start: int
    end: int
    visual: Tensor
    text: Tensor
    lengths: tuple[int, ...]
    texts: tuple[int, ...]
    budgets: tuple[int, ...]
    asides: tuple[str | None, ...]

    @property
    def thins(self) -> bool:
        """Whether any row holds more than it may read."""
        return any(n > k for n, k in zip(self.lengths, self.budgets, strict=True))

    @property
    def alike(self) -> bool:
        """Whether every row holds the same numbers of tokens."""
        return len(set(zip(self.lengths, self.texts, self.budgets, self.asides, strict=True))) == 1

    def every(self, slots: int) -> list[int]:
        """Per row, how many tokens it reads if it reads all of this many slots."""
        tail = slots - self.end
        return [n + t + tail for n, t in zip(self.lengths, self.texts, strict=True)]

    def rows(self, index: Tensor, order: Sequence[int]) -> GroupSlots:
        """For batch rows `index` [B']. `order`: on the host, these rows or others with the same numbers of tokens."""
        names = ("lengths", "texts", "budgets", "asides")
        on_host: dict[str, Any] = {name: tuple(getattr(self, name)[r] for r in order) for name in names}
        return replace(self, visual=_picked(self.visual, index), text=_picked(self.text, index), **on_host)


@dataclass
class CachedImages:
    """What a cache (as `PrunedCache.images`) knows of its images.

    Attributes:
        image: [B, logical] image that a position shows, numbered over all turns; -1: text, or a row that is read whole.
        entry: of the trace, which counts what is read.
        groups: see GroupSlots; worked out when they are asked for.
        memory: layer -> what the stage keeps of it; shared: what is kept for the token in progress; before: last layer
            at which the stage acted on that token, -1 for none.
    """

    image: Tensor
    entry: StageTrace
    groups: dict[int, GroupSlots] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    before: int = -1

    def begin(self) -> None:
        """A token's first layer."""
        self.shared, self.before = {}, -1
        self.entry.slots_read.append([])

    def interrupt(self, layer: int) -> None:
        """Several tokens at once enter a layer: its last choice is void."""
        self.memory.get(layer, {}).pop("last", None)

    def count(self, read: Sequence[int]) -> None:
        """Adds how many tokens each row read in a layer."""
        now = self.entry.slots_read[-1]
        self.entry.slots_read[-1] = [a + b for a, b in zip(now, read, strict=True)] if now else list(read)

    def group(self, cache: PrunedCache, layer: int, stage: DecodeStage) -> GroupSlots:
        """The slots of a layer."""
        start = cache.group(layer)
        if start not in self.groups:
            self.groups[start] = self._read(cache, start, stage)
        return self.groups[start]

    def _read(self, cache: PrunedCache, start: int, stage: DecodeStage) -> GroupSlots:
        """The slots of the group from layer `start` on. Asks the device."""
        logical = cache.logical(start, self.image.shape[1])
        found = self.image.gather(1, logical.clamp(min=0)).masked_fill(logical < 0, -2).cpu()
        visual, text, budgets, asides = [], [], [], []
        for row in found:
            shown, tokens = row[row >= 0], int((row > -2).sum())
            images = torch.unique(shown, return_counts=True)[1].tolist()
            why = None if images else "the row has no image"
            if images and tokens < stage.min_len:
                why = f"the row has {tokens} tokens, fewer than min_len {stage.min_len}"
            may = (row >= 0) & (why is None)
            visual.append(may.nonzero()[:, 0])
            text.append(((row > -2) & ~may).nonzero()[:, 0])
            budgets.append(0 if why else stage.budget(images))
            asides.append(why)
        lengths, texts = (tuple(map(len, each)) for each in (visual, text))
        pad = torch.nn.utils.rnn.pad_sequence
        device = self.image.device
        return GroupSlots(
            start,
            logical.shape[1],
            pad(visual, batch_first=True).to(device, non_blocking=True),
            pad(text, batch_first=True, padding_value=-1).to(device, non_blocking=True),
            lengths,
            texts,
            tuple(budgets),
            tuple(asides),
        )

    def rows(self, index: Tensor) -> None:
        """After the rows of the cache were picked or reordered: by their numbers, or by a mask."""
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        self.image = _picked(self.image, index)
        for memory in self.memory.values():
            memory.update({name: _picked(x, index) for name, x in memory.items() if torch.is_tensor(x)})
        # The device is asked only where rows differ in what they hold.
        alike = all(g.alike for g in self.groups.values())
        order = [0] * len(index) if alike else index.tolist()
        self.groups = {start: g.rows(index, order) for start, g in self.groups.items()}

    def cut(self, logical: int) -> None:
        """After the cache was cut to so many tokens."""
        if logical < self.image.shape[1]:
            lost = bool((self.image[:, logical:] >= 0).any())
            self.image, self.groups = self.image[:, :logical], {}
            self.memory = {} if lost else self.memory


def _picked(x: Tensor, index: Tensor) -> Tensor:
    return x[index.to(x.device)]
