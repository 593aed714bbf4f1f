"""The base classes of methods: Stage, Pruner, Compressor. Letters as in `tokens`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from vtoken.kernels import merge_tokens, topk_tokens
from vtoken.stages.budget import Budget
from vtoken.stages.facts import Fact, Site
from vtoken.stages.layer_size import LayerSize
from vtoken.stages.tokens import Keep, Parts, VisualTokens, image_of, offsets_of, positions, segments_of, uploaded

Unmerging = Literal["expanded", "merged"]
KEEP = "tokens that stay: 64 or 25% of every image, {total: 640} of a sample, {per_frame: 32}, {per_crop: 64}"
KEY = 0.9  # cosine of the mean tokens of two frames below which the later one is a key frame; a guess
NAMES_FILE: dict[str, Any] = {"format": "path"}  # json_schema_extra of an option whose text names a file


class OtherModel(ValueError):
    """Options (weights, tables, thresholds) that were made for another model; the message says how to make them for
    this one."""


class Stage(BaseModel):
    """A method and its options: the fields are the YAML options, and the object that holds them also holds the code.

    Class attributes: `site` says where the stage acts, `paper` is a link or "no paper", `deviations` names each
    deliberate difference from the authors' code, `videos_only` whether pictures keep all their tokens. The name of a
    stage is its file name (with entry points: the name of the entry point).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: ClassVar[str] = ""
    site: ClassVar[Site]
    kind: ClassVar[Literal["pruner", "compressor"]]
    paper: ClassVar[str] = "no paper"
    deviations: ClassVar[str] = ""
    videos_only: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As in pydantic, except that a changed copy forgets the cached properties, which follow from the options."""
        made = super().model_copy(update=update, deep=deep)
        for name in _cached(type(self)) if update else ():
            vars(made).pop(name, None)
        return made

    @classmethod
    def file_options(cls) -> tuple[str, ...]:
        """Options whose value names a file. The file is looked for beside the pipeline file, and saved with a model."""
        return tuple(name for name, field in cls.model_fields.items() if field.json_schema_extra == NAMES_FILE)

    def needs(self) -> tuple[Fact, ...]:
        """The facts this stage reads."""
        return ()

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers, of `depth`, after which (encoder) or before which (decoder) the stage acts; () at other sites."""
        return ()

    def for_depth(self, depth: int) -> Self:
        """The stage adapted to an encoder (at decoder sites: a decoder) of `depth` layers, if its decisions depend on
        the depth."""
        return self

    def merge_point(self) -> Literal["plain", "proportional"] | None:
        """For encoder stages that merge between attention and MLP: "proportional" if later layers count a key once per
        member (log size is added to the logits), "plain" if once. None for all others."""
        return None

    def incompatibility(self, depth: int, width: int) -> str:
        """Why its weights or tables do not fit an LLM with `depth` layers and `width` channels; "" if they do."""
        return ""

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        """Why the stage cannot serve a decoder with this many query and key heads of this width, and what to do; "" if
        it can."""
        return ""

    def tower_incompatibility(self, width: int, unit: int) -> str:
        """As `incompatibility`, for a vision tower whose keys have `width` channels and that makes one token of `unit`
        patches."""
        return ""

    def unload(self) -> None:
        """Frees what the stage copied to devices; called by `unwrap`."""

    def select(self, tokens: VisualTokens) -> Keep:
        """The decision, for sites pixels, frames, encoder, tokens and decoder."""
        raise NotImplementedError(f"stage {self.name} defines no select()")

    def query_tokens(self, tokens: VisualTokens) -> list[Tensor]:
        """For stages that need text_attention: per image, the text tokens whose attention is read, as indices into
        later_text, the only fact in `tokens`. Called once, on the tokens that enter the decoder."""
        raise NotImplementedError(f"stage {self.name} asks for text_attention and defines no query_tokens()")

    def resized(self, lengths: Sequence[int], parts: Sequence[Parts]) -> tuple[Parts, ...] | None:
        """At site pixels, for stages that resize pictures: the new rasters of each image, in tokens, no larger than the
        old ones and with as many frames. `select` then keeps an upper left corner of that size of every raster, whose
        places the tokens of the smaller picture take. None for stages that choose. `lengths` and `parts` as in
        VisualTokens.
        """
        return None

    def refills(self) -> tuple[int, int] | None:
        """For encoder stages that drop patches only inside the encoder: where features are read, the dropped patches
        are estimated from their neighbours, and no visual token is lost. Returns from how many neighbours, and in how
        many layers attention still sees estimates; None for other stages."""
        return None

    def clears_earlier_layers(self) -> bool:
        """Whether, at site decoder, tokens that the stage drops also leave the caches of all earlier layers."""
        return False

    def unmerge_mode(self) -> Unmerging | None:
        """At site attention, for stages that unmerge virtually: a merged token attends, and is attended to, at the
        positions of all its members. Says what the KV cache stores: a key and a value per position ("expanded") or per
        merged token ("merged"). None for other stages."""
        return None

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """Tokens that the stage leaves of each image, for the FLOPs account; an estimate if that depends on what the
        picture shows."""
        return tuple(lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        """Whether `select` leaves exactly `expected_counts` at that layer, whatever the picture shows.

        Args:
            layer: as in VisualTokens; None stands for the last layer at which the stage acts.
            whole: every frame and crop still has all its tokens: no earlier stage dropped any, and no padding was
                removed.
        """
        return type(self).select is Stage.select

    def even_per(self) -> str | None:
        """ "per_frame" or "per_crop" if the stage keeps `keep.tokens` tokens of every frame or crop that has them;
        else None."""
        return None

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """FLOPs of the decision, without those of its facts; 0 if it only compares."""
        return 0

    def bytes_read(self, at: LayerSize, cached: int) -> int | None:
        """Bytes of a layer's cache that the newest token's step reads, its own key and value included. They count as
        they are stored; copies made from them do not. `cached` is the size of the whole cache. None if the number
        depends on the contents; the account then counts the whole cache.

        For stages that leave the cache whole and choose at every token; all others read everything that is cached.
        """
        return cached


def _cached(cls: type[Stage]) -> list[str]:
    """Names of the cached properties of a stage."""
    return [name for base in cls.__mro__ for name, x in vars(base).items() if isinstance(x, cached_property)]


class Pruner(Stage):
    """Chooses tokens. Most methods override `score`; those that need more than a ranking override `select`."""

    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    site: ClassVar[Site] = "tokens"

    keep: Budget = Field(description=KEEP)

    def score(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] scores; tokens with higher scores are kept."""
        raise NotImplementedError(f"{self.name}: define score() or select()")

    def select(self, tokens: VisualTokens) -> Keep:
        """Exact top-k of `score` per image (or frame, or crop), in reading order, ties to the lower index."""
        if self.keep.per is not None and tokens.segment is not None:
            order, sizes, keep, lengths = self.per_segment(tokens)
            if keep == sizes:
                return keep_all(tokens)
            chosen = topk_tokens(self.score(tokens)[order], offsets_of(sizes, order.device), list(keep))
            return Keep(order[chosen].sort().values, lengths)
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        return Keep(topk_tokens(self.score(tokens), tokens.offsets, list(counts)), counts)

    def per_segment(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Treats segments as images of their own, for budgets per frame or crop.

        Returns:
            order [ΣN] that sorts the tokens by segment (in reading order, the tokens of different crops alternate);
                tokens per segment; tokens to keep per segment; tokens to keep per image.
        """
        image, segment = image_of(tokens.lengths, tokens.x.device), self._segments(tokens)
        count = int(segment.max()) + 1 if len(segment) else 1
        owner = image * count + segment
        sizes = tuple(torch.bincount(owner, minlength=count * len(tokens.lengths)).tolist())
        order = torch.argsort(owner, stable=True)
        keep = self.keep.counts(sizes, range(len(sizes)))
        if self.keep.key_weight is not None:
            images = [i // count for i in range(len(sizes))]
            keep = self.keep.counts(sizes, images, key_weights(tokens.x[order], sizes, images, self.keep))
        lengths = tuple(sum(keep[i * count : (i + 1) * count]) for i in range(len(tokens.lengths)))
        return order, sizes, keep, lengths

    def even_per(self) -> str | None:
        return None if self.keep is None or self.keep.key_weight else self.keep.per

    def _segments(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] frame (per_frame) or crop (per_crop) of each token; an image of the other kind counts as one segment."""
        assert tokens.segment is not None
        video = [len(parts) == 1 for parts in tokens.parts]
        wanted = uploaded([v == (self.keep.per == "per_frame") for v in video], tokens.x.device, torch.bool)
        return torch.where(wanted[image_of(tokens.lengths, tokens.x.device)], tokens.segment, 0)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """With `per`, assumes that every segment holds at least its budget."""
        if self.keep.per is None:
            return self.keep.counts(lengths, row)
        assert self.keep.tokens is not None
        each = [self.keep.tokens * segments_of(p, self.keep.per) for p in parts]
        return tuple(min(n, k) for n, k in zip(lengths, each, strict=True))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return whole or self.keep.per is None


def key_weights(x: Tensor, sizes: Sequence[int], images: Sequence[int], keep: Budget) -> list[float]:
    """The weight of each frame: `keep.key_weight` for key frames, else 1. A key frame is the first frame of an image,
    and each frame whose mean token has a cosine below KEY to that of the last key frame. Waits for the device.

    Args:
        x: [ΣN, D] tokens, frame by frame.
        sizes: tokens of each frame; images: the image that each belongs to.
    """
    means = torch.nn.functional.normalize(merge_tokens(x.float(), image_of(sizes, x.device), len(sizes)), dim=-1).cpu()
    weights, last = [1.0] * len(sizes), -1
    for i, (n, image) in enumerate(zip(sizes, images, strict=True)):
        if n and (last < 0 or images[last] != image or float(means[i] @ means[last]) < KEY):
            weights[i], last = float(keep.key_weight or 1), i
    return weights


class Compressor(Stage):
    """Does more than choose: merges tokens, drops all of them at some layer, sparsifies attention, or shrinks the
    cache."""

    kind: ClassVar[Literal["pruner", "compressor"]] = "compressor"

    @field_validator("*")
    @classmethod
    def _whole_images(cls, value: Any) -> Any:
        in_cache = cls.site in ("cache", "decode") and isinstance(value, Budget)
        return value.of_images("in the KV cache") if in_cache else value


def keep_all(tokens: VisualTokens) -> Keep:
    """The identity decision."""
    return Keep(torch.arange(len(tokens.x), device=tokens.x.device), tokens.lengths)


def keep_where(tokens: VisualTokens, mask: Tensor) -> Keep:
    """The decision that the tokens stay for which the mask [ΣN] is True. Waits for the device once."""
    sums = mask.new_zeros(len(tokens.lengths), dtype=torch.int64)
    lengths = sums.index_add_(0, image_of(tokens.lengths, mask.device), mask.long()).tolist()
    same = tuple(lengths) == tokens.lengths
    return keep_all(tokens) if same else Keep(positions(mask, sum(lengths)), tuple(lengths))
