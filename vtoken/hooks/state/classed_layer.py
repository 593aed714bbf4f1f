"""A cache layer whose key heads are in classes: all heads of a class hold equally many tokens.

It replaces a DynamicLayer. The length that it gives is that of a layer in which every head holds all tokens, so masks
and positions are made as if nothing had been dropped; the classes tell what their heads really hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.head_class import HeadClass


class ClassedLayer(DynamicLayer):
    """See above. `adopt` makes one of a live DynamicLayer.

    Attributes:
        classes: every key head of every row is in one of them.
        total: tokens that a head holds if it drops none, padding included.
        pending: new keys and values [B, Hk, n, d], from `update` to `take`.
        spare: how many of the newest tokens `crop` may remove; what older tokens see may have been dropped.
        record_past: as in transformers, a token that leaves a window stays cached until the next `crop`.
    """

    classes: tuple[HeadClass, ...]
    total: int
    pending: tuple[Tensor, Tensor] | None
    spare: int
    record_past: bool = False

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedError(
            "heads of this layer hold different numbers of tokens, so it has no single tensor of keys or values; leave "
            "out the stage that puts heads in classes where something else reads the cache"
        )

    values = keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores new tokens in `pending` and returns them; the attention that follows reads the classes."""
        self.pending = key_states, value_states
        self.total += key_states.shape[2]
        return key_states, value_states

    def take(self, real: Tensor | None = None, *, slides: bool = True) -> None:
        """Moves the pending tokens into the classes.

        Args:
            real: [B, n] which of them are no padding, None: all.
            slides: tokens that the first pending one does not see are dropped; False: one more stays.
        """
        assert self.pending is not None
        (keys, values), self.pending = self.pending, None
        classes, new = list[HeadClass](), keys.shape[2]
        self.spare += new
        for each in self.classes:
            # The first new token takes one place of its own window.
            most = each.length if each.window is None else each.window - slides
            if not self.record_past and each.length - each.fixed > most:
                each, self.spare = each.trimmed(most), new
            classes.append(each.append(keys, values, real))
        self.classes = tuple(classes)

    def get_seq_length(self) -> int:
        return self.total

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -tokens_to_remove tokens; a positive number is the length to crop to, as in older versions
        of transformers.

        Raises:
            RuntimeError: tokens that would stay see some that were dropped.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.total - tokens_to_remove)
        if count > self.spare:
            raise RuntimeError(
                f"crop() takes back {count} tokens, and heads of this cache have dropped what the tokens before the "
                f"latest {self.spare} see; start the conversation again"
            )
        if count:
            self.classes, self.total = tuple(each.without(count) for each in self.classes), self.total - count
            self.spare -= count
        if self.record_past:
            before = sum(each.length for each in self.classes)
            self.classes = tuple(e if e.window is None else e.trimmed(e.window - 1) for e in self.classes)
            self.spare = self.spare if before == sum(each.length for each in self.classes) else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        # `indices` may be a mask.
        self._select(torch.arange(len(self.classes[0].keys), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.classes[0].keys)).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        index = index.to(self.classes[0].keys.device)
        self.classes = tuple(each.map(lambda t: t.index_select(0, index)) for each in self.classes)

    def offload(self) -> None:
        self._to(torch.device("cpu"))

    def prefetch(self) -> None:
        self._to(self.device)

    def _to(self, device: torch.device) -> None:
        self.classes = tuple(each.map(lambda t: t.to(device, non_blocking=True)) for each in self.classes)

    def reset(self) -> None:
        """Back to an empty DynamicLayer."""
        vars(self).clear()
        self.__class__ = DynamicLayer  # type: ignore[assignment]
        DynamicLayer.__init__(self)

    def tensors(self) -> list[Tensor]:
        """All keys and values, means of dropped tokens included."""
        return [t for each in self.classes for t in each.tensors()]


def adopt(cached: Any, classes: tuple[HeadClass, ...], total: int) -> ClassedLayer:
    """Makes a live DynamicLayer (or ClassedLayer) a ClassedLayer of these classes; `crop` can remove nothing yet."""
    if not isinstance(cached, ClassedLayer):
        for name in ("keys", "values"):
            vars(cached).pop(name)
        cached.__class__ = ClassedLayer
    cached.classes, cached.total, cached.pending, cached.spare = classes, total, None, 0
    classed: ClassedLayer = cached
    return classed
