"""TextMonkey's filter: keep the tokens that no later token resembles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from vtoken.kernels import nearest_tokens
from vtoken.stages import Pruner, VisualTokens


class TextMonkey(Pruner):
    """The redundancy of a token is its highest cosine similarity to a later token of the image (crops and frames
    together); the least redundant stay. So of two equal tokens the earlier one is dropped, and the last token always
    stays. `symmetric` compares with earlier tokens too.

    Paper: https://arxiv.org/abs/2403.04473. Only the filter: the trained resampler after it, which lets the kept tokens
    attend to all, needs its weights.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.04473"
    deviations: ClassVar[str] = (
        "Filters the tokens of any model right before the LLM, not TextMonkey's own before its resampler."
    )

    symmetric: bool = Field(default=False, description="compare with earlier tokens too")

    def score(self, tokens: VisualTokens) -> Tensor:
        """O(N) memory."""
        among: Literal["others", "later"] = "others" if self.symmetric else "later"
        return -nearest_tokens(tokens.x, tokens.x, tokens.offsets, tokens.offsets, among)[0]

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(2 * n * n * width for n in lengths)
