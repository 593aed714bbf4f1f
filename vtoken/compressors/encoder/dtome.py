"""DToMe: merge all sufficiently similar tokens in the vision encoder, so plain pictures lose more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vtoken.compressors._matching import Merger
from vtoken.compressors._thresholds import Thresholds
from vtoken.stages import OtherModel, Parts, size_of


class DToMe(Merger, Thresholds):
    """As tome, but in each layer every pair merges whose similarity exceeds the layer's threshold (at most half of the
    tokens). The thresholds are specific to a checkpoint and a budget: `vtoken calibrate dtome MODEL --images FOLDER
    --budget low|mid|high`.

    This is the first half of DyMU. Without the second half (`vtu`), which lets the decoder attend as if nothing had
    been merged, its authors measured less than with ToMe (58.2 against 59.2 at some 90 tokens of LLaVA-1.5-7B). The
    index map that it needs is in the trace (`into`). Crops count as pictures of their own. `expected_counts` uses the
    mean counts of the calibration, or assumes that nothing merges if there was none. Waits for the device once per
    layer, for the counts. Not for Qwen (see dtome_post), nor where OneVision interpolates features.

    Paper: https://arxiv.org/abs/2504.17040
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2504.17040"
    deviations: ClassVar[str] = (
        "Every picture is merged as the authors' code merges a single one; in a batch, theirs depends on its "
        "neighbours. Tokens stay in reading order, at the place of the member that absorbed the others. Their cap on "
        "merges per picture (off by default) is left out. Their thresholds are not shipped; ours are running means in "
        "float64, theirs in bfloat16, which stand still after some 256 batches."
    )

    def layers(self, depth: int) -> tuple[int, ...]:
        for name, values in (("thresholds", self.thresholds), ("left", self.left or self.thresholds)):
            if len(values) != depth:
                raise OtherModel(
                    f"{name} are for an encoder of {len(values)} layers, this one has {depth}; calibrate them on this "
                    "checkpoint: vtoken calibrate dtome MODEL"
                )
        return tuple(range(depth))

    def taken(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
        return self.above(value, lengths, at)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return self.expected(lengths, [size_of(image) for image in parts], layer or 0)
