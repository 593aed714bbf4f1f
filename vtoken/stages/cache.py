"""The vocabulary of site cache. Letters as in `tokens`; query head h reads key head h // (H / Hk).

When the prefill ends, what a decoder layer keeps of the prompt is decided row by row, so that a batch decides as its
rows do alone. Every KV head holds the same number of tokens, but not necessarily the same ones. Keys carry RoPE: what
stays keeps its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import field_validator
from torch import Tensor

from vtoken.kernels import gather_cache
from vtoken.stages.base import Compressor
from vtoken.stages.budget import Budget
from vtoken.stages.facts import Site
from vtoken.stages.quantized import QuantizedKV
from vtoken.stages.query_attention import QueryAttention


@dataclass(frozen=True)
class CachedLayer:
    """One decoder layer of one row: of the N tokens of this forward, without padding and what follows the prompt
    (drafts, an answer). Where the stage is `by_head`, of several rows that are alike: their heads one after the other.

    Attributes:
        keys, values: [Hk, N, d]; queries: [H, N, d].
        images: per image, the slots [N_i] of its visual tokens, ascending; all others are text, or newline tokens.
        slots: the same on the host.
        scale: factor on q . k before the softmax.
        layer, depth: index of the layer, and how many there are.
        native: for stages that say they want it.
        query_attention: as a stage of site attention left it; use it through `query_attention.shared`.
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
    """An attention module, the hidden states [1, N, D] it is given, cos and sin [1, N, d], and the model's RoPE (None:
    of several axes)."""

    module: Any
    hidden: Tensor
    rope: tuple[Tensor, Tensor]
    rotary: Any


@dataclass(frozen=True)
class KeepSlots:
    """The decision: which slots stay.

    Attributes:
        index: [Hk, C] slots that stay, ascending.
        counts: visual tokens that stay of each image; None: text goes too, or heads differ.
        into: [Hk, N] which of the C absorbs each token, -1 for none; None where nothing is merged.
        weight: [Hk, N] factor of each token in the sum that replaces what absorbs it; given with `into`.
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
    """The decision: keys and values [Hk, C, d] to be cached, whatever tokens they are of."""

    keys: Tensor
    values: Tensor


Decision = KeepSlots | ReplacedKV | QuantizedKV


@dataclass(frozen=True)
class GeneratedBlock:
    """One decoder layer of one row while it generates.

    Attributes:
        keys: [Hk, N, d] of all cached tokens that the query sees, itself the last.
        at: which of them the stage is asked about; values: [Hk, len(at), d] of these.
        query: [H, d] of the newest token.
        scale: factor on q . k before the softmax.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    at: range
    scale: float
    layer: int = 0


class CacheStage(Compressor):
    """Shrinks the KV cache when the prefill ends. One per pipeline.

    `prompt` and `lengths` are the tokens of a row's prompt and, of these, the visual ones of each image.
    """

    site: ClassVar[Site] = "cache"
    native: ClassVar[bool] = False  # whether it wants CachedLayer.native
    # Whether every KV head is decided by itself, with KeepSlots: rows that are alike then come as more heads of one.
    by_head: ClassVar[bool] = False

    def compress(self, layer: CachedLayer) -> Decision:
        """The decision for one layer of one row that holds at least one visual token."""
        raise NotImplementedError(f"stage {self.name} defines no compress()")

    def query_window(self, prompt: int, lengths: Sequence[int], behind: int) -> int:
        """Of how many last queries it will ask QueryAttention.received (0: none), with `behind` tokens behind the last
        visual one. Only saves work: a stage of site attention may leave them."""
        return 0

    def requantize_every(self) -> int | None:
        """After how many generated tokens `requantize` is asked about them, again and again, in quantized rows; None:
        never."""
        return None

    def requantize(self, layer: GeneratedBlock) -> QuantizedKV:
        """What becomes of the tokens `layer.at`."""
        raise NotImplementedError(f"stage {self.name} defines no requantize()")

    def compressor(self, model: Any) -> Callable[[CachedLayer], Decision]:
        """What decides on this model, where a method has to be set up; asked once, by `wrap`.

        Raises:
            ImportError, ValueError: it cannot run there.
        """
        return self.compress

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """Tokens that every head keeps: what the FLOPs account uses."""
        return prompt

    def packed_bytes(
        self, prompt: int, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype_bytes: int
    ) -> int | None:
        """Bytes of one layer's keys and values if they are quantized; None: `slots` at full width."""
        return None

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int | None:
        """FLOPs of the decision in one layer; None if not known."""
        return 0

    @field_validator("*")
    @classmethod
    def _whole_images(cls, value: Any) -> Any:
        if isinstance(value, Budget) and value.per is not None:
            raise ValueError(f"{value.per} cannot be had in the KV cache; take a count, a share or {{total: 640}}")
        return value
