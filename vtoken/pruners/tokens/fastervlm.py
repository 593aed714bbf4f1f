"""FasterVLM: keep the patches that the vision encoder's CLS token attends to."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vtoken.stages import Fact, Pruner, VisualTokens


class FasterVLM(Pruner):
    """Scores each visual token by the CLS query's attention to it (softmax over all keys including CLS, averaged over
    heads, not renormalised) in the encoder layer whose output the model uses as features; keeps the `keep` highest.

    Paper: https://arxiv.org/abs/2412.01818. Deterministic, training-free, no other option.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    deviations: ClassVar[str] = (
        "Scores are float32 where the authors cast them to the image dtype (fp16 ties). "
        "Positions follow the pipeline's policy; the authors renumber them (positions: compact)."
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("cls_attention")
