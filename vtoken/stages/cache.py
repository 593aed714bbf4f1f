"""The vocabulary of site cache. Letters as in `tokens`; query head h reads key head h // (H / Hk).

When the prefill ends, a stage decides row by row what a decoder layer keeps of the prompt, so that a row gets the same
decision alone and in a batch. All KV heads keep the same number of tokens, but not necessarily the same tokens; with
HeadClasses, the heads of a class do. Keys carry RoPE: kept tokens keep their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.kernels import gather_cache
from vtoken.stages.attention import Rope
from vtoken.stages.base import Compressor
from vtoken.stages.facts import Site
from vtoken.stages.layer_size import LayerSize
from vtoken.stages.quantized import QuantizedKV
from vtoken.stages.query_attention import Once, QueryAttention
from vtoken.stages.tokens import Parts


@dataclass(frozen=True)
class CachedLayer:
    """One decoder layer of one row: the N tokens of this forward, without padding and without what follows the prompt
    (drafts, an answer). For stages that are `by_head`, several rows of equal shape at once, with their heads
    concatenated.

    Attributes:
        keys, values: [Hk, N, d]; queries: [H, N, d].
        images: per image, the slots [N_i] of its visual tokens, ascending; all other slots hold text or newline tokens.
        slots: the same on the host.
        scale: factor on q . k before the softmax.
        layer, depth: index of the layer, and the number of layers; attending: layers with attention, () if all have it.
        native, rope, places: set for stages that ask for it.
        query_attention: as a stage of site attention left it; use it through `query_attention.shared`.
        classes: for stages that decide with HeadClasses, the key heads [Hc] of every class of the earlier turns; None
            in the first turn.
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
    classes: tuple[Tensor, ...] | None = None
    rope: Rope | None = None
    places: Places | None = None
    attending: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, int]:
        """How many layers with attention come before this one, and how many there are."""
        attending = self.attending or tuple(range(self.depth))
        return attending.index(self.layer), len(attending)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Visual tokens of each image."""
        return tuple(map(len, self.slots))

    @property
    def behind(self) -> int:
        """Number of tokens after the last visual one."""
        return self.keys.shape[1] - 1 - max(slots[-1] for slots in self.slots if slots)


@dataclass(frozen=True)
class Native:
    """An attention module, its input hidden states [1, N, D], cos and sin [1, N, d], and the model's RoPE module (None
    if it has several axes)."""

    module: Any
    hidden: Tensor
    rope: tuple[Tensor, Tensor]
    rotary: Any


@dataclass(frozen=True)
class Places(Once):
    """Where the tokens of a row stand in their pictures. What `once` computes may depend on this, but not on keys,
    values and queries: it is shared by all layers with these tokens.

    Attributes:
        image, raster_index: [N] and parts: as in PrefillQK.
        known: results of `once`.
    """

    image: Tensor
    raster_index: Tensor
    parts: tuple[Parts, ...] = ()
    known: dict[Hashable, Any] = field(default_factory=dict)


def norm_of(attention: Any, letter: str) -> Any:
    """The norm of an attention module's queries or keys ("q", "k"), head by head; None where there is none."""
    return getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_layernorm", None)


@dataclass(frozen=True)
class KeepSlots:
    """A decision: which slots stay.

    Attributes:
        index: [Hk, C] slots that stay, ascending.
        counts: visual tokens that stay of each image; None if text is dropped too, or if heads differ in their counts.
        into: [Hk, N] which of the C kept tokens absorbs each token, -1 for none; None if nothing is merged.
        weight: [Hk, N] weight of each token in the sum that replaces the token it goes into; given with `into`.
        rope: the layer's RoPE, if keys are to be summed without it; the sum is then rotated to the position of the kept
            token. Kept tokens that absorb no other token stay bit-exact.
    """

    index: Tensor
    counts: tuple[int, ...] | None = None
    into: Tensor | None = None
    weight: Tensor | None = None
    rope: Rope | None = None

    def apply(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both [Hk, N, d] -> [Hk, C, d]."""
        if self.into is None or self.weight is None:
            keys, values = gather_cache((keys[None], values[None]), self.index[None])
            return keys[0], values[0]
        summed = [self._merged(x, self.into, self.weight) for x in (keys, values)]
        if self.rope is not None:
            bare = self._merged(self.rope.undo(keys), self.into, self.weight)
            ones = torch.ones_like(self.into).masked_fill(self.into < 0, 0)
            members = torch.zeros_like(self.index).scatter_add(1, self.into.clamp(min=0), ones)
            turned = self.rope.turn_to(bare, self.index).to(keys.dtype)
            summed[0] = torch.where(members[..., None] > 1, turned, summed[0])
        return summed[0], summed[1]

    def _merged(self, x: Tensor, into: Tensor, weight: Tensor) -> Tensor:
        parts = x.float() * weight.masked_fill(into < 0, 0)[..., None]
        out = parts.new_zeros(len(x), self.index.shape[1], x.shape[2])
        slot = into.clamp(min=0)[..., None].expand_as(parts)
        return out.scatter_add(1, slot, parts).to(x.dtype)


@dataclass(frozen=True)
class ReplacedKV:
    """A decision: keys and values [Hk, C, d] that are cached in place of the layer's own. They need not belong to any
    token."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class HeadSlots:
    """The cache of a class of key heads: some tokens of the prompt, and all tokens that follow, or the latest of them.

    Attributes:
        heads: [Hc] the key heads; the same number in every row of a layer.
        stay: [Hc or 1, F] slots that stay for good, ascending.
        latest: [Hc or 1, R] other slots, ascending; at most `window` of them. As more tokens come, they leave, oldest
            first.
        window: how many of `latest` and of the tokens that follow a token sees, itself included; None: all.
        compensated: whether one more key and value stand for all tokens that have left: their means, with the logarithm
            of their number added to the logit.
    """

    heads: Tensor
    stay: Tensor
    latest: Tensor
    window: int | None = None
    compensated: bool = False


@dataclass(frozen=True)
class HeadClasses:
    """A decision: key heads in classes that keep different numbers of tokens. Every key head is in one class. The
    number of classes, their numbers of heads and their windows are the same in all rows of a layer, and in all turns of
    a conversation."""

    classes: tuple[HeadSlots, ...]


Decision = KeepSlots | ReplacedKV | QuantizedKV | HeadClasses


@dataclass(frozen=True)
class GeneratedBlock:
    """One decoder layer of one row during generation.

    Attributes:
        keys: [Hk, N, d] of all cached tokens that the query sees, its own key last.
        at: the tokens to decide about; values: [Hk, len(at), d] of these.
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
    """Shrinks the KV cache when the prefill ends. A pipeline has at most one.

    In all methods, `prompt` is the number of tokens in a row's prompt, and `lengths` the visual tokens of each image
    among them.
    """

    site: ClassVar[Site] = "cache"
    # Whether the stage needs CachedLayer.native, .rope, .places.
    native: ClassVar[bool] = False
    rope: ClassVar[bool] = False
    places: ClassVar[bool] = False
    # Whether it decides each KV head independently, with KeepSlots; rows of equal shape are then passed as further
    # heads.
    by_head: ClassVar[bool] = False
    in_classes: ClassVar[bool] = False  # whether it decides with HeadClasses

    def compress(self, layer: CachedLayer) -> Decision:
        """The decision for one layer of one row that holds at least one visual token."""
        raise NotImplementedError(f"stage {self.name} defines no compress()")

    def query_window(self, prompt: int, lengths: Sequence[int], behind: int) -> int:
        """For how many last queries the stage will ask QueryAttention.received (0: none). `behind` is the number of
        tokens after the last visual one. This only saves work: a stage of site attention can compute them along with
        its own."""
        return 0

    def requantize_every(self) -> int | None:
        """After how many generated tokens `requantize` is called, each time anew, in quantized rows; None: never."""
        return None

    def requantize(self, layer: GeneratedBlock) -> QuantizedKV:
        """The quantized form of the tokens `layer.at`."""
        raise NotImplementedError(f"stage {self.name} defines no requantize()")

    def compressor(self, model: Any) -> Callable[[CachedLayer], Decision]:
        """The function that decides on this model, for methods that need setup; called once, by `wrap`.

        Raises:
            ImportError, ValueError: the method cannot run on this model.
        """
        return self.compress

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """Tokens that every head keeps, for the FLOPs account."""
        return prompt

    def slots_of(self, prompt: int, lengths: Sequence[int], parts: Sequence[Parts]) -> int:
        """As `slots`, for stages that keep a number that depends on the rasters of each image."""
        return self.slots(prompt, lengths)

    def cache_slots(self, at: LayerSize) -> float:
        """Tokens that a head of the layer has in its cache, the mean over its heads, for the account of bytes and of
        decoding: `slots_of` the prompt, and all generated tokens. Override it if layers or heads differ, or if
        generated tokens leave the cache."""
        return self.slots_of(at.prompt, at.images, at.parts) + at.generated

    def packed_bytes(
        self, prompt: int, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype_bytes: int
    ) -> int | None:
        """Bytes of one layer's keys and values if they are quantized; None if `slots` tokens stay at full width."""
        return None

    def cache_bytes(self, at: LayerSize) -> int:
        """Bytes of a layer's keys and values, for the account: `packed_bytes` of the prompt and generated tokens at
        full width; if nothing is quantized, `cache_slots` at full width. Exact where `counts_are_exact`."""
        packed = self.packed_bytes(at.prompt, at.images, at.kv_heads, at.head_dim, at.number_bytes)
        if packed is not None:
            return packed + at.full(at.generated)
        return at.full(self.cache_slots(at))

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int | None:
        """FLOPs of the decision in one layer; None if not known."""
        return 0
