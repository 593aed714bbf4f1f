"""The contract of compressors with weights of their own: TokenModule, Layout. Letters as in `tokens`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vtoken.stages.tokens import Parts


class Layout(NamedTuple):
    """Where the tokens of one picture or video stand.

    Attributes:
        parts: its rasters, as (frames, rows, columns), before anything was dropped.
        places: [N] int64, ascending: the place of every token, counted through the rasters. A token has the position
            of the place it stands at.
    """

    parts: Parts
    places: Tensor

    def spread(self, count: int) -> Layout:
        """`count` of these places, evenly spaced, for tokens without a place of their own."""
        n = len(self.places)
        return self._replace(
            places=self.places[(2 * torch.arange(count, device=self.places.device) + 1) * n // (2 * count)]
        )


class TokenModule(nn.Module, ABC):
    """Computes new visual tokens for a picture, with trained weights. Subclass it, and give the stage
    `learned_compressor` the name of the subclass and a safetensors file of its state. `config` in the file's header, if
    there is one, has the arguments of the constructor as a JSON object.

    Attributes:
        reads: what `forward` is given: `embeddings` [N, D] as they enter the LLM, or `features` [N, D_encoder], the
            encoder's output before the projector.
        takes: channels of what it is given; set by the constructor.
        makes: channels of what it returns, the width D of the LLM; set by the constructor.
    """

    reads: ClassVar[Literal["embeddings", "features"]] = "embeddings"
    takes: int
    makes: int

    @abstractmethod
    def forward(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """One picture or video.

        Args:
            tokens: [N, D or D_encoder], in the dtype of the module's parameters.
            layout: where they stand.

        Returns:
            [K, D] embeddings, and where they stand: K different places among those of `layout`, ascending.
        """

    @abstractmethod
    def count(self, tokens: int) -> int:
        """How many tokens it makes of N = `tokens`: K, 1..N. The rest of vtoken relies on this number."""

    def flops(self, tokens: int) -> int:
        """FLOPs for a picture of that many tokens; by default every parameter meets every token once."""
        return 2 * tokens * sum(p.numel() for p in self.parameters())
