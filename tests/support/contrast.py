"""Videos whose frames differ in contrast, and a stage that chooses by it."""

from __future__ import annotations

from typing import Any, ClassVar

import tiny
import torch
from batches import suited
from probes import above_mean

from vtoken.stages import Compressor, Keep, Site, VisualTokens


class Some(Compressor):
    """Frames site, by contrast: another number of each video. No paper."""

    site: ClassVar[Site] = "frames"

    def select(self, tokens: VisualTokens) -> Keep:
        return above_mean(tokens, tokens.x.var(1))


def rows(family: str) -> list[list[Any]]:
    """Four frames, or pairs of frames, of different sizes where the family allows it."""
    one = tiny.family(family)
    more = [] if one.equal_videos else [("video", 3), 2]
    return suited(family, [[2, ("video", 4), 3], [1, ("video", *one.other_video), 2, "img", 1, *more], [3]])


def batch_of(family: str, model: Any) -> dict[str, Any]:
    """Frames of growing contrast, so that those above the mean are the later ones, and not equally many of all
    videos."""
    batch = tiny.build(model, rows(family), seed=3)
    pixels = batch["pixel_values_videos"]
    pixels *= torch.rand(len(pixels), *(1,) * (pixels.ndim - 1), generator=torch.Generator().manual_seed(1))
    if pixels.ndim == 5:  # one contrast a video until here
        pixels *= torch.tensor([[0.1, 0.2, 3, 4], [0.1, 0.2, 0.3, 9]])[:, :, None, None, None]
    return batch
