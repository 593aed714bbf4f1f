"""Random: the lower bound that every method has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages import Pruner, VisualTokens


class Random(Pruner):
    """Keeps tokens drawn uniformly without replacement. The draw depends only on `seed` and the image's number of
    tokens: not on its place in the batch, the device, or torch's global generator.

    No paper: a baseline.
    """

    paper: ClassVar[str] = "no paper"

    seed: int = Field(default=0, description="seed of the draw")

    def score(self, tokens: VisualTokens) -> Tensor:
        draws = {n: torch.rand(n, generator=torch.Generator().manual_seed(self.seed)) for n in set(tokens.lengths)}
        first, *rest = (draws[n] for n in tokens.lengths)
        return (torch.cat([first, *rest]) if rest else first).to(tokens.x.device, non_blocking=True)
