"""Learned compressor: a module with trained weights makes fewer visual tokens of all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from vtoken.compressors._modules import Loaded
from vtoken.stages import (
    NAMES_FILE,
    Compressor,
    Fact,
    Fused,
    Keep,
    Layout,
    Parts,
    Site,
    VisualTokens,
    keep_all,
)


class LearnedCompressor(Compressor):
    """Gives the visual tokens of each picture (video) to a module of yours and puts the tokens that it returns in their
    place: a Perceiver resampler, a Q-Former, a cross-attention projector. The module is a `vtoken.stages.TokenModule`
    of an installed package; its weights are a safetensors file whose tensors must match it name by name and shape by
    shape. A picture stays as it is if the module would make as many tokens as it has.

    Such a module is trained together with the LLM that reads its tokens, or for it: with random weights it destroys
    what the model sees. A new token stands for the tokens from its place to the next one's (the first also for those
    before it): of DeepStack features (Qwen3-VL) it gets their mean. Waits for the device once, to check the places.

    No paper: an interface for methods that bring weights of their own.
    """

    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "no paper"

    module: str = Field(description="class to build, as package.module:Class; importing it runs that package's code")
    weights: str = Field(description="safetensors file with the state of the module", json_schema_extra=NAMES_FILE)

    @model_validator(mode="after")
    def _readable(self) -> Self:
        assert self.loaded  # refuses what cannot be read
        return self

    @cached_property
    def loaded(self) -> Loaded:
        return Loaded(self.module, self.weights)

    def unload(self) -> None:
        self.loaded.unload()

    @property
    def reads_features(self) -> bool:
        return self.loaded.first.reads == "features"

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("features"),) if self.reads_features else ()

    def incompatibility(self, depth: int, width: int) -> str:
        module = self.loaded.first
        # How wide features are is not known here.
        if module.makes == width and (self.reads_features or module.takes == width):
            return ""
        return (
            f"{self.module} with {self.weights!r} takes {module.takes} channels and makes {module.makes}; the LLM has "
            f"{width}: take weights that were trained for it"
        )

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Keep:
        read = tokens.fact("features") if self.reads_features else tokens.x
        lengths, device = self._counts(tokens.lengths), read.device
        if lengths == tokens.lengths:
            return keep_all(tokens)
        index, into, slots, values, known = [], [], [], [], []
        starts = zip(accumulate(tokens.lengths, initial=0), accumulate(lengths, initial=0), strict=True)
        for image, (n, count, (start, slot)) in enumerate(zip(tokens.lengths, lengths, starts, strict=False)):
            kept = torch.arange(n, device=device)
            if count < n:
                layout = Layout(tokens.parts[image], tokens.raster_index[start : start + n])
                made, kept, right = self.loaded.make(read[start : start + n], layout, tokens.x.shape[1])
                slots.append(torch.arange(slot, slot + count, device=device))
                values.append(made.to(tokens.x))
                known.append(right)
            # Tokens in front of the first place go to it too.
            owner = torch.searchsorted(kept, torch.arange(n, device=device), right=True).sub(1).clamp(min=0)
            index.append(kept + start)
            into.append(owner + slot)
        if not bool(torch.stack(known).all()):
            raise ValueError(
                f"{self.module} returned places that are not ascending, or that were not among those it was given"
            )
        new = torch.cat(slots)
        fused = Fused(new, torch.ones(len(new), device=device), values=torch.cat(values))
        return Keep(torch.cat(index), lengths, torch.cat(into), fused=fused, complete=True)

    def _counts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(self.loaded.count, lengths))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return self._counts(lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(self.loaded.first.flops(n) for n in lengths)
