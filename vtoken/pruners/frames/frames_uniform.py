"""Uniform frames: evenly spaced in time, the baseline that every choice of frames has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch

from vtoken.pruners.frames._frames import FramePruner
from vtoken.pruners.tokens.uniform import centres
from vtoken.stages import Keep, VisualTokens, keep_all, offsets_of, uploaded


class FramesUniform(FramePruner):
    """Keeps the frame at the centre of each of `keep` equal spans of the video, before the vision tower runs, so the
    tower's cost falls too.

    No paper: a baseline.
    """

    paper: ClassVar[str] = "no paper"

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        starts = offsets_of(tokens.lengths, torch.device("cpu")).tolist()
        spans = zip(starts, tokens.lengths, counts, strict=False)
        kept = [start + at for start, n, k in spans for at in centres(n, k)]
        return Keep(uploaded(kept, tokens.x.device), counts)
