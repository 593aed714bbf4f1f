"""Relevant frames: a fixed number of frames, chosen by given scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.pruners.frames import _relevance
from vtoken.pruners.frames._frames import FramePruner
from vtoken.stages import NAMES_FILE, Keep, VisualTokens, keep_all, uploaded

Given = tuple[float, ...] | tuple[tuple[float, ...], ...]


class FramesRelevant(FramePruner):
    """Keeps the frames that bear on the question, by scores that you give: from a model that compares pictures with
    text, from a detector, or from the VLM itself (`vtoken.frame_relevance`). The vision tower runs on the frames that
    stay.

    If the list of scores is longer or shorter than the video, it is spread evenly over the video's time, so that one
    score per second fits any number of frames that the processor takes. Rules: `top` keeps the highest scores; `aks`
    halves the video, and again, until the best frames of a part stand out, so that all parts give frames where none do;
    `anchors` takes the peaks between valleys; `drawn` draws in proportion to the scores, the same for the same seed.

    `anchors` comes from F2C (https://arxiv.org/abs/2510.02262), `drawn` from T* (https://arxiv.org/abs/2504.02259), and
    `aks` from AKS. Paper: https://arxiv.org/abs/2502.21271
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.21271"
    deviations: ClassVar[str] = (
        "All rules keep exactly `keep` frames; what rounding or a short stretch leaves over goes to the best of the "
        "other frames (AKS keeps fewer). Of F2C only the anchors: its clips mix resolutions within a video, which no "
        "processor does. Of T* only the final draw, seeded: its search asks a detector."
    )

    relevance: Given | str = Field(
        description=(
            "one number per frame, for every video; or a list of numbers for each video of a call, in order, or a JSON "
            "file with either"
        ),
        json_schema_extra=NAMES_FILE,
    )
    rule: Literal["top", "aks", "anchors", "drawn"] = Field(default="aks", description="how frames follow from scores")
    threshold: float = Field(
        default=0.8, ge=0, description="aks: how far the best frames of a stretch stand out (scores scaled to 0..1)"
    )
    depth: int = Field(default=5, ge=0, description="aks: how often a stretch is halved at most")
    seed: int = Field(default=0, ge=0, description="drawn: seed of the draw")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        low = min(map(min, self.scores))
        if self.rule == "drawn" and low < 0:
            raise ValueError("rule drawn draws in proportion to scores, which must not be negative; shift them")
        return self

    @cached_property
    def scores(self) -> tuple[_relevance.Scores, ...]:
        """Scores per video, or one tuple for all. A file is read once: later changes do not reach a wrapped model."""
        if isinstance(self.relevance, str):
            return _relevance.read(self.relevance)
        return _relevance.checked(self.relevance, "relevance")

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        videos = sum(n > 1 for n in tokens.lengths)
        if len(self.scores) not in (1, videos):
            raise ValueError(
                f"frames_relevant was given scores of {len(self.scores)} videos and meets {videos}; give one list, or "
                "as many as the call has videos"
            )
        given = iter(self.scores if len(self.scores) > 1 else self.scores * videos)
        kept, start = [], 0
        for n, k in zip(tokens.lengths, counts, strict=True):
            own = self.chosen(spread(next(given), n), k) if k < n else list(range(n))
            kept += [start + frame for frame in own]
            start += n
        return Keep(uploaded(kept, tokens.x.device), counts)

    def chosen(self, scores: Tensor, k: int) -> list[int]:
        if self.rule == "aks":
            return _relevance.aks(scores, k, self.threshold, self.depth)
        if self.rule == "drawn":
            return _relevance.drawn(scores, k, self.seed)
        return (_relevance.top if self.rule == "top" else _relevance.anchors)(scores, k)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True


def spread(scores: Sequence[float], frames: int) -> Tensor:
    """[frames] float64: if each frame has the same number of scores (Qwen: one per frame of a pair), their mean; if
    not, the score at the middle of each frame's part of the video's time."""
    given = torch.tensor(scores, dtype=torch.float64)
    if len(given) % frames == 0:
        return given.view(frames, -1).mean(1)
    return given[(2 * torch.arange(frames) + 1) * len(given) // (2 * frames)]
