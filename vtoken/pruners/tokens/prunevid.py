"""PruneVid, its part before the LLM: still places of a scene stand once, and what is alike in a frame is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from vtoken.kernels import merge_tokens
from vtoken.pruners._dpc import density_peaks
from vtoken.pruners.tokens._video import Folded, by_place, fold_videos, is_video
from vtoken.pruners.tokens._windows import grouped, scenes
from vtoken.stages import Keep, Parts, Site, Stage, VisualTokens, image_of, uploaded

NEIGHBOURS = 7  # nearest rows that the density of a row is measured by
FEW = 14  # groups of at most this many members are not merged


class PruneVid(Stage):
    """The frames of a video are clustered by the density peaks (7 neighbours) of their mean tokens, with the share
    `scenes` as centres. Of each cluster only the longest run of frames remains (none if that is a single frame), and
    the frames in between go to the longer neighbouring run, the left one if both are as long. In such a window of
    frames, a place whose mean cosine over all pairs of frames is above `similarity` is still: its tokens are averaged
    and stand once, in the window's first frame. If they are more than 14, the still places of a window, and likewise
    the other tokens of a frame, are clustered by density peaks, with the share `left` as centres; each cluster becomes
    its mean at the place of its centre.

    How many tokens stay depends on the video; `expected_counts` assumes that nothing is still. Pictures and one-frame
    videos are left unpruned. Waits for the device twice per video, and finds the windows on the host.

    Paper: https://arxiv.org/abs/2412.16117. Training-free. The part inside the LLM, which keeps 40 % by attention of
    the question in layer 10 and takes the rest out of the cache of all layers before, is left out.
    """

    site: ClassVar[Site] = "tokens"
    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    videos_only: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.16117"
    deviations: ClassVar[str] = (
        "Merged tokens stand at the place of their centre, in reading order; theirs stand by rank, still ones first. "
        "Videos of fewer than 7 frames, which theirs cannot take, have at least one cluster and fewer neighbours. No "
        "random numbers among equal densities. Similarities are float32. The part inside the LLM is left out."
    )

    similarity: float = Field(default=0.8, ge=-1, le=1, description="mean cosine above which a place is still")
    left: float = Field(default=0.5, gt=0, le=1, description="clusters per member of a group (cluster_ratio)")
    scenes: float = Field(
        default=0.25, gt=0, le=1, description="clusters per frame of a video (temporal_segment_ratio)"
    )

    def select(self, tokens: VisualTokens) -> Keep:
        def fold(image: int, rows: slice) -> Folded:
            table, row, place, lengths = by_place(tokens, image)
            x, frame = tokens.x[rows], image_of(lengths, place.device)
            real = [f for f, n in enumerate(lengths) if n]
            means = merge_tokens(x.float(), frame, len(lengths))[uploaded(real, x.device)]
            count = max(1, int(len(real) * self.scenes))
            found: list[int] = density_peaks(means, [len(real)], [count], NEIGHBOURS, limited=False).tolist()
            # Frames without tokens take the scene of the frame before.
            labels = [found[max(0, sum(n > 0 for n in lengths[: f + 1]) - 1)] for f in range(len(lengths))]
            windows = scenes(labels)
            window = image_of([b - a + 1 for a, b in windows], place.device)
            unit = normalize(table, dim=2)
            both = unit.new_zeros(len(windows), *unit.shape[1:]).index_add_(0, window, unit).square().sum(2)
            frames = uploaded([b - a + 1 for a, b in windows], place.device)[:, None]
            live = torch.zeros_like(row[: len(windows)]).index_add_(0, window, (row >= 0).long()) == frames
            still = live & (frames > 1) & ((both - frames) / (frames * (frames - 1)).clamp(min=1) > self.similarity)
            order, slot, sizes, values, members = grouped(x, row, place, lengths, windows, still)
            counts = [self._clusters(size) for size in sizes]
            home = density_peaks(values, sizes, counts, NEIGHBOURS, limited=False)
            merged_away = home != torch.arange(len(home), device=home.device)
            kept = order[merged_away.sort(stable=True).indices[: sum(counts)]]
            return Folded(kept, order[home][slot], (1 / members)[slot])

        return fold_videos(tokens, fold)

    def _clusters(self, size: int) -> int:
        return size if size <= FEW else max(1, int(size * self.left))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        counts = list(lengths)
        for i, image in enumerate(parts):
            if is_video(image):
                counts[i] = min(lengths[i], image[0][0] * self._clusters(lengths[i] // image[0][0]))
        return tuple(counts)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return False

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Distances within frames of 196 tokens, and the similarities of places; every image counted as a video."""
        return sum((2 * n * min(n, 196) + 4 * n) * width for n in lengths)
