"""SpecVLM: of a draft, keep the tokens that its target looks at, and an even sample of the rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.pruners._pools import choose, rest_of, top
from vtoken.stages import Fact, Keep, Pruner, VisualTokens
from vtoken.stages.budget import Budget


class SpecVLM(Pruner):
    """For models that draft (`vtoken.draft`). The score of a visual token is the attention that it receives in the
    target's prefill from the text after the last image, mean over that text, heads and layers. First the tokens with
    the highest scores are taken, as few as hold the share `p` of the sum of an image's scores, at most `keep`; the
    other places go to tokens spaced evenly among the rest, in reading order. Ties go to the lower index.

    Answers stay the target's, whatever is dropped: only how many drafts it accepts depends on the choice. The rows of
    attention are computed, and paid for, in the target's prefill.

    Paper: https://arxiv.org/abs/2508.16201. Loops over images (or frames, or crops).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.16201"
    deviations: ClassVar[str] = (
        "Drafts are a chain; the authors verify a tree of 25. Places of the even sample are whole numbers, where "
        "theirs are rounded from float32. Chooses image by image, with the share of its own sum; theirs has one "
        "picture or video, and rounds the budget down. Positions follow the pipeline's policy. The attention is "
        "computed from the target's queries and keys in the one prefill, theirs by eager attention in a second call "
        "for the text."
    )

    keep: Budget = Field(default=Budget("10%"), description="tokens of the draft that stay; the authors keep a tenth")
    p: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="share of the scores' sum that is taken by rank; 0: evenly spaced, 1: by rank",
    )
    first: int = Field(
        default=0, description="first layer of the target whose attention counts; -7: the last seven layers"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("target_attention", self.first or None),)

    def select(self, tokens: VisualTokens) -> Keep:
        score = tokens.fact("target_attention", self.first or None).float()
        return choose(self, tokens, lambda rows, k: rows[two_stages(score[rows], k, self.p)])


def two_stages(score: Tensor, k: int, p: float) -> Tensor:
    """[k] positions of score [n], 1 <= k < n: the fewest of the highest that hold the share p of the sum, then others
    evenly spaced."""
    n, order = len(score), top(score, len(score))
    sums = score[order].cumsum(0)
    ranked = 0 if p == 0 else min(k, int((sums < p * sums[-1]).sum()) + 1)
    taken = order[:ranked]
    if ranked == k:
        return taken
    rest, places = rest_of(n, taken), k - ranked
    at = torch.arange(places, device=score.device) * (n - ranked - 1) // max(1, places - 1)
    return torch.cat([taken, rest[at]])
