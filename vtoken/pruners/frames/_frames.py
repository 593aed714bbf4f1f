"""Shared by stages of site frames: a budget of frames, and the similarity of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vtoken.stages import Pruner, Site
from vtoken.stages.budget import Budget


class FramePruner(Pruner):
    """Keeps a given number of frames of every video, before the vision tower runs. In Qwen models, a frame is the pair
    of frames that the tower embeds together."""

    site: ClassVar[Site] = "frames"
    videos_only: ClassVar[bool] = True

    keep: Budget = Field(
        description="frames to keep of each video (of Qwen models pairs of frames): a count (8) or a share (25%)"
    )

    @field_validator("keep")
    @classmethod
    def _frames(cls, keep: Budget) -> Budget:
        return keep.of_each("frames per video (8)")


def unit(x: Tensor) -> Tensor:
    """[F, D] rows scaled to length 1, in float32."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def products(lengths: Sequence[int], kept: Sequence[int], width: int) -> int:
    """FLOPs of comparing every frame of a video with each kept frame."""
    return sum(2 * n * k * width for n, k in zip(lengths, kept, strict=True))
