"""The vocabulary between models and methods: VisualTokens, Fact, Keep, Stage.

Letters in every docstring: `B` batch rows, `N` visual tokens (`N_i` of image i), `K` kept, `T` text tokens, `L` sequence, `H` heads,
`D` width, `d` head width. A method imports this file and never sees a model; an adapter never sees a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vtoken.budget import Budget
from vtoken.kernels import gather_tokens, merge_tokens, topk_tokens

Site = Literal["frames", "encoder", "tokens", "decoder", "attention", "cache"]
Unmerging = Literal["expanded", "merged"]
SITES: tuple[Site, ...] = ("frames", "encoder", "tokens", "decoder", "attention", "cache")
Grid = tuple[int, int, int]
Parts = tuple[Grid, ...]


class Fact(NamedTuple):
    """Something a stage needs to know about the visual tokens; nothing that is not asked for is computed.

    `layer` is the encoder (or, at decoder sites, decoder) layer; None means the layer the model takes its features from
    (at encoder and decoder sites: the layer before the cut). Negative layers count from the end. `above` counts, for
    received_attention, only the queries that themselves receive more than so many times the mean of their crop (frame), or if
    there is none, the one that receives most.
    """

    name: str
    layer: int | None = None
    above: float = 0.0


FACTS: dict[str, str] = {
    "cls_attention": "[ΣN] attention of the CLS query over all keys, head mean, CLS column dropped, not renormalised",
    "received_attention": "[ΣN] attention each token receives, mean over queries and heads",
    "global_attention": "[ΣN] as cls_attention; without CLS the query is the mean over the image's patches, windows disregarded",
    "value_attention": "[ΣN] as global_attention, with values for queries and keys and no scale: softmax of dot products",
    "mean_key": "[ΣN, d] encoder keys of the layer, head mean",
    "mean_value": "[ΣN, d] encoder values of the layer, head mean; at decoder sites the decoder's",
    "last_query_attention": "[ΣN] decoder attention of the last prompt token, head mean",
    "next_query_attention": "[ΣN] the same in the decoder layer behind the cut, before it runs",
    "text_attention": "[ΣN] decoder attention of the text tokens that the stage's `raters` chose, mean over them and the heads",
    "visual_attention": "[ΣN] decoder attention of the last prompt token, softmax over the tokens of each image alone, head mean",
    "visual_value_attention": "[ΣN] the same with values for query and keys",
    "cross_attention": "[ΣN] decoder attention of the text behind each image, maximum over heads, mean over that text",
    "self_attention": "[ΣN] decoder attention of each image's own tokens, maximum over heads, mean over them",
    "relayed_attention": "[ΣN] decoder attention of the text behind each image, head mean, weighted by what that text receives from itself",
    "keys": "[ΣN, H*d] encoder keys of the layer; at decoder sites the decoder's, with RoPE",
    "later_keys": "one [T_i, H*d] tensor per image: decoder keys, with RoPE, of its row's text tokens behind it",
    "normed": "[ΣN, D] decoder hidden states through the LLM's final norm",
    "later_normed": "one [T_i, D] tensor per image: the same of its row's text tokens behind it",
    "values": "[ΣN, H*d] encoder values of the layer",
    "features": "[ΣN, D_encoder] encoder output before the projector",
    "pixels": "[ΣN, P] the normalised pixel values behind each token (all patches and frames that were merged into it)",
    "text": "one [T_r, D] tensor per batch row: embeddings of its text tokens (hidden states at decoder sites)",
    "later_text": "one [T_i, D] tensor per image: as text, but only what stands behind the image",
}


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one prefill, packed over images; ragged is the normal case.

    At site frames a row is not a token but a frame of a video (Qwen: a pair of frames), before anything was encoded: `x` holds the
    normalised pixels of its thumbnail, float32 [ΣF, channels * height * width], `parts` is ((frames, 1, 1),), and images have one.

    Attributes:
        x: [ΣN, D] embeddings (hidden states at encoder and decoder sites).
        offsets: [images + 1] int32 on the device of `x`: image i owns rows offsets[i]:offsets[i+1].
        lengths: N_i on the host, so that no stage has to ask the device for a size.
        parts: rasters of each image before anything was dropped, as (frames, rows, columns), in token order. A plain image or a
            video is one raster; an anyres image is two, the downscaled whole and the stitched crops without their padding.
            Newline tokens are in no raster: they follow the pipeline's newline policy and no method sees them.
        row: batch row of each image.
        place: [ΣN] position of each token among its image's unpruned tokens (rasters one after the other).
        segment: [ΣN] frame of a video, or crop of an anyres image (0 is the downscaled whole), each token belongs to; None when
            every image is a single one.
        facts: what the stage declared in `needs`.
        layer: layer index at encoder and decoder sites, else None.
        memory: scratch of this stage for this prefill (stages themselves hold no state).
        size: [ΣN] float32, unpruned tokens that each one stands for; None while nothing was merged.
        lead: tokens in front of every image that no stage may touch: 1 at encoder sites with CLS.
    """

    x: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    parts: tuple[Parts, ...]
    row: tuple[int, ...]
    place: Tensor
    segment: Tensor | None = None
    facts: Mapping[Fact, Any] = field(default_factory=dict)
    layer: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    size: Tensor | None = None
    lead: int = 0

    @classmethod
    def pack(
        cls, x: Tensor, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], place: Tensor, **more: Any
    ) -> VisualTokens:
        """Builds the packed form from host-side lengths."""
        return cls(x, offsets_of(lengths, x.device), tuple(lengths), tuple(parts), tuple(row), place, **more)

    def whole(self, image: int) -> bool:
        """Whether nothing was dropped from the image so far."""
        return self.lengths[image] == size_of(self.parts[image])

    def fact(self, name: str, layer: int | None = None, above: float = 0.0) -> Any:
        """A fact by name, as declared in `needs`."""
        return self.facts[Fact(name, layer, above)]


def size_of(parts: Parts) -> int:
    """Tokens of an image with these rasters."""
    return sum(t * h * w for t, h, w in parts)


def uploaded(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """[len] on the device. The host does not wait for what the device is doing, as it would in `torch.tensor(values, device=device)`."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Packed offsets [len + 1], int32, of segments with these lengths."""
    return uploaded([0, *accumulate(lengths)], device, torch.int32)


def image_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[ΣN] image of each packed token."""
    return torch.repeat_interleave(uploaded(lengths, device), output_size=sum(lengths))


def segments_of(parts: Parts, per: str) -> int:
    """Frames of a video, or crops of an anyres image with the downscaled whole. Crops are counted from the size without padding, which is
    what a plan knows: a long picture that is forced into 2 x 2 crops has more of them."""
    if len(parts) == 1:
        return parts[0][0] if per == "per_frame" else 1
    (_, side, _), (_, height, width) = parts
    return 1 + -(-height // side) * -(-width // side) if per == "per_crop" else 1


@dataclass(frozen=True)
class Fused:
    """Slots that become something else than the mean of their members' embeddings.

    Attributes:
        slots: [M] int64 kept slots (0..ΣK-1).
        factor: [M] float32 that multiplies the mean.
        features: [ΣN, D_encoder] the fact `features`: at site tokens the mean is taken of them, and the projector makes an
            embedding of it. None, or where one visual token takes several patches' features (Qwen): of embeddings.
    """

    slots: Tensor
    factor: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """The decision of a stage, plain data.

    Attributes:
        index: [ΣK] int64 rows of the packed axis that stay, ascending (reading order).
        lengths: kept per image, on the host.
        into: [ΣN] kept slot (0..ΣK-1) that absorbs each token, -1 = dropped; None when losers are simply dropped. A kept
            token absorbs itself.
        weight: [ΣN] weight of each token in its slot's mean; None means equal weights.
        fused: slots that are not to be plain means; only with `into`.
    """

    index: Tensor
    lengths: tuple[int, ...]
    into: Tensor | None = None
    weight: Tensor | None = None
    fused: Fused | None = None

    def to(self, device: torch.device) -> Keep:
        """The same decision on another device."""
        into, weight = (None if t is None else t.to(device) for t in (self.into, self.weight))
        f = self.fused
        if f is not None:
            f = Fused(f.slots.to(device), f.factor.to(device), None if f.features is None else f.features.to(device))
        return Keep(self.index.to(device), self.lengths, into, weight, f)

    def apply(self, x: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Applies the decision to anything whose first axis is the packed token axis: [ΣN, ...] -> [ΣK, ...].

        Args:
            project: makes embeddings [M, D] of features [M, D_encoder], where x are embeddings and the family can.
        """
        if self.into is None:
            return gather_tokens(x, self.index)
        mean = merge_tokens(x, self.into, len(self.index), self.weight)
        if self.fused is None:
            return mean
        slots, features = self.fused.slots, None if project is None else self.fused.features
        of = mean if features is None else merge_tokens(features, self.into, len(self.index), self.weight)
        each = of[slots]
        each = each * self.fused.factor.to(each.dtype).view(-1, *[1] * (each.ndim - 1))
        if project is not None and features is not None:
            each = project(each)
        return mean.index_copy(0, slots, each.to(mean.dtype))


class OtherModel(ValueError):
    """Options (weights, tables, thresholds) that were made for another model; says how to make those of this one."""


class Stage(BaseModel):
    """A method and its options: fields are YAML options, the object with the options is the object with the code.

    Class attributes: `site` says where it acts, `paper` is a link or "no paper", `deviations` names each deliberate difference
    from the authors' code. The name is the file's name (entry points: the entry point's).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str] = ""
    site: ClassVar[Site]
    kind: ClassVar[Literal["pruner", "compressor"]]
    paper: ClassVar[str] = "no paper"
    deviations: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2]

    def needs(self) -> tuple[Fact, ...]:
        """The facts this stage reads."""
        return ()

    def layers(self, depth: int) -> tuple[int, ...]:
        """Layers after which (encoder) or before which (decoder) the stage acts, of `depth` layers; () at other sites."""
        return ()

    def bound(self, depth: int) -> Self:
        """The stage for an encoder (at decoder sites: a decoder) of so many layers, where what it decides depends on that."""
        return self

    def inside(self) -> Literal["plain", "proportional"] | None:
        """Of encoder stages that act between attention and MLP: whether keys then count as often as they have members (log size)."""
        return None

    def misfit(self, depth: int, width: int) -> str:
        """Why what the stage was given (weights, tables) does not fit an LLM of so many layers and channels; "" if it does."""
        return ""

    def select(self, tokens: VisualTokens) -> Keep:
        """The decision, at sites encoder, tokens and decoder."""
        raise NotImplementedError(f"stage {self.name} defines no select()")

    def raters(self, tokens: VisualTokens) -> list[Tensor]:
        """Per image, the text tokens whose attention is the fact text_attention, as indices into the fact later_text, the only one of
        `tokens`. Asked once, on what enters the decoder."""
        raise NotImplementedError(f"stage {self.name} asks for text_attention and defines no raters()")

    def unmerges(self) -> Unmerging | None:
        """At site attention, whether a merged token attends, and is attended to, at every place of its members; if so, what the KV cache
        holds: keys and values of every place (expanded) or one of each merged token (merged)."""
        return None

    def plan(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """Tokens it leaves of each image, without running it: what the FLOPs account uses.

        Stages whose count depends on the picture return what they expect and say so in their docstring.
        """
        return tuple(lengths)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """FLOPs of the decision itself (facts are counted by the account); 0 where only comparisons are made."""
        return 0


class Pruner(Stage):
    """Chooses tokens. Most methods override `score`; the few that need more than a ranking override `select`."""

    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    site: ClassVar[Site] = "tokens"

    keep: Budget

    def score(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] scores, higher is kept."""
        raise NotImplementedError(f"{self.name}: define score() or select()")

    def select(self, tokens: VisualTokens) -> Keep:
        """Exact top-k of `score` per image (or frame, or crop), reading order, ties to the lower index."""
        if self.keep.per is not None and tokens.segment is not None:
            return self._per_segment(tokens)
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        return Keep(topk_tokens(self.score(tokens), tokens.offsets, list(counts)), counts)

    def _per_segment(self, tokens: VisualTokens) -> Keep:
        order, held, keep, lengths = self.per_segment(tokens)
        if keep == held:
            return keep_all(tokens)
        chosen = topk_tokens(self.score(tokens)[order], offsets_of(held, order.device), list(keep))
        return Keep(order[chosen].sort().values, lengths)

    def per_segment(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Segments as images of their own, for budgets per frame or crop.

        Returns:
            order [ΣN] of the tokens, segment by segment (crops of an anyres image take turns in reading order); tokens held and to
            keep per segment; tokens to keep per image.
        """
        image, segment = image_of(tokens.lengths, tokens.x.device), self._segments(tokens)
        count = int(segment.max()) + 1 if len(segment) else 1
        owner = image * count + segment
        held = tuple(torch.bincount(owner, minlength=count * len(tokens.lengths)).tolist())
        keep = self.keep.counts(held, range(len(held)))
        lengths = tuple(sum(keep[i * count : (i + 1) * count]) for i in range(len(tokens.lengths)))
        return torch.argsort(owner, stable=True), held, keep, lengths

    def _segments(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] frame (per_frame) or crop (per_crop) of each token; the other kind of image is one segment."""
        assert tokens.segment is not None
        video = [len(parts) == 1 for parts in tokens.parts]
        wanted = torch.tensor([v == (self.keep.per == "per_frame") for v in video], device=tokens.x.device)
        return torch.where(wanted[image_of(tokens.lengths, tokens.x.device)], tokens.segment, 0)

    def plan(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """With `per` a segment is taken to hold at least its budget."""
        if self.keep.per is None:
            return self.keep.counts(lengths, row)
        assert self.keep.tokens is not None
        each = [self.keep.tokens * segments_of(p, self.keep.per) for p in parts]
        return tuple(min(n, k) for n, k in zip(lengths, each, strict=True))


class Compressor(Stage):
    """Does more than choose: merges, retires, sparsifies, shrinks."""

    kind: ClassVar[Literal["pruner", "compressor"]] = "compressor"


def keep_all(tokens: VisualTokens) -> Keep:
    """The identity decision."""
    return Keep(torch.arange(len(tokens.x), device=tokens.x.device), tokens.lengths)
