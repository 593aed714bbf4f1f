"""FlowCut: prune inside the vision encoder, layer by layer, by how much information flows from each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, field_validator
from torch import Tensor

from vtoken.kernels import flow_scores, topk_tokens
from vtoken.pruners.encoder._flowcut import cumulated, losses, targets
from vtoken.stages import Fact, Keep, Parts, Pruner, Site, VisualTokens, keep_all, offsets_of
from vtoken.stages.budget import Budget


class FlowCut(Pruner):
    """After an encoder layer, scores each patch by (attention / its sum + relevance / its sum) * density. Attention is
    that of the CLS query, averaged over heads. Relevance is the softmax of the dot products of the CLS token's value
    with all values, averaged over heads. Density is the L1 norm of the patch's head-mean value. Scores are accumulated
    over layers, half from the past and half from the new layer. After every second layer, the patches with the lowest
    scores are dropped: of n, round((n - keep) / sqrt(layers to come) * (1 - h^2)), where h is the entropy of the
    attention divided by log n; after the last such layer, all but `keep`. Later layers run on the patches that are
    left.

    Without CLS (SigLIP, Qwen), the mean query and the mean value of the image replace it; on Qwen, whole merge groups
    are dropped, and those that stay keep their positions. If pictures are cut into crops, `keep` counts per crop; a
    share is of the unpruned tokens. Where features are interpolated after the encoder (OneVision's videos and large
    pictures), a token stays only if all its sources do: few may be left, or none. How many patches are dropped early
    depends on the picture: `expected_counts` counts only the last cut, so its FLOPs are an upper bound. The authors'
    second cut on LLaVA-NeXT, after decoder layer 1, is the stage `flowcut_late`.

    Paper: https://arxiv.org/abs/2505.19536.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.19536"
    deviations: ClassVar[str] = (
        "Every picture (crop) loses what its own attention allows; the authors apply the largest loss of a batch to "
        "all of it (reference_quirks). Float32 and 0 log 0 = 0, where the authors' entropy can be NaN in fp16. Qwen: "
        "the authors score and drop single patches, give the survivors the first positions of the picture, leave "
        "relevance out (relevance: false) and make the last cut after the last block; here merge groups are dropped by "
        "the means of their patches' attention, relevance and value, positions stay true, and the last cut comes two "
        "blocks earlier. The authors released no SigLIP variant."
    )
    site: ClassVar[Site] = "encoder"

    at: tuple[int, ...] | None = Field(None, min_length=1, description="layers it reads; null: all but the last two")
    relevance: bool = Field(default=True, description="count the relevance to the CLS value (authors on Qwen: no)")
    momentum: float = Field(default=0.5, ge=0, lt=1, description="share of the past in the accumulated score")
    reference_quirks: bool = Field(default=False, description="all pictures of a batch lose as many as any of them")

    @field_validator("keep")
    @classmethod
    def _no_total(cls, keep: Budget) -> Budget:
        if keep.total is not None:
            raise ValueError(
                "keep: {total: n} cannot be shared out inside the vision encoder, which does not know what belongs to "
                "one prompt; write a count (64), a share (25%) or {per_crop: 64}"
            )
        return keep

    def needs(self) -> tuple[Fact, ...]:
        facts = (Fact("global_attention"), Fact("mean_value"))
        return (*facts, Fact("value_attention")) if self.relevance else facts

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth - 2)) if self.at is None else self.at

    def for_depth(self, depth: int) -> Self:
        """The stage adapted to an encoder of `depth` layers; `select` and `expected_counts` need to know which layer is
        the last."""
        return self.model_copy(update={"at": self.layers(depth)})

    def select(self, tokens: VisualTokens) -> Keep:
        """No loop over images; waits for the device once, for the counts of a cut."""
        order, sizes, target = self._units(tokens)
        if sizes == target:
            return keep_all(tokens)

        def in_units(values: Tensor) -> Tensor:
            return values if order is None else values[order]

        attention, value = (in_units(tokens.fact(name)).float() for name in ("global_attention", "mean_value"))
        relevance = in_units(tokens.fact("value_attention")).float() if self.relevance else None
        flow = flow_scores(attention, relevance, value, offsets_of(sizes, value.device))
        scores = cumulated(tokens, flow if order is None else flow[order.argsort()], self.momentum)
        ahead = self._ahead(tokens.layer)
        if ahead % 2:
            return keep_all(tokens)
        counts = target
        if ahead:
            loss = losses(attention, sizes, target, ahead)
            if self.reference_quirks:
                loss = [max(loss)] * len(loss)
            counts = tuple(max(n - r, k) for n, r, k in zip(sizes, loss, target, strict=True))
            if counts == sizes:
                return keep_all(tokens)
        index = topk_tokens(in_units(scores.values), offsets_of(sizes, value.device), counts)
        each = len(sizes) // len(tokens.lengths)
        lengths = tuple(sum(counts[i : i + each]) for i in range(0, len(counts), each))
        scores.keep = Keep(index if order is None else order[index].sort().values, lengths)
        return scores.keep

    def _units(self, tokens: VisualTokens) -> tuple[Tensor | None, tuple[int, ...], tuple[int, ...]]:
        """Order [ΣN] that sorts the tokens by unit (image, crop or frame), None if they are in that order already;
        tokens per unit; tokens to keep per unit."""
        if self.keep.per is not None and tokens.segment is not None:
            return self.per_segment(tokens)[:3]
        return None, tokens.lengths, targets(self.keep, tokens.lengths, tokens.parts)

    def _ahead(self, layer: int | None) -> int:
        """Layers from this one to the last cut; 0 outside a model."""
        if layer is None:
            return 0
        if self.at is None:
            raise ValueError("flowcut does not know how deep the encoder is; use what its for_depth(depth) returns")
        return max(self.at) - layer

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """What the last cut leaves; before it, all tokens, the most that can be left."""
        if self._ahead(layer):
            return tuple(lengths)
        return super().expected_counts(lengths, parts, row) if self.keep.per else targets(self.keep, lengths, parts)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return not self._ahead(layer) and super().counts_are_exact(layer, whole)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Head mean and norm of the values."""
        return sum(lengths) * width
