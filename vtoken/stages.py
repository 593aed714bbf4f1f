"""The vocabulary between models and methods: VisualTokens, Fact, Keep, Stage.

Letters in every docstring: `B` batch rows, `N` visual tokens (`N_i` of image i), `K` kept, `T` text tokens, `L` sequence, `H` heads,
`D` width, `d` head width. A method imports this file and never sees a model; an adapter never sees a method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vtoken.budget import Budget
from vtoken.kernels import gather_tokens, topk_tokens

Site = Literal["frames", "encoder", "tokens", "decoder", "attention", "cache"]
SITES: tuple[Site, ...] = ("frames", "encoder", "tokens", "decoder", "attention", "cache")
Grid = tuple[int, int, int]


class Fact(NamedTuple):
    """Something a stage needs to know about the visual tokens; nothing that is not asked for is computed.

    `layer` is the encoder (or, at decoder sites, decoder) layer; None means the layer the model takes its features from
    (at encoder and decoder sites: the layer before the cut). Negative layers count from the end.
    """

    name: str
    layer: int | None = None


FACTS: dict[str, str] = {
    "cls_attention": "[ΣN] attention of the CLS query over all keys, head mean, CLS column dropped, not renormalised",
    "received_attention": "[ΣN] attention each token receives, mean over queries and heads",
    "last_query_attention": "[ΣN] decoder attention of the last prompt token, head mean",
    "keys": "[ΣN, H*d] encoder keys of the layer",
    "values": "[ΣN, H*d] encoder values of the layer",
    "features": "[ΣN, D_encoder] encoder output before the projector",
    "text": "one [T_r, D] tensor per batch row: embeddings of its text tokens",
}


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one prefill, packed over images; ragged is the normal case.

    Attributes:
        x: [ΣN, D] embeddings (hidden states at encoder and decoder sites).
        offsets: [images + 1] int32 on the device of `x`: image i owns rows offsets[i]:offsets[i+1].
        lengths: N_i on the host, so that no stage has to ask the device for a size.
        grid: (frames, rows, columns) of each image before anything was dropped.
        row: batch row of each image.
        place: [ΣN] position of each token in its image's unpruned raster.
        facts: what the stage declared in `needs`.
        layer: layer index at encoder and decoder sites, else None.
        memory: scratch of this stage for this prefill (stages themselves hold no state).
    """

    x: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    grid: tuple[Grid, ...]
    row: tuple[int, ...]
    place: Tensor
    facts: Mapping[Fact, Any] = field(default_factory=dict)
    layer: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def pack(
        cls, x: Tensor, lengths: Sequence[int], grid: Sequence[Grid], row: Sequence[int], place: Tensor, **more: Any
    ) -> VisualTokens:
        """Builds the packed form from host-side lengths."""
        return cls(x, offsets_of(lengths, x.device), tuple(lengths), tuple(grid), tuple(row), place, **more)

    def fact(self, name: str, layer: int | None = None) -> Any:
        """A fact by name, as declared in `needs`."""
        return self.facts[Fact(name, layer)]


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Packed offsets [len + 1], int32, of segments with these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Keep:
    """The decision of a stage, plain data.

    Attributes:
        index: [ΣK] int64 rows of the packed axis that stay, ascending (reading order).
        lengths: kept per image, on the host.
        into: [ΣN] kept slot (0..ΣK-1) that absorbs each token, -1 = dropped; None when losers are simply dropped. A kept
            token absorbs itself.
        weight: [ΣN] weight of each token in its slot's mean; None means equal weights.
    """

    index: Tensor
    lengths: tuple[int, ...]
    into: Tensor | None = None
    weight: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Applies the decision to anything whose first axis is the packed token axis: [ΣN, ...] -> [ΣK, ...]."""
        if self.into is None:
            return gather_tokens(x, self.index)
        member = self.into >= 0
        slot, flat = self.into[member], x[member].flatten(1).float()
        weight = flat.new_ones(len(slot)) if self.weight is None else self.weight[member].float()
        total = flat.new_zeros(len(self.index)).index_add_(0, slot, weight)
        mean = flat.new_zeros(len(self.index), flat.shape[1]).index_add_(0, slot, flat * weight[:, None])
        return (mean / total[:, None]).to(x.dtype).view(len(self.index), *x.shape[1:])


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

    def select(self, tokens: VisualTokens) -> Keep:
        """The decision, at sites encoder, tokens and decoder."""
        raise NotImplementedError(f"stage {self.name} defines no select()")

    def plan(
        self, lengths: Sequence[int], grid: Sequence[Grid], row: Sequence[int], layer: int | None = None
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
        """Exact top-k of `score` per image, reading order, ties to the lower index."""
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        return Keep(topk_tokens(self.score(tokens), tokens.offsets, list(counts)), counts)

    def plan(
        self, lengths: Sequence[int], grid: Sequence[Grid], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return self.keep.counts(lengths, row)


class Compressor(Stage):
    """Does more than choose: merges, retires, sparsifies, shrinks."""

    kind: ClassVar[Literal["pruner", "compressor"]] = "compressor"


def keep_all(tokens: VisualTokens) -> Keep:
    """The identity decision."""
    return Keep(torch.arange(len(tokens.x), device=tokens.x.device), tokens.lengths)
