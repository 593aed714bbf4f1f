"""Visual tokens and what a stage decides about them: VisualTokens, Keep.

Letters in every docstring: `B` batch rows, `N` visual tokens (`N_i` of image i), `K` kept tokens, `T` text tokens, `L`
sequence length, `H` heads, `D` width, `d` head width. `Σ` is the sum over images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtoken.kernels import gather_tokens, merge_tokens
from vtoken.kernels.merge_tokens import totals
from vtoken.stages.facts import Fact

Grid = tuple[int, int, int]
Parts = tuple[Grid, ...]


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one prefill, packed over images of any length.

    At site frames an entry is not a token but a frame of a video (Qwen: a pair of frames), before encoding: `x` holds
    the normalised pixels of its thumbnail, float32 [ΣF, channels * height * width], and `parts` is ((frames, 1, 1),); a
    picture has one frame.

    At site pixels, before encoding, `x` holds the normalised pixels of each token as the tower is given them, channel
    by channel: [ΣN, channels * pixels of all its patches and frames].

    Attributes:
        x: [ΣN, D] embeddings (hidden states at encoder and decoder sites).
        offsets: [images + 1] int32 on the device of `x`: image i owns entries offsets[i]:offsets[i+1].
        lengths: N_i on the host, so that no stage has to fetch a size from the device.
        parts: rasters of each image before anything was dropped, as (frames, rows, columns), in token order. A plain
            image or a video has one raster; an anyres image has two, the downscaled whole picture and the stitched
            crops without their padding; where crops are not stitched each has its own, and the whole is the last.
            Newline tokens belong to no raster: they follow the pipeline's newline policy and no method sees them.
        row: batch row of each image.
        raster_index: [ΣN] position of each token among its image's unpruned tokens (rasters one after the other).
        segment: [ΣN] frame of a video, or crop of an image (of an anyres one 0 is the downscaled whole), that each
            token belongs to; None if every image is a single segment.
        facts: what the stage declared in `needs`.
        layer: layer index at encoder and decoder sites, else None.
        memory: scratch space of this stage for this prefill (stages themselves hold no state).
        size: [ΣN] float32, number of unpruned tokens that each one stands for; None while nothing was merged.
        lead: tokens before every image that no stage may touch: 1 at encoder sites with CLS.
    """

    x: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    parts: tuple[Parts, ...]
    row: tuple[int, ...]
    raster_index: Tensor
    segment: Tensor | None = None
    facts: Mapping[Fact, Any] = field(default_factory=dict)
    layer: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    size: Tensor | None = None
    lead: int = 0

    @classmethod
    def pack(
        cls,
        x: Tensor,
        lengths: Sequence[int],
        parts: Sequence[Parts],
        row: Sequence[int],
        raster_index: Tensor,
        **more: Any,
    ) -> VisualTokens:
        """Builds the packed form from host-side lengths."""
        return cls(x, offsets_of(lengths, x.device), tuple(lengths), tuple(parts), tuple(row), raster_index, **more)

    def whole(self, image: int) -> bool:
        """Whether nothing has been dropped from the image so far."""
        return self.lengths[image] == size_of(self.parts[image])

    def fact(self, name: str, layer: int | None = None, above: float = 0.0) -> Any:
        """A fact by name, as declared in `needs`."""
        return self.facts[Fact(name, layer, above)]


def size_of(parts: Parts) -> int:
    """Tokens of an image with these rasters."""
    return sum(t * h * w for t, h, w in parts)


def uploaded(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The values as a tensor on the device. Unlike with `torch.tensor(values, device=device)`, the host does not wait
    for the device."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def positions(mask: Tensor, count: int) -> Tensor:
    """[count] where the mask [N] is True, ascending: as nonzero(), for a host that knows how often it is, and need not
    ask the device."""
    return mask.byte().argsort(descending=True, stable=True)[:count]


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Packed offsets [len + 1], int32, of segments with these lengths."""
    return uploaded([0, *accumulate(lengths)], device, torch.int32)


def image_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[ΣN] image of each packed token."""
    if len(lengths) == 1:
        return torch.zeros(lengths[0], dtype=torch.int64, device=device)
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device, non_blocking=True)


def place_in_image(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[ΣN] index of each packed token within its image."""
    if len(lengths) == 1:
        return torch.arange(lengths[0], device=device)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(sum(lengths)) - np.repeat(starts, lengths)
    return torch.from_numpy(places).to(device, non_blocking=True)


def segments_of(parts: Parts, per: str) -> int:
    """How many frames a video, or crops an anyres image has, the downscaled whole included. Crops are estimated from
    the size without padding, so a long picture that is forced into 2 x 2 crops has more of them than this says."""
    if len(parts) == 1:
        return parts[0][0] if per == "per_frame" else 1
    if per == "per_crop" and len(parts) > 2:  # crops that are not stitched
        return len(parts)
    (_, side, _), *others = parts
    return 1 + sum(-(-h // side) * -(-w // side) for _, h, w in others) if per == "per_crop" else 1


@dataclass(frozen=True)
class Fused:
    """Slots that become the mean of their members times a factor, instead of the plain mean of their embeddings.

    Attributes:
        slots: [M] int64 kept slots (0..ΣK-1).
        factor: [M] float32 that multiplies the mean.
        features: [ΣN, D_encoder] the fact `features`. If given, at site tokens, the embedding is the projection of
            their mean. If None, or in models that make one visual token from the features of several patches (Qwen), it
            is the mean of embeddings.
        largest: the factor multiplies the elementwise maximum instead of the mean; only without `features`.
        values: [M, D] the embeddings themselves, if the stage computes new ones (site tokens).
    """

    slots: Tensor
    factor: Tensor
    features: Tensor | None = None
    largest: bool = False
    values: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """The decision of a stage, as plain data.

    Attributes:
        index: [ΣK] int64 entries of the packed axis that stay, ascending (reading order).
        lengths: tokens kept per image, on the host.
        into: [ΣN] kept slot (0..ΣK-1) that absorbs each token, -1 = dropped; None if all other tokens are dropped. A
            kept token absorbs itself.
        complete: no token is dropped, so `into` contains no -1; saves a search for it.
        weight: [ΣN] weight of each token in its slot's mean; None means equal weights.
        fused: slots that are not plain means; only with `into`.
    """

    index: Tensor
    lengths: tuple[int, ...]
    into: Tensor | None = None
    weight: Tensor | None = None
    fused: Fused | None = None
    complete: bool = False

    @cached_property
    def total(self) -> Tensor | None:
        """[ΣK] float32, sum of the weights of each slot's members, if no token is dropped; else None."""
        return totals(self.into, len(self.index), self.weight) if self.into is not None and self.complete else None

    def to(self, device: torch.device) -> Keep:
        """The same decision on another device."""
        into, weight = (None if t is None else t.to(device) for t in (self.into, self.weight))
        f = self.fused
        if f is not None:
            features, values = (None if t is None else t.to(device) for t in (f.features, f.values))
            f = replace(f, slots=f.slots.to(device), factor=f.factor.to(device), features=features, values=values)
        return Keep(self.index.to(device), self.lengths, into, weight, f, self.complete)

    def skipping(self, lengths: Sequence[int], skipped: Sequence[bool]) -> Keep:
        """The same decision, except that skipped images (of N_i = `lengths` tokens) keep all their tokens unchanged."""
        own = uploaded(skipped, self.index.device, torch.bool)[image_of(lengths, self.index.device)]
        return self.retaining(own, [n if s else k for n, k, s in zip(lengths, self.lengths, skipped, strict=True)])

    def retaining(self, own: Tensor, lengths: Sequence[int]) -> Keep:
        """The same decision, except that the tokens `own` [ΣN] bool stay unchanged. `lengths` are the numbers of tokens
        that each image then keeps."""
        alive = own.clone()
        alive[self.index] = True
        slot = alive.cumsum(0) - 1
        into, weight, fused = self.into, self.weight, self.fused
        if into is not None:
            into = torch.where(own, slot, torch.where(into >= 0, slot[self.index[into.clamp(min=0)]], -1))
            weight = None if weight is None else torch.where(own, 1, weight)
        if fused is not None:
            tokens = self.index[fused.slots]
            stay = ~own[tokens]
            values = None if fused.values is None else fused.values[stay]
            fused = replace(fused, slots=slot[tokens[stay]], factor=fused.factor[stay], values=values)
        # As nonzero(), but without fetching its size from the device.
        index = torch.argsort(~alive, stable=True)[: sum(lengths)]
        return Keep(index, tuple(lengths), into, weight, fused, self.complete)

    def apply(self, x: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Applies the decision to any tensor with a packed token axis: [ΣN, ...] -> [ΣK, ...].

        Args:
            project: turns features [M, D_encoder] into embeddings [M, D]; given if x holds embeddings and the family
                supports it.
        """
        if self.into is None:
            return gather_tokens(x, self.index)
        mean = merge_tokens(x, self.into, len(self.index), self.weight, self.total)
        if self.fused is None:
            return mean
        if self.fused.largest:
            mean = _largest(x, self.into, len(self.index))
        slots, features = self.fused.slots, None if project is None else self.fused.features
        of = mean
        if features is not None:
            of = merge_tokens(features, self.into, len(self.index), self.weight, self.total)
        each = of[slots]
        each = each * self.fused.factor.to(each.dtype).view(-1, *[1] * (each.ndim - 1))
        if project is not None and features is not None:
            each = project(each)
        return mean.index_copy(0, slots, each.to(mean.dtype))

    def embed(self, x: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """As `apply`, for embeddings [ΣN, D] or wider, with the new embeddings of `Fused.values` in their slots."""
        out = self.apply(x, project)
        if self.fused is None or self.fused.values is None:
            return out
        out[self.fused.slots, : self.fused.values.shape[1]] = self.fused.values.to(out.dtype)
        return out


def _largest(x: Tensor, into: Tensor, slots: int) -> Tensor:
    """[slots, ...] elementwise maximum over the entries of x [ΣN, ...] that go `into` each slot (-1: into none)."""
    room = x.new_full((slots + 1, *x.shape[1:]), -torch.inf)
    slot = torch.where(into < 0, slots, into).view(-1, *[1] * (x.ndim - 1)).expand_as(x)
    return room.scatter_reduce_(0, slot, x, "amax")[:slots]
