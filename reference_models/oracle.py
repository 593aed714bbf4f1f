"""Embeddings of perfectly recognised patches, towards which the decoder and the projector are trained apart."""

import math

import torch
from torch import nn

from .batches import Labels
from .build import WIDTH
from .pictures import COLOUR_NAMES, GRID


class Oracle(nn.Module):
    """Fixed random embeddings: the sum of a glyph vector, a colour vector and waves of the horizontal centre.

    Waves rather than a table of columns: "the next one to the right" is then a fixed rotation, which suits attention.
    """

    PERIODS = (64, 32, 16, 8, 4)  # in patches; the longest tells left from right

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.glyph, self.colour = nn.Embedding(11, WIDTH), nn.Embedding(len(COLOUR_NAMES) + 1, WIDTH)
        self.column = nn.Linear(2 * len(self.PERIODS) + 1, WIDTH, bias=False)
        for table, std in ((self.glyph, 0.5), (self.colour, 0.5), (self.column, 0.3)):
            nn.init.normal_(table.weight, std=std, generator=generator)
        self.requires_grad_(False)

    def forward(self, seen: Labels, centre: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [B, N, D]; `centre` [B, N] in patches, None leaves the place out."""
        known: torch.Tensor = self.glyph(seen.glyph) + self.colour(seen.colour)
        if centre is None:
            return known
        phase = centre[..., None] * (2 * math.pi / torch.tensor(self.PERIODS, device=centre.device))
        return known + self.column(torch.cat([phase.sin(), phase.cos(), centre[..., None] * (2 / GRID) - 1], -1))
