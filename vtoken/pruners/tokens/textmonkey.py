"""TextMonkey's filter: keep the tokens that no later token resembles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from vtoken.kernels import nearest_tokens
from vtoken.stages import Pruner, VisualTokens


class TextMonkey(Pruner):
    """A token is as redundant as its highest cosine similarity to a token behind it in the image (crops and frames
    together); the least redundant stay. So of two equal tokens the earlier one goes, and the last token always stays.
    `symmetric` compares with the tokens in front too.

    Paper: https://arxiv.org/abs/2403.04473. The filter only: the trained resampler behind it, which lets the kept
    tokens attend to all, needs its weights.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.04473"
    deviations: ClassVar[str] = (
        "Filters the tokens of any model right before the LLM, in place of TextMonkey's own in front of its resampler."
    )

    symmetric: bool = Field(default=False, description="compare with earlier tokens too")

    def score(self, tokens: VisualTokens) -> Tensor:
        """O(N) memory."""
        among: Literal["others", "later"] = "others" if self.symmetric else "later"
        return -nearest_tokens(tokens.x, tokens.x, tokens.offsets, tokens.offsets, among)[0]

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(2 * n * n * width for n in lengths)
