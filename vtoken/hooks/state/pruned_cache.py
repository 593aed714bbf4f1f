"""A KV cache that counts its length with dropped tokens, and where masks are made, without them.

`generate` counts the original prompt: it slices ids, grows masks and numbers positions by `get_seq_length()`. Mask
creation wants the slots that are really there. The live cache object therefore takes on a subclass of its own class;
its keys and values are untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vtoken.hooks.state.classed_layer import ClassedLayer
from vtoken.hooks.state.quantized_layer import QuantizedLayer

UNWRAPPED = (
    "this KV cache holds a pruned prompt and its model was unwrapped since; start a new conversation, or keep the "
    "model wrapped while the cache is in use"
)


class CacheOwner:
    """Who may continue a cache: dead after unwrap, shared by copies of the cache."""

    alive = True

    def __deepcopy__(self, memo: dict) -> CacheOwner:
        return self


@dataclass(frozen=True)
class SlotMap:
    """What the physical slots of one layer group hold.

    Attributes:
        logical: [B, P] logical position of each slot, -1 for padding.
        end: logical length when this was recorded; every later token has a slot.
        shift: [B] how far positions lag behind the logical numbering; None: not at all, as always unless positions are
            compact or pictures were resized.
        dense: no padding in any row.
        lags: whether `shift` may hold anything but zeros.
    """

    logical: Tensor
    end: int
    shift: Tensor | None
    dense: bool
    lags: bool = False

    def rows(self, index: Tensor) -> SlotMap:
        index = index.to(self.logical.device)
        shift = None if self.shift is None else self.shift[index]
        return replace(self, logical=self.logical[index], shift=shift)


@dataclass(frozen=True)
class Marks:
    """What stages that steer attention know of logical positions [B, n]; later positions are not marked.

    Attributes:
        visual: which hold visual tokens.
        by_layer: (name of a stage, layer) -> which the stage marked there.
    """

    visual: Tensor
    by_layer: dict[tuple[str, int], Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Marks:
        return Marks(function(self.visual), {key: function(x) for key, x in self.by_layer.items()})


class PrunedCache:
    """Mixed into the class of a live cache by `adopt`. A decode step reads few of these attributes and computes none.

    Attributes:
        groups: first layer of a group -> what its slots hold; the group ends before the next key.
        busy: a forward is at work on the cache, with its state in `Run.flow`.
        table: what merged tokens stand for, whose keys are cached without RoPE (hooks/attention/unmerge.py).
        valid: of static caches, group -> [B, slots] which slots its layers may see, those not filled yet among them.
        prompt_mask: [B, logical] the mask of the caller, of static caches; None where it hides nothing.
        shifted: positions of a group may lag; dense: no group has padding.
        first: the first layer that holds keys; layers before it keep a state.
        marks: of stages that steer attention; images: what a stage of site decode chooses from (hooks/decode).
    """

    groups: dict[int, SlotMap]
    busy: bool = False
    table: Any = None
    valid: dict[int, Tensor]
    prompt_mask: Tensor | None
    owner: CacheOwner
    shifted: bool
    dense: bool = True
    first: int = 0
    marks: Marks | None = None
    images: Any = None

    def group(self, layer: int) -> int:
        return max(start for start in self.groups if start <= layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        at = layer_idx or self.first
        slots = self.groups[self.group(at) if at else 0]
        saved: int = slots.end - slots.logical.shape[1]
        return super().get_seq_length(layer_idx) + saved  # type: ignore[misc]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        if not self.owner.alive:
            raise RuntimeError(UNWRAPPED)
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def logical(self, start: int, total: int) -> Tensor:
        """[B, P] logical positions in the group's slots when `total` logical tokens are cached."""
        slots = self.groups[start]
        if total <= slots.end:
            return slots.logical[:, : slots.logical.shape[1] - (slots.end - total)]
        tail = torch.arange(slots.end, total, device=slots.logical.device).expand(len(slots.logical), -1)
        return torch.cat([slots.logical, tail], 1)

    def record(self, start: int, slots: SlotMap) -> None:
        self.groups[start] = slots
        self.dense = all(each.dense for each in self.groups.values())
        self.shifted = self.shifted or slots.lags
        if self.is_compileable:  # type: ignore[attr-defined]
            # Compiled decoding needs a mask of fixed size; causality hides the slots that are not filled yet.
            total = slots.end if self.prompt_mask is None else max(slots.end, self.prompt_mask.shape[1])
            shown = unmasked(self.logical(start, total), self.prompt_mask, total)
            self.valid[start] = lengthened(shown, self.get_max_length())  # type: ignore[attr-defined]

    def masked(self, mask: Tensor) -> None:
        """Notes the caller's mask [B, logical], which steps on a static cache must obey too."""
        self.prompt_mask = mask
        for start, slots in self.groups.items():
            self.record(start, slots)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -tokens_to_remove tokens. Raises ValueError at a positive number (a length to crop to, in
        older versions of transformers), RuntimeError if it reaches into the pruned part of the prompt."""
        if tokens_to_remove > 0:
            raise ValueError("crop() of a pruned cache takes a negative count: how many of the newest tokens to remove")
        total = int(self.get_seq_length())
        left, groups = total + int(tokens_to_remove), {}
        for start, slots in self.groups.items():
            n = max(0, slots.end - left)
            # Drafts that were verified in the prefill forward sit at the tail of the record, one slot each.
            if n and not torch.equal(
                slots.logical[:, -n:].cpu(), torch.arange(left, slots.end).expand(len(slots.logical), -1)
            ):
                raise RuntimeError("crop() reaches into the pruned part of the prompt; those tokens are gone")
            kept = slots.logical[:, : slots.logical.shape[1] - n]
            groups[start] = replace(slots, logical=kept, end=slots.end - n)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        for start, slots in groups.items():
            self.record(start, slots)
        if self.marks is not None:
            self.marks = self.marks.map(lambda x: x[:, :left])
        if self.images is not None:
            self.images.cut(left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = len(next(iter(self.groups.values())).logical)
        self._rows(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        first = next(iter(self.groups.values()))
        self.shifted, self.prompt_mask, self.table, self.marks, self.images = False, None, None, None, None
        self.groups, self.valid = {}, {}
        self.record(
            0,
            replace(first, logical=first.logical[:, :0], end=0, shift=None, dense=True, lags=False),
        )

    def _rows(self, index: Tensor) -> None:
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask[index.to(self.prompt_mask.device)]
        for start, slots in self.groups.items():
            self.record(start, slots.rows(index))
        if self.table is not None:
            self.table = self.table.rows(index)
        if self.marks is not None:
            self.marks = self.marks.map(lambda x: x[index.to(x.device)])
        if self.images is not None:
            self.images.rows(index)


def lengthened(mask: Tensor, length: int) -> Tensor:
    """A mask [B, n] at least `length` long: what is added hides nothing."""
    return torch.nn.functional.pad(mask.bool(), (0, max(0, length - mask.shape[1])), value=True)


def unmasked(logical: Tensor, mask: Tensor | None, total: int) -> Tensor:
    """[B, S] which of these logical positions (-1: padding; all are below `total`) are real and not hidden by the
    caller's mask."""
    real = logical >= 0
    if mask is None or not logical.shape[1]:
        return real
    return real & lengthened(mask.to(real.device), total).gather(1, logical.clamp(min=0))


_CLASSES: dict[type, type] = {}


def adopt(cache: Any, batch: int, device: torch.device, owner: CacheOwner) -> PrunedCache:
    """Makes a live cache a PrunedCache (idempotent). What it already holds counts as unpruned.

    Raises:
        RuntimeError: the cache holds a prompt pruned by another wrap, or by one that was unwrapped since.
    """
    if isinstance(cache, PrunedCache):
        check_owner(cache, owner)
        return cache
    total, cls = int(cache.get_seq_length()), type(cache)
    if cls not in _CLASSES:
        _CLASSES[cls] = type("Pruned" + cls.__name__, (PrunedCache, cls), {})
    cache.__class__ = _CLASSES[cls]
    cache.groups, cache.valid, cache.prompt_mask, cache.shifted, cache.owner = {}, {}, None, False, owner
    cache.first = next((k for k, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)), 0)
    everything = torch.arange(total, device=device).expand(batch, -1)
    cache.record(0, SlotMap(everything, total, None, dense=True))
    return cache


def check_owner(cache: Any, owner: CacheOwner) -> None:
    """Raises RuntimeError if the cache holds a prompt that was pruned by another wrap."""
    if isinstance(cache, PrunedCache) and cache.owner is not owner:
        raise RuntimeError(
            "this KV cache was pruned by another wrapped model, or before this one was wrapped again; start a new "
            "conversation"
        )


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds now (allocated bytes for static caches), in whatever form."""
    tensors: list[Any] = []
    for layer in getattr(cache, "layers", ()):
        packed = isinstance(layer, QuantizedLayer | ClassedLayer)
        tensors += layer.tensors() if packed else [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
