"""PixelPrune: drop what a simple predictor can tell from the neighbours, before the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.pruners.pixels._prediction import unpredicted
from vtoken.stages import Keep, Parts, Site, Stage, VisualTokens, keep_all, uploaded


class PixelPrune(Stage):
    """Goes over the tokens of a picture in reading order and predicts the pixels of each, as lossless image coders
    (LOCO-I) do: from its left neighbour, or from the upper one where the upper left is like the left and unlike the
    upper (a vertical edge); in the first row from the left, in the first column from the upper one. A token stays if it
    is not like its prediction. Two are alike if their distance is at most `threshold`; with 0 the picture can be
    rebuilt exactly from the tokens that stay. Above 0, a neighbour that was dropped predicts with the pixels that would
    be rebuilt for it (those of a kept token), so that errors do not add up.

    Pages, slides and screenshots lose most of their tokens, photographs none: see `max_kept`. Videos keep all. Tokens
    that stay keep their positions, in the tower and in the prompt. How many they are depends on the picture; the plan
    assumes the share `left`. Waits for the device once per call.

    Paper: https://arxiv.org/abs/2604.00886.
    """

    site: ClassVar[Site] = "pixels"
    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2604.00886"
    deviations: ClassVar[str] = (
        "Pixels are compared as the tower is given them, in its dtype; differences are brought to the scale from 0 to "
        "1 by `std`. The authors undo a mean and std of 0.5 for every model, and have no `max_kept`. Where `threshold` "
        "is above 0 they go token by token; here all tokens of an anti-diagonal are decided at once, with the same "
        "result. Only their default method is here (pred_2d, before the first layer)."
    )

    threshold: float = Field(
        default=0.0, ge=0, le=1, description="distance, of pixels from 0 to 1, up to which two tokens are alike"
    )
    metric: Literal["max", "mae", "rmse"] = Field(
        default="max", description="distance: the largest difference of pixels, their mean (mae), or rmse"
    )
    std: tuple[float, ...] | None = Field(
        default=None, description="image_std of the processor, a number per channel; needed with a threshold above 0"
    )
    max_kept: float = Field(
        default=1.0, gt=0, le=1, description="pictures of which a larger share would stay keep all their tokens"
    )
    left: float = Field(
        default=1.0, gt=0, le=1, description="share of the tokens expected to stay, for the FLOPs account"
    )

    @model_validator(mode="after")
    def _scaled(self) -> PixelPrune:
        if self.threshold and self.std is None:
            raise ValueError(
                f"threshold: {self.threshold} is about pixels from 0 to 1, and the tower's are normalised; add std, "
                "the image_std of the processor (preprocessor_config.json), as in std: [0.5, 0.5, 0.5]"
            )
        if self.std is not None and not (self.std and min(self.std) > 0):
            raise ValueError(f"std: {list(self.std)} must be numbers above 0, one per channel")
        return self

    def select(self, tokens: VisualTokens) -> Keep:
        x, device = self._on_scale(tokens.x.float()), tokens.x.device
        masks = []
        for i, values in enumerate(x.split(tokens.lengths)):
            if not tokens.whole(i):  # a picture that has lost tokens cannot be predicted
                masks.append(torch.ones(len(values), dtype=torch.bool, device=device))
                continue
            for grid, part in zip(tokens.parts[i], values.split([*map(prod, tokens.parts[i])]), strict=True):
                frames = part.unflatten(0, grid)
                masks += [unpredicted(frame, self.threshold, self.metric).flatten() for frame in frames]
        stay = torch.cat(masks)
        ends = uploaded([0, *accumulate(tokens.lengths)], device)
        counts = torch.nn.functional.pad(stay.cumsum(0), (1, 0))[ends].diff().tolist()
        if all(k > self.max_kept * n or k == n for k, n in zip(counts, tokens.lengths, strict=True)):
            return keep_all(tokens)
        keep = Keep(torch.argsort(~stay, stable=True)[: sum(counts)], tuple(counts))
        many = [k > self.max_kept * n for k, n in zip(counts, tokens.lengths, strict=True)]
        return keep.skipping(tokens.lengths, many) if any(many) else keep

    def _on_scale(self, x: Tensor) -> Tensor:
        """[ΣN, P] with differences in the unit of `threshold`."""
        if not self.threshold or self.std is None:
            return x
        if x.shape[1] % len(self.std):
            raise ValueError(
                f"std has {len(self.std)} numbers, which cannot be those of {x.shape[1]} values in channels"
            )
        return (x.unflatten(1, (len(self.std), -1)) * x.new_tensor(self.std)[:, None]).flatten(1)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return tuple(
            n if image[0][0] > 1 else min(n, max(len(image), round(n * self.left)))
            for n, image in zip(lengths, parts, strict=True)
        )

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return False
