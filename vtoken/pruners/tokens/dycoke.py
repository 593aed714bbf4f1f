"""DyCoke, its prefill half: of every four frames one whole, and of the others what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners.tokens._video import by_place, is_video
from vtoken.stages import Keep, Parts, Site, Stage, VisualTokens, image_of, keep_all, offsets_of, uploaded

NEW = 3.0  # above any dissimilarity


class DyCoke(Stage):
    """Of every four frames of a video the first stays whole. The second is compared with the first, the third with the
    first, and the fourth with the third, place by place by cosine; of each, the share `left` (rounded down, at least
    one token) that is least similar stays. A token without a counterpart, because an earlier stage dropped it, counts
    as least similar. With 0.3, 47.5 % of a long video stays.

    This is temporal token merging, the prefill half of the method (which drops, and merges nothing); its other half
    chooses among cached keys at every generated token and is left out. Pictures and one-frame videos are left unpruned.
    A frame is what the model treats as one: Qwen merges two into one.

    `as_released: true` does what the authors' code does: the second and fourth frames are ranked by the similarities of
    the pair before (the first pair by those of the last), the third frame of the last group stays whole, and the last
    of an odd number of frames is dropped.

    Paper: https://arxiv.org/abs/2411.15024. Deterministic, training-free.
    """

    site: ClassVar[Site] = "tokens"
    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    videos_only: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.15024"
    deviations: ClassVar[str] = (
        "Each pair is ranked by its own similarities, the last group is treated like the others, and the last of an "
        "odd number of frames is not lost (as_released: true for the authors' behaviour). Reading order; theirs is by "
        "similarity. Cosines are float32. No choice of cached keys while generating."
    )

    left: float = Field(default=0.3, gt=0, lt=1, description="share of a reduced frame's tokens that stays (1 - K)")
    as_released: bool = Field(default=False, description="pairs, last group and odd frame as in the authors' code")

    def reference(self, frames: int) -> list[int]:
        """The frame that each frame is compared with, itself for one that stays whole, -1 for one that is lost."""
        found = [f - 1 if f % 2 else f - 2 if f % 4 == 2 else f for f in range(frames)]
        if self.as_released:
            found = [f if f % 4 == 2 and f > frames - 3 else of for f, of in enumerate(found)]
            found[frames - frames % 2 :] = [-1] * (frames % 2)
        return found

    def select(self, tokens: VisualTokens) -> Keep:
        index, start = [], 0
        for image, n in enumerate(tokens.lengths):
            here = torch.arange(start, start + n, device=tokens.x.device)
            if n and is_video(tokens.parts[image]):
                here = here[self._video(tokens, image)]
            index.append(here)
            start += n
        lengths = tuple(map(len, index))
        return keep_all(tokens) if lengths == tokens.lengths else Keep(torch.cat(index), lengths)

    def _video(self, tokens: VisualTokens, image: int) -> Tensor:
        """Rows of a video that stay, ascending."""
        table, row, place, lengths = by_place(tokens, image)
        of = self.reference(len(lengths))
        other = uploaded(of, table.device)
        change = 1 - torch.cosine_similarity(table, table[other], dim=2)
        change = torch.where((row >= 0) & (row[other] >= 0), change, NEW)
        if self.as_released:
            change[1::2] = change[1::2].roll(1, 0)
        stay = [n if of[f] == f else 0 if of[f] < 0 else max(1, int(self.left * n)) for f, n in enumerate(lengths)]
        stay = [min(n, k) for n, k in zip(lengths, stay, strict=True)]
        frame = image_of(lengths, place.device)
        return topk_tokens(change[frame, place], offsets_of(lengths, place.device), stay)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        counts = list(lengths)
        for i, image in enumerate(parts):
            if is_video(image):
                of = self.reference(image[0][0])
                n = lengths[i] // len(of)
                left = max(1, int(self.left * n))
                whole = sum(f == g for f, g in enumerate(of))
                counts[i] = min(lengths[i], whole * n + (len(of) - whole - of.count(-1)) * left)
        return tuple(counts)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return whole

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Counts every image as a video, because lengths do not tell them apart."""
        return 6 * sum(lengths) * width
