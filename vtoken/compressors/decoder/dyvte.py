"""DyVTE: a small trained gate per decoder layer decides when all visual tokens of a sample are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from vtoken.compressors._files import Weights
from vtoken.compressors.decoder._exits import asked, last_of, leave
from vtoken.compressors.decoder._gates import Header, header, logits, matrices, question, read
from vtoken.stages import NAMES_FILE, Compressor, Fact, Keep, Parts, Site, VisualTokens


class DyVTE(Compressor):
    """Before every decoder layer, a gate reads the output of the layer before: the mean of the question's tokens (the
    text after the row's last image, without the last token) joined with the last prompt token. Two matrices with GELU
    between them give two numbers, stay and leave; at the first layer where leave is larger, all visual tokens of the
    row are dropped. Decided at prefill, row by row.

    The authors publish no gates. `vtoken train-exit` trains them for a model; those of the reference model are shipped
    (`gates: tiny-llava`). How many rows exit at which layer depends on the prompt: the plan (FLOPs) uses the shares
    that were measured when the gates were trained. Rows with fewer than two text tokens after their last image keep it.

    Paper: https://arxiv.org/abs/2411.19628
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.19628"
    deviations: ClassVar[str] = (
        "The authors' code assumes 35 tokens before one image of 576; here the question is found in any prompt, and "
        "the images of a row are dropped together. No gate for the last layer, after which there is nothing to save. "
        "Means are taken in float32."
    )

    gates: str = Field(
        description="file that `vtoken train-exit` wrote for the same model, or tiny-llava for the shipped ones",
        json_schema_extra=NAMES_FILE,
    )

    @field_validator("gates")
    @classmethod
    def _readable(cls, gates: str) -> str:
        read(gates)
        return gates

    @cached_property
    def header(self) -> Header:
        """The header of the file, as it was when first read."""
        return header(self.gates)

    @cached_property
    def weights(self) -> Weights:
        """The gates, by the layer before which they are asked."""
        return Weights(matrices(self.gates))

    def unload(self) -> None:
        self.weights.unload()

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("later_text"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))

    def incompatibility(self, depth: int, width: int) -> str:
        header, _ = self.header, self.weights  # read when wrapping
        if (header.depth, header.width) == (depth, width):
            return ""
        return (
            f"the gates {self.gates!r} are for a decoder of {header.depth} layers of width {header.width}, this one "
            f"has {depth} of width {width}; train gates for it: vtoken train-exit MODEL --data DATA -o FILE"
        )

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Keep:
        texts, last = tokens.fact("later_text"), last_of(tokens.row)
        which = sorted({k for k, ask in zip(last, asked(tokens, least=2), strict=True) if ask})
        gone: dict[int, bool] = {}
        if which:
            assert tokens.layer is not None
            shown = torch.stack([question(texts[k]) for k in which])
            first, second = self.weights.on(tokens.layer, shown.device)
            stay, out = logits((first, second), shown).unbind(1)
            gone = dict(zip(which, (out > stay).tolist(), strict=True))
        return leave(tokens, [gone.get(k, False) for k in last])

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """Expected tokens: those that arrive, times the share of samples that keep their images at this layer among
        those that still have them."""
        stay = self.header.stay
        if not layer or not stay[layer - 1]:
            return tuple(lengths)
        return tuple(round(n * stay[layer] / stay[layer - 1]) for n in lengths)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Both matrices, for one row, while it has images."""
        header = self.header
        return 2 * header.hidden * (2 * header.width + 2) if any(lengths) else 0
