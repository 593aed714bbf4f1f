"""Uniform frames: evenly spaced in time, the baseline that every choice of frames has to beat."""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

from vtoken.pruners.frames._frames import FramePruner
from vtoken.pruners.tokens.uniform import centres
from vtoken.stages import Keep, VisualTokens, keep_all, uploaded


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
        spans = zip(accumulate(tokens.lengths, initial=0), tokens.lengths, counts, strict=False)
        kept = [start + at for start, n, k in spans for at in centres(n, k)]
        return Keep(uploaded(kept, tokens.x.device), counts)
