"""The vocabulary of site `cache`: CachedLayer, Hold, Ready, Packed (quantized.py), CacheStage; Later for what is generated.

When the prefill ends, what a decoder layer keeps of the prompt is decided row by row, so that a batch decides as its rows do alone.
Every KV head holds the same number of tokens, but not necessarily the same ones. Keys carry RoPE already: what stays keeps its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from vtoken.kernels import gather_cache
from vtoken.stages.base import Compressor, Site
from vtoken.stages.budget import Budget
from vtoken.stages.quantized import QuantizedKV
from vtoken.stages.query_attention import QueryAttention


@dataclass(frozen=True)
class CachedLayer:
    """One decoder layer's keys and values of one row's prompt: of the N tokens of this forward, without padding and without what follows
    the prompt (drafts, an answer that is scored).

    Attributes:
        keys, values: [Hk, N, d].
        queries: [H, N, d]; query head h reads key head h // (H / Hk).
        images: per image, the slots [N_i] of its visual tokens, ascending. All other slots are text (newline tokens of images too).
        slots: the same on the host.
        scale: factor on q . k before the softmax.
        layer, depth: index of the layer, and how many there are.
        native: what a foreign method may want to see, if the stage says so: the attention module, its input and its RoPE.
        probe: what its queries attend to, as a stage of site attention left it; use it through `vtoken.stages.query_attention.shared`.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    images: tuple[Tensor, ...]
    slots: tuple[tuple[int, ...], ...]
    scale: float
    layer: int = 0
    depth: int = 1
    native: Native | None = None
    query_attention: QueryAttention | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Visual tokens of each image."""
        return tuple(map(len, self.slots))

    @property
    def behind(self) -> int:
        """Tokens behind the last visual one."""
        return self.keys.shape[1] - 1 - max(slots[-1] for slots in self.slots if slots)


@dataclass(frozen=True)
class Native:
    """The attention module of a layer, the hidden states [1, N, D] it is given, cos and sin [1, N, d], and the model's RoPE (None: it
    has several axes)."""

    module: Any
    hidden: Tensor
    rope: tuple[Tensor, Tensor]
    rotary: Any


@dataclass(frozen=True)
class KeepSlots:
    """The decision, plain data.

    Attributes:
        index: [Hk, C] slots that stay, ascending.
        counts: visual tokens that stay of each image, if they are as many in every head; None: text goes too, or it depends on the head.
        into: [Hk, N] which of the C absorbs each token, -1 for none; None where nothing is merged.
        weight: [Hk, N] factor of each token in the sum that takes the place of what absorbs it; given with `into`.
    """

    index: Tensor
    counts: tuple[int, ...] | None = None
    into: Tensor | None = None
    weight: Tensor | None = None

    def apply(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both [Hk, N, d] -> [Hk, C, d]."""
        if self.into is None or self.weight is None:
            keys, values = gather_cache((keys[None], values[None]), self.index[None])
            return keys[0], values[0]
        return self._merged(keys, self.into, self.weight), self._merged(values, self.into, self.weight)

    def _merged(self, x: Tensor, into: Tensor, weight: Tensor) -> Tensor:
        parts = x.float() * weight.masked_fill(into < 0, 0)[..., None]
        out = parts.new_zeros(len(x), self.index.shape[1], x.shape[2])
        slot = into.clamp(min=0)[..., None].expand_as(parts)
        return out.scatter_add(1, slot, parts).to(x.dtype)


@dataclass(frozen=True)
class ReplacedKV:
    """Keys and values [Hk, C, d] as they are to be cached, from a method that does not say which tokens they are of."""

    keys: Tensor
    values: Tensor


Decision = KeepSlots | ReplacedKV | QuantizedKV


@dataclass(frozen=True)
class GeneratedBlock:
    """One decoder layer of one row while it generates.

    Attributes:
        keys: [Hk, N, d] of all N tokens held that the query sees, itself the last.
        at: which of them the stage is asked about; values: [Hk, len(at), d] of these.
        query: [H, d] of the newest token; query head h reads key head h // (H / Hk).
        scale: factor on q . k before the softmax.
        layer: index of the layer.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    at: range
    scale: float
    layer: int = 0


class CacheStage(Compressor):
    """Shrinks the KV cache when the prefill ends. One per pipeline.

    Class attribute `native`: it wants CachedLayer.native.
    """

    site: ClassVar[Site] = "cache"
    native: ClassVar[bool] = False

    def compress(self, layer: CachedLayer) -> Decision:
        """The decision for one layer of one row that holds at least one visual token."""
        raise NotImplementedError(f"stage {self.name} defines no compress()")

    def query_window(self, prompt: int, lengths: Sequence[int], behind: int) -> int:
        """How many last queries' `Probe.received` it will ask for, of a prompt of so many tokens, visual ones as `lengths` says and
        `behind` of them behind the last visual one; 0: none. Only saves work: a probe that a stage of site attention makes leaves them."""
        return 0

    def requantize_every(self) -> int | None:
        """Tokens behind the prompt after which `requantize` is asked about them, again and again; None: never. Only rows that `compress` put
        into few bits are asked about."""
        return None

    def requantize(self, layer: GeneratedBlock) -> QuantizedKV:
        """What becomes of so many tokens behind the prompt, all of `layer.at`."""
        raise NotImplementedError(f"stage {self.name} defines no later()")

    def compressor(self, model: Any) -> Callable[[CachedLayer], Decision]:
        """What decides on this model, for methods that have to be set up; asked once, by `wrap`.

        Raises:
            ImportError, ValueError: it cannot run there.
        """
        return self.compress

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """Tokens that every head holds of a prompt of so many tokens, visual ones as `lengths` says: what the FLOPs account uses."""
        return prompt

    def packed_bytes(
        self, prompt: int, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype_bytes: int
    ) -> int | None:
        """Bytes of keys and values of the prompt in one layer of one row, if they are put into few bits; None: `slots` at full width."""
        return None

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int | None:
        """FLOPs of the decision in one layer of one row; None if not known."""
        return 0

    @field_validator("*")
    @classmethod
    def _whole_images(cls, value: Any) -> Any:
        if isinstance(value, Budget) and value.per is not None:
            raise ValueError(f"{value.per} cannot be had in the KV cache; take a count, a share or {{total: 640}}")
        return value


def best(scores: Tensor, k: int) -> Tensor:
    """[Hk, k] indices of the k highest of [Hk, M] scores, ascending; ties go to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(-1).values


def hold_text(layer: CachedLayer, scores: Tensor, counts: Sequence[int]) -> KeepSlots:
    """Keeps all text and, head by head, the visual tokens of each image that score highest.

    Args:
        scores: [Hk, N]; counts: tokens to keep of each image.
    """
    alive = torch.ones_like(scores, dtype=torch.bool)
    for slots, k in zip(layer.images, counts, strict=True):
        alive[:, slots] = False
        alive.scatter_(1, slots[best(scores[:, slots], k)], True)
    return KeepSlots(ascending(alive, scores.shape[1] - sum(layer.lengths) + sum(counts)), tuple(counts))


def ascending(alive: Tensor, count: int) -> Tensor:
    """[Hk, count] positions of the True ones, `count` in every row of alive [Hk, N]."""
    return alive.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]
