"""Learned compressor: a module with trained weights makes fewer visual tokens of all."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.compressors._modules import load
from vtoken.stages import (
    NAMES_FILE,
    Compressor,
    Fact,
    Fused,
    Keep,
    Layout,
    Parts,
    Site,
    TokenModule,
    VisualTokens,
    keep_all,
)


class LearnedCompressor(Compressor):
    """Gives the visual tokens of each picture (video) to a module of yours and puts the tokens that it returns in their
    place: a Perceiver resampler, a Q-Former, a cross-attention projector. The module is a `vtoken.stages.TokenModule`
    of an installed package; its weights are a safetensors file whose tensors must match it name by name and shape by
    shape. Pictures of which it would make as many tokens as they have stay as they are.

    Such a module is trained together with the LLM that reads its tokens, or for it: with random weights it destroys
    what the model sees. A new token stands for the tokens from its place to the next: of DeepStack features (Qwen3-VL)
    it has their mean. Waits for the device once, to check the places.

    No paper: a door for methods that bring weights of their own.
    """

    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "no paper"

    module: str = Field(description="class to build, as package.module:Class; importing it runs that package's code")
    weights: str = Field(description="safetensors file with the state of the module", json_schema_extra=NAMES_FILE)

    @model_validator(mode="after")
    def _readable(self) -> Self:
        load(self.module, self.weights)
        return self

    @cached_property
    def held(self) -> dict[torch.device, TokenModule]:
        """The module, by the devices that it was copied to. The file is read once, so that later changes to it do not
        reach a wrapped model."""
        return {torch.device("cpu"): load(self.module, self.weights)}

    @property
    def first(self) -> TokenModule:
        return self.held[torch.device("cpu")]

    def unload(self) -> None:
        for device in set(self.held) - {torch.device("cpu")}:
            del self.held[device]

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("features"),) if self.first.reads == "features" else ()

    def incompatibility(self, depth: int, width: int) -> str:
        module = self.first
        takes = width if module.reads == "features" else module.takes  # features are as wide as the tower makes them
        if takes == module.makes == width:
            return ""
        return (
            f"{self.module} with {self.weights!r} takes {takes} channels and makes {module.makes}; the LLM has {width}: "
            "take weights that were trained for it"
        )

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Keep:
        read = tokens.fact("features") if self.first.reads == "features" else tokens.x
        if self._counts(tokens.lengths) == tokens.lengths:
            return keep_all(tokens)
        index, into, slots, values, known = [], [], [], [], []
        start, lengths = 0, list[int]()
        for image, n in enumerate(tokens.lengths):
            here = slice(start, start + n)
            kept = torch.arange(n, device=read.device)
            if self._count(n) < n:
                places = tokens.raster_index[here]
                made, layout = self._made(read[here], Layout(tokens.parts[image], places), tokens.x.shape[1])
                kept = torch.searchsorted(places, layout.places)
                known.append((kept.diff() > 0).all() & (places[kept.clamp(max=n - 1)] == layout.places).all())
                slots.append(torch.arange(len(kept), device=read.device) + sum(lengths))
                values.append(made.to(tokens.x))
            # Tokens in front of the first place go to it too.
            owner = torch.searchsorted(kept, torch.arange(n, device=read.device), right=True).sub(1).clamp(min=0)
            index.append(kept + start)
            into.append(owner + sum(lengths))
            lengths.append(len(kept))
            start += n
        if not bool(torch.stack(known).all()):
            raise ValueError(
                f"{self.module} returned places that are not ascending, or that were not among those it was given"
            )
        new = torch.cat(slots)
        factor = torch.ones(len(new), device=new.device)
        fused = Fused(new, factor, values=torch.cat(values))
        return Keep(torch.cat(index), tuple(lengths), torch.cat(into), fused=fused, complete=True)

    def _made(self, read: Tensor, layout: Layout, width: int) -> tuple[Tensor, Layout]:
        """What the module makes of one picture.

        Raises:
            ValueError: it takes features of another width, or returned something else than its contract says.
        """
        if read.shape[1] != self.first.takes:
            raise ValueError(
                f"{self.module} takes {self.first.takes} channels and is given {self.first.reads} of {read.shape[1]}; "
                "take weights that were trained for this model"
            )
        module = self.held.get(read.device)
        if module is None:
            with torch.inference_mode(False):
                module = self.held[read.device] = deepcopy(self.first).to(read.device)
        kind = next(module.parameters(), read).dtype
        made, where = module(read.to(kind), layout)
        want = (self._count(len(read)), width)
        if tuple(made.shape) != want or len(where.places) != want[0]:
            raise ValueError(
                f"{self.module} made {list(made.shape)} with {len(where.places)} places of {len(read)} tokens, expected "
                f"{list(want)}"
            )
        return made, where

    def _count(self, n: int) -> int:
        return min(n, self.first.count(n)) if n else 0

    def _counts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(self._count, lengths))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return self._counts(lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(self.first.flops(n) for n in lengths)
