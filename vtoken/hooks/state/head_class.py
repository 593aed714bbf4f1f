"""Key heads of a layer that hold equally many tokens: the first for good, others until a window has passed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtoken.hooks.state.left_padding import left_pad
from vtoken.kernels import gather_cache


@dataclass(frozen=True)
class Lost:
    """What heads of a class have dropped: `count` [B] tokens, their mean key and value [B, Hc, d], in fp32."""

    count: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def nothing(cls, keys: Tensor, values: Tensor) -> Lost:
        """Nothing yet, for heads that hold keys and values [B, Hc, n, d]."""
        none = keys.new_zeros(len(keys), dtype=torch.float32)
        return cls(none, *(t.new_zeros(*t.shape[:2], t.shape[3], dtype=torch.float32) for t in (keys, values)))

    def more(self, keys: Tensor, values: Tensor, gone: Tensor | None = None) -> Lost:
        """These and newly dropped tokens [B, Hc, n, d]; gone: [B, n] which of those are dropped, None: all."""
        if not keys.shape[2]:
            return self
        left = keys.new_ones(len(keys), keys.shape[2]) if gone is None else gone
        count, *means = self.averages(keys, values, left[:, None])
        return Lost(count[:, 0], *(mean[:, :, 0] for mean in means))

    def averages(self, keys: Tensor, values: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts [B, q], mean keys and values [B, Hc, q, d]: for every query, of these tokens and of those in
        [B, Hc, n, d] that are `gone` [B, q, n] for it."""
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
        heads: [B, Hc] index in the layer of each key head, row by row.
        keys, values: [B, Hc, n, d] what they hold.
        fixed: how many tokens at the front are never dropped; the others are, oldest first.
        window: how many of the others a query sees, the latest, itself among them; None: all.
        real: [B, n] which tokens are no padding, None: all.
        exempt: [B] rows in which nothing is dropped, None: none.
        lost: what was dropped, where the class accounts for it.
    """

    heads: Tensor
    keys: Tensor
    values: Tensor
    fixed: int
    window: int | None = None
    real: Tensor | None = None
    exempt: Tensor | None = None
    lost: Lost | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def own(self, x: Tensor) -> Tensor:
        """[B, Hc, ...]: the heads of this class out of x [B, Hk, ...]."""
        return x.take_along_dim(self.heads.view(*self.heads.shape, *[1] * (x.ndim - 2)), 1)

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None) -> HeadClass:
        """With new tokens at the end, given as [B, Hk, n, d] of all heads of the layer.

        Args:
            real: [B, n] which of them are no padding, None: all.
        """
        both = None
        if real is not None or self.real is not None:
            both = torch.cat(
                [self.mask(), keys.new_ones(keys.shape[0], keys.shape[2]).bool() if real is None else real], 1
            )
        new = (torch.cat([t, self.own(x)], 2) for t, x in ((self.keys, keys), (self.values, values)))
        keys, values = new
        return replace(self, keys=keys, values=values, real=both)

    def mask(self) -> Tensor:
        """[B, n] bool: which tokens are no padding."""
        if self.real is not None:
            return self.real
        return torch.ones(len(self.keys), self.length, dtype=torch.bool, device=self.keys.device)

    def trimmed(self, most: int) -> HeadClass:
        """With no more than the latest `most` of the tokens behind the fixed ones, in every row that is not exempt."""
        first = self.fixed
        over = self.length - first - most
        if over <= 0:
            return self
        if self.real is None and self.exempt is None:
            end = first + over
            lost = self.lost and self.lost.more(self.keys[:, :, first:end], self.values[:, :, first:end])
            keys, values = (torch.cat([t[:, :, :first], t[:, :, end:]], 2) for t in (self.keys, self.values))
            return replace(self, keys=keys, values=values, lost=lost)
        mask = self.mask()
        real = mask[:, first:]
        stays = real & (real.flip(1).cumsum(1).flip(1) <= most)
        if self.exempt is not None:
            stays = torch.where(self.exempt[:, None], real, stays)
        lost = self.lost and self.lost.more(self.keys[:, :, first:], self.values[:, :, first:], real & ~stays)
        if self.exempt is not None:
            # The exempt rows need all slots: what other rows drop becomes padding.
            return replace(self, real=torch.cat([mask[:, :first], stays], 1), lost=lost)
        late = left_pad(stays, most)
        index = torch.cat([torch.arange(first, device=late.device).expand(len(late), -1), late + first], 1)
        keys, values = gather_cache((self.keys, self.values), index[:, None])
        kept = torch.cat([mask[:, :first], stays.gather(1, late)], 1)
        return replace(self, keys=keys, values=values, real=kept, lost=lost)

    def without(self, count: int) -> HeadClass:
        """Without the newest `count` tokens, whose memory is freed."""
        end = self.length - count
        real = None if self.real is None else self.real[:, :end]
        return replace(self, keys=self.keys[:, :, :end].clone(), values=self.values[:, :, :end].clone(), real=real)

    def seen(self, new: int, free: Tensor | None = None) -> Tensor | None:
        """[B or 1, new, n] which tokens each of the newest `new` sees, None: all. Padding sees itself alone.

        Args:
            free: [B] rows whose new tokens see everything up to themselves; in other rows the window limits them.
        """
        if new == 1 and self.real is None and not self._hides(new):
            return None
        columns = torch.arange(self.length, device=self.keys.device)
        at = columns[-new:, None]
        seen = (columns <= at)[None]
        if self._hides(new):
            seen = seen & ~self._past(new, free)
        if self.real is not None:
            seen = seen & self.real[:, None] & self.real[:, -new:, None]
        return seen | (columns == at)

    def unseen(self, new: int, free: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Counts [B, m], mean keys and values [B, Hc, m, d] of the tokens that each of the newest `new` does not see
        any more; m is 1 where that is the same for all. For a class that accounts for what was dropped."""
        assert self.lost is not None
        if not self._hides(new):
            return self.lost.count[:, None], self.lost.keys[:, :, None], self.lost.values[:, :, None]
        gone = self._past(new, free)[:, :, self.fixed :]
        if self.real is not None:
            gone = gone & self.real[:, None, self.fixed :]
        gone = gone.expand(len(self.keys), -1, -1)
        return self.lost.averages(self.keys[:, :, self.fixed :], self.values[:, :, self.fixed :], gone)

    def _hides(self, new: int) -> bool:
        """Whether the window may hide cached tokens from some of the newest `new`."""
        return self.window is not None and (new > 1 or self.length - self.fixed > self.window)

    def _past(self, new: int, free: Tensor | None) -> Tensor:
        """[B or 1, new, n] which tokens have left the window of each of the newest `new`."""
        assert self.window is not None
        columns = torch.arange(self.length, device=self.keys.device)
        rank = columns[None] if self.real is None else self.real.cumsum(1)
        past = (rank[:, -new:, None] - rank[:, None] >= self.window) & (columns >= self.fixed)
        for rows in (free, self.exempt):
            past = past if rows is None else past & ~rows[:, None, None]
        return past

    def map(self, function: Callable[[Tensor], Tensor]) -> HeadClass:
        """With the function applied to every tensor: to choose rows, or to move them to another device."""
        return replace(
            self,
            heads=function(self.heads),
            keys=function(self.keys),
            values=function(self.values),
            real=None if self.real is None else function(self.real),
            exempt=None if self.exempt is None else function(self.exempt),
            lost=self.lost and self.lost.map(function),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All keys and values, means included."""
        return self.keys, self.values, *(() if self.lost is None else (self.lost.keys, self.lost.values))
