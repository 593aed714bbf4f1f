"""Changed frames: a frame stays when it differs enough from the last one that stayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from vtoken.pruners.frames._frames import products, unit
from vtoken.stages import Keep, Parts, Site, Stage, VisualTokens, keep_all, uploaded


class FramesChanged(Stage):
    """Goes through a video from its first frame, which stays. Each later frame stays if its cosine similarity to the
    last kept frame is below `similarity`. Frames are compared by the pixels of their thumbnails, before the vision
    tower runs. Only one frame of a still video stays, and all frames of one that changes all the time: add
    frames_uniform or frames_farthest after it for an upper bound.

    How many stay depends on the video; the plan assumes the share `left`. Waits for the device once per call. In Qwen
    models, a frame is the pair of frames that the tower embeds together.

    No paper: a baseline.
    """

    site: ClassVar[Site] = "frames"
    videos_only: ClassVar[bool] = True
    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    paper: ClassVar[str] = "no paper"

    similarity: float = Field(
        default=0.95,
        ge=-1,
        le=1,
        description="cosine similarity of two frames at or above which the later one is dropped; a guess",
    )
    left: float = Field(
        default=1.0, gt=0, le=1, description="share of the frames expected to stay, for the FLOPs account"
    )

    def select(self, tokens: VisualTokens) -> Keep:
        kept: list[int] = []
        counts: list[int] = []
        alike = [(x @ x.T).cpu() for x in unit(tokens.x).split(tokens.lengths)]
        start = 0
        for products_of, n in zip(alike, tokens.lengths, strict=True):
            stay = [0]
            for frame in range(1, n):
                if products_of[frame, stay[-1]] < self.similarity:
                    stay.append(frame)
            kept += [start + frame for frame in stay]
            counts.append(len(stay))
            start += n
        if counts == list(tokens.lengths):
            return keep_all(tokens)
        return Keep(uploaded(kept, tokens.x.device), tuple(counts))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return tuple(min(n, max(1, round(n * self.left))) for n in lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return False

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return products(lengths, lengths, width)
