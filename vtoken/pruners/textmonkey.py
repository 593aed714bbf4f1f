"""TextMonkey's filter: keep the tokens that no later token resembles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vtoken.stages import Pruner, VisualTokens

ROWS = 1024  # of the similarity map that are held at once


class TextMonkey(Pruner):
    """A token is as redundant as its highest cosine similarity to a token behind it in the image (crops and frames together);
    the least redundant stay. So of two equal tokens the earlier one goes, and the last token always stays. `symmetric` compares
    with the tokens in front too.

    Paper: https://arxiv.org/abs/2403.04473. The filter only: the trained resampler behind it, which lets the kept tokens attend to all,
    needs its weights.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.04473"
    deviations: ClassVar[str] = (
        "Filters the tokens of any model right before the LLM, in place of TextMonkey's own in front of its resampler."
    )

    symmetric: bool = Field(default=False, description="compare with earlier tokens too")

    def score(self, tokens: VisualTokens) -> Tensor:
        """A loop over images; O(N) memory."""
        x = nn.functional.normalize(tokens.x.float(), dim=-1)
        return torch.cat([-self._redundancy(image) for image in x.split(tokens.lengths)])

    def _redundancy(self, x: Tensor) -> Tensor:
        """[N] from normalised x [N, D]."""
        column, out = torch.arange(len(x), device=x.device), []
        for start in range(0, len(x), ROWS):
            row = column[start : start + ROWS, None]
            hidden = column == row if self.symmetric else column <= row
            out.append((x[start : start + ROWS] @ x.T).masked_fill_(hidden, -torch.inf).amax(1))
        return torch.cat(out) if out else x[:, 0]

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(2 * n * n * width for n in lengths)
