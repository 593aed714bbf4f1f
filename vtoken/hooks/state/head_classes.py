"""A cache layer whose key heads are in classes: all heads of a class hold equally many tokens, and other classes others.

It stands in for a DynamicLayer. Its length is that of a layer in which every head holds everything, so masks and
positions are made as if nothing had left; what heads really hold is in their class. Of a class the first tokens stay
for good; the others leave, oldest first, where it has a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.left_padding import left_pad
from vtoken.kernels import gather_cache


@dataclass(frozen=True)
class Lost:
    """What heads of a class have dropped: of `count` [B] tokens the mean key and value [B, Hc, d], in fp32."""

    count: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def nothing(cls, keys: Tensor, values: Tensor) -> Lost:
        """For heads that hold keys and values [B, Hc, n, d]."""
        none = keys.new_zeros(len(keys), dtype=torch.float32)
        return cls(none, *(t.new_zeros(*t.shape[:2], t.shape[3], dtype=torch.float32) for t in (keys, values)))

    def more(self, keys: Tensor, values: Tensor, gone: Tensor | None = None) -> Lost:
        """With tokens [B, Hc, n, d] that leave; gone: [B, n] which of them do, None: all."""
        if not keys.shape[2]:
            return self
        left = keys.new_ones(len(keys), keys.shape[2]) if gone is None else gone
        count, *means = self.averages(keys, values, left[:, None])
        return Lost(count[:, 0], *(mean[:, :, 0] for mean in means))

    def averages(self, keys: Tensor, values: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every query, counts [B, q], mean keys and values [B, Hc, q, d], if the tokens `gone` [B, q, n] of
        [B, Hc, n, d] had left too."""
        gone = gone.to(torch.float32)
        count = self.count[:, None] + gone.sum(2)
        before, share = (
            (self.count[:, None] / count.clamp(min=1))[:, None, :, None],
            count.clamp(min=1)[:, None, :, None],
        )
        means = [
            mean[:, :, None] * before + gone[:, None] @ x.float() / share
            for mean, x in ((self.keys, keys), (self.values, values))
        ]
        return count, means[0], means[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Lost:
        return Lost(function(self.count), function(self.keys), function(self.values))


@dataclass(frozen=True)
class HeadClass:
    """Key heads of a layer that hold equally many tokens.

    Attributes:
        heads: [B, Hc] which key heads of the layer they are, row by row.
        keys, values: [B, Hc, n, d] what they hold.
        fixed: the first of these tokens, which stay; the others leave, oldest first.
        window: the latest of those others that a query sees, itself among them; None: all.
        real: [B, n] which of them are no padding, None: all.
        lost: what has left, where the class accounts for it.
    """

    heads: Tensor
    keys: Tensor
    values: Tensor
    fixed: int
    window: int | None = None
    real: Tensor | None = None
    lost: Lost | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def own(self, x: Tensor) -> Tensor:
        """[B, Hc, ...] of x [B, Hk, ...]."""
        return x.take_along_dim(self.heads.view(*self.heads.shape, *[1] * (x.ndim - 2)), 1)

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None) -> HeadClass:
        """With new tokens of all heads of the layer, [B, Hk, n, d], behind those it holds.

        Args:
            real: [B, n] which of them are no padding, None: all.
        """
        both = None
        if real is not None or self.real is not None:
            both = torch.cat(
                [self.mask(), keys.new_ones(keys.shape[0], keys.shape[2]).bool() if real is None else real], 1
            )
        new = (torch.cat([t, self.own(x)], 2) for t, x in ((self.keys, keys), (self.values, values)))
        held, seen = new
        return replace(self, keys=held, values=seen, real=both)

    def mask(self) -> Tensor:
        """[B, n] bool: which tokens are no padding."""
        if self.real is not None:
            return self.real
        return torch.ones(len(self.keys), self.length, dtype=torch.bool, device=self.keys.device)

    def trimmed(self, most: int) -> HeadClass:
        """With the latest `most` of the tokens that may leave, in every row."""
        over = self.length - self.fixed - most
        if over <= 0:
            return self
        first, end = self.fixed, self.fixed + over
        if self.real is None:
            lost = self.lost and self.lost.more(self.keys[:, :, first:end], self.values[:, :, first:end])
            keys, values = (torch.cat([t[:, :, :first], t[:, :, end:]], 2) for t in (self.keys, self.values))
            return replace(self, keys=keys, values=values, lost=lost)
        real = self.real[:, first:]
        stays = real & (real.flip(1).cumsum(1).flip(1) <= most)
        lost = self.lost and self.lost.more(self.keys[:, :, first:], self.values[:, :, first:], real & ~stays)
        late = left_pad(stays, most)
        index = torch.cat([torch.arange(first, device=late.device).expand(len(late), -1), late + first], 1)
        keys, values = gather_cache((self.keys, self.values), index[:, None])
        kept = torch.cat([self.real[:, :first], stays.gather(1, late)], 1)
        return replace(self, keys=keys, values=values, real=kept, lost=lost)

    def without(self, count: int) -> HeadClass:
        """Without the newest tokens; what they are views of goes."""
        end = self.length - count
        real = None if self.real is None else self.real[:, :end]
        return replace(self, keys=self.keys[:, :, :end].clone(), values=self.values[:, :, :end].clone(), real=real)

    def seen(self, new: int, *, slides: bool = True) -> Tensor | None:
        """[B or 1, new, n] which tokens each of the newest `new` sees, None: all. Padding sees itself alone.

        Args:
            slides: as the window has it; else all that is held, and what is new up to itself.
        """
        if new == 1 and self.real is None:
            return None
        columns = torch.arange(self.length, device=self.keys.device)
        at = columns[-new:, None]
        seen = columns <= at
        if slides and self.window is not None:
            rank = columns[None] if self.real is None else self.real.cumsum(1)
            near = rank[:, -new:, None] - rank[:, None] < self.window
            seen = seen & (near | (columns < self.fixed))
        if self.real is not None:
            seen = seen & self.real[:, None] & self.real[:, -new:, None]
        return (seen | (columns == at)).expand(-1 if seen.ndim == 3 else 1, -1, -1)

    def unseen(self, new: int, *, slides: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Of what each of the newest `new` tokens does not see any more, counts [B, m], mean keys and values
        [B, Hc, m, d]; m is 1 where all have lost the same. For a class that accounts for it."""
        assert self.lost is not None
        if new == 1 or not slides or self.window is None:
            return self.lost.count[:, None], self.lost.keys[:, :, None], self.lost.values[:, :, None]
        columns, first = torch.arange(self.length, device=self.keys.device), self.fixed
        rank = columns[None] if self.real is None else self.real.cumsum(1)
        gone = rank[:, -new:, None] - rank[:, None, first:] >= self.window
        if self.real is not None:
            gone = gone & self.real[:, None, first:]
        gone = gone.expand(len(self.keys), -1, -1)
        return self.lost.averages(self.keys[:, :, first:], self.values[:, :, first:], gone)

    def map(self, function: Callable[[Tensor], Tensor]) -> HeadClass:
        """With the function applied to every tensor: to choose rows, or to move them to another device."""
        return replace(
            self,
            heads=function(self.heads),
            keys=function(self.keys),
            values=function(self.values),
            real=None if self.real is None else function(self.real),
            lost=self.lost and self.lost.map(function),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All keys and values, means included."""
        return self.keys, self.values, *(() if self.lost is None else (self.lost.keys, self.lost.values))


class ClassedLayer(DynamicLayer):
    """See above. Made of a live DynamicLayer by `adopt`.

    Attributes:
        classes: every key head of every row is in one of them.
        total: tokens that a head would hold which drops none, padding included.
        pending: new keys and values [B, Hk, n, d], from `update` to `take`.
        spare: how many of the newest tokens may be taken back: behind those the oldest that they see may have left.
    """

    classes: tuple[HeadClass, ...]
    total: int
    pending: tuple[Tensor, Tensor] | None
    spare: int

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedError(
            "heads of this layer hold different numbers of tokens, so it has no single tensor of keys or values; leave "
            "out the stage that puts heads in classes where something else reads the cache"
        )

    values = keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes note of new tokens and hands them back; the attention that follows reads the classes."""
        self.pending = key_states, value_states
        self.total += key_states.shape[2]
        return key_states, value_states

    def take(self, real: Tensor | None = None, *, slides: bool = True) -> int:
        """Lets the classes hold what `update` noted; returns how many new tokens that is.

        Args:
            real: [B, n] which of them are no padding, None: all.
            slides: what the first of them does not see leaves.
        """
        assert self.pending is not None
        (keys, values), self.pending = self.pending, None
        classes, new = list[HeadClass](), keys.shape[2]
        self.spare += new
        for each in self.classes:
            if slides and each.window is not None and each.length - each.fixed > each.window - 1:
                each, self.spare = each.trimmed(each.window - 1), new
            classes.append(each.append(keys, values, real))
        self.classes = tuple(classes)
        return new

    def get_seq_length(self) -> int:
        return self.total

    def crop(self, tokens_to_remove: int) -> None:
        """Without the newest -tokens_to_remove; what is positive is the length that stays, as older versions of
        transformers have it.

        Raises:
            RuntimeError: what the tokens before them see has left.
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        # They may be a mask.
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
        """All that is held."""
        return [t for each in self.classes for t in each.tensors()]


def adopt(cached: Any, classes: tuple[HeadClass, ...], total: int) -> ClassedLayer:
    """Lets a live DynamicLayer, or one that does so already, hold heads in these classes; nothing can be taken back
    from them."""
    if not isinstance(cached, ClassedLayer):
        for name in ("keys", "values"):
            vars(cached).pop(name)
        cached.__class__ = ClassedLayer
    cached.classes, cached.total, cached.pending, cached.spare = classes, total, None, 0
    classed: ClassedLayer = cached
    return classed
