"""Attention of merged tokens at all places of their members: the tensors, and what a KV cache of merged keys stands
for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.decoder.attention_tap import AttentionCall
from vtoken.hooks.decoder.rotation import rotation_of

Rope = tuple[Tensor, Tensor]  # cos and sin, [B, U, d] (or less than d, where RoPE is partial)


@dataclass(frozen=True)
class UnmergeTable:
    """The places that the slots of a cache of merged keys without RoPE stand for, in reading order.

    Attributes:
        logical: [B, E] logical position of each place, -1 for padding.
        slot: [B, E] physical slot of the cache that stands there.
        rope: cos and sin [B, E, d] of each place.
        end: logical length when it was written; every logical token after the pruned prompt has one place.
        dense: no padding in any row.
    """

    logical: Tensor
    slot: Tensor
    rope: Rope
    end: int
    dense: bool

    @classmethod
    def rotated(cls, logical: Tensor, dense: bool, like: Rope) -> UnmergeTable:
        """Of slots [B, S] that stock code filled: their keys have been rotated already."""
        slot = torch.arange(logical.shape[1], device=logical.device).expand_as(logical)
        cos, sin = (x.new_ones(x.shape[0], logical.shape[1], x.shape[2]) for x in like)
        return cls(logical, slot, (cos, torch.zeros_like(sin)), 0, dense)

    def rows(self, index: Tensor) -> UnmergeTable:
        """After the batch rows of the cache were picked or reordered."""
        return self._map(lambda x: x[index.to(x.device)], self.end)

    def cut(self, end: int) -> UnmergeTable:
        """Without what was written after this logical length."""
        kept = self.logical.shape[1] - max(0, self.end - end)
        return self._map(lambda x: x[:, :kept], min(self.end, end))

    def _map(self, function: Callable[[Tensor], Tensor], end: int) -> UnmergeTable:
        cos, sin = map(function, self.rope)
        return UnmergeTable(function(self.logical), function(self.slot), (cos, sin), end, self.dense)

    def extend(self, logical: Tensor, slot: Tensor, rope: Rope, end: int, dense: bool) -> UnmergeTable:
        """With new places [B, U] after it."""
        device = self.logical.device
        cos, sin = (torch.cat([old, new.to(old.device)], 1) for old, new in zip(self.rope, rope, strict=True))
        return UnmergeTable(
            torch.cat([self.logical, logical.to(device)], 1),
            torch.cat([self.slot, slot.to(device)], 1),
            (cos, sin),
            end,
            self.dense and dense,
        )


@dataclass(frozen=True)
class UnmergedAttention:
    """How the attention of one forward sees its tokens; the same for all layers.

    Attributes:
        mask: the backend's mask over places.
        slots: P, hidden states per row.
        rope: cos and sin [B, U, d] of the places of this forward.
        source: [B, U] hidden state that stands at each place, P at padding; None: every hidden state stands at one
            place, its own.
        cached: of a cache of merged keys, slot [B, E] and rope of every place, those of this forward included; None
            where the keys are those of this forward only.
    """

    mask: Any
    slots: int
    rope: Rope
    source: Tensor | None
    cached: tuple[Tensor, Rope] | None = None

    def attention(
        self, rotate: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, write: Callable[..., Any] | None, attend: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q, k, v [B, H, P or S, d] without RoPE.

        Args:
            rotate: the model's `apply_rotary_pos_emb`.
            write: caches keys and values [B, H, U, d] with RoPE and returns all that are cached; None without such
                a cache.
            attend: attention of rotated queries, keys and values, [B, U, H, d].

        Returns:
            [B, P, H, d], means over the places of a token; and the backend's weights, which are those of the places.
        """
        if self.source is not None:
            q = spread(q, self.source.clamp(max=self.slots - 1))
        key_slot, key_rope = (self.source, self.rope) if self.cached is None else self.cached
        if key_slot is not None:
            k, v = (spread(x, key_slot.clamp(max=x.shape[2] - 1)) for x in (k, v))
        # One call rotates queries and keys by the same positions; these may differ.
        q, k = (rotate(x, x[:, :1], *(t.to(x.device) for t in r))[0] for x, r in ((q, self.rope), (k, key_rope)))
        if write is not None:
            k, v = write(k, v)
        out, weights = attend(q, k, v)
        return out if self.source is None else group_mean(out, self.source, self.slots), weights


def spread(x: Tensor, slot: Tensor) -> Tensor:
    """Copies x [B, H, P, d] to the places that slot [B, U] names: [B, H, U, d]."""
    index = slot.to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def group_mean(x: Tensor, absorbed_by: Tensor, slots: int) -> Tensor:
    """Means [B, slots, H, d] over the places x [B, U, H, d] of each slot, in float32; 0 for slots that stand nowhere.

    Args:
        absorbed_by: [B, U] slot of each place; `slots` itself is for places that count for none.
    """
    batch, device = len(x), x.device
    row = torch.arange(batch, device=device)[:, None] * (slots + 1)
    flat = (absorbed_by.to(device) + row).flatten()
    values = x.flatten(2).flatten(0, 1)
    wide = torch.promote_types(values.dtype, torch.float32)
    total = values.new_zeros(batch * (slots + 1), values.shape[1], dtype=wide).index_add(0, flat, values.to(wide))
    count = torch.bincount(flat, minlength=len(total)).clamp(min=1)
    mean = (total / count[:, None]).to(x.dtype).view(batch, slots + 1, -1)
    return mean[:, :slots].unflatten(2, x.shape[2:])


def attend(call: AttentionCall) -> Any:
    """The tap of a decoder attention that was handed an `UnmergedAttention` and the cache to write into; without these
    it is the model's own."""
    if call.handed is None:
        return call.original()
    unmerged, cache = call.handed
    write = None if cache is None else lambda k, v: cache.update(k, v, call.layer)
    rotate = rotation_of(call.module)
    return unmerged.attention(rotate, call.q, call.k, call.v, write, lambda q, k, v: call.attend(q, k, v, call.mask))
