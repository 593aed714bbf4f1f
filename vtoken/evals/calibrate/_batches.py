"""DToMe's calibration: the most similar pairs of a whole batch merge, and the similarity of the first pair that does
not is the batch's threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.stages import Stage

SHARES = {"low": 7 / 8, "mid": 2 / 3, "high": 1 / 3}  # of the tokens merge: 504, 384 and 192 of CLIP-L's 576
NEVER = 2.0  # no cosine exceeds it
SCHEDULES = ("constant", "linear", "reverse_linear")


def schedule(kind: str, total: int, depth: int) -> tuple[int, ...]:
    """Merges per layer. Linear schedules fall from 2 total / depth towards 0, in whole numbers that stop at `total`;
    where those do not add up to it the rest is left out."""
    if kind == "constant":
        return tuple(total // depth + (layer < total % depth) for layer in range(depth))
    first, left, out = 2 * total // depth, total, []
    for layer in range(depth):
        out.append(min(left, int(first - layer * first / depth)))
        left -= out[-1]
    return tuple(out if kind == "linear" else out[::-1])


@dataclass
class Learned:
    """Running means over batches, in float64.

    Attributes:
        merges: per layer or round, for pictures of `nominal` tokens; other pictures merge in proportion.
        thresholds, left: per layer or round, means over `batches`; NaN where nothing was to merge, or was never asked.
        full: tokens of the current batch before anything merged.
    """

    merges: tuple[int, ...]
    nominal: int
    thresholds: Tensor = field(init=False)
    left: Tensor = field(init=False)
    batches: int = 0
    full: int = 0

    def __post_init__(self) -> None:
        self.thresholds, self.left = (torch.full((len(self.merges),), torch.nan, dtype=torch.float64) for _ in range(2))

    def cut(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
        """Merges of every sequence, the most similar pairs of the whole batch; arguments as of `Merger.taken`."""
        self.full = sum(lengths) if at == 0 else self.full
        nth = value.argsort(dim=1, descending=True, stable=True).argsort(1)
        half = torch.tensor([n // 2 for n in lengths], device=value.device)
        edges = value.masked_fill(nth >= half[:, None], -torch.inf).flatten().double()
        best = edges.sort(descending=True, stable=True)
        real = int((edges > -torch.inf).sum())
        total = min(real, round(self.merges[at] * self.full / self.nominal))
        owner = best.indices[:total] // max(1, value.shape[1])
        taken: tuple[int, ...] = tuple(torch.bincount(owner, minlength=len(lengths)).tolist())
        if self.merges[at] and real:
            self._note(self.thresholds, at, max(0.0, best.values[min(total, real - 1)].item()))
        self._note(self.left, at, (sum(lengths) - sum(taken)) / self.full)
        return taken

    def _note(self, means: Tensor, at: int, value: float) -> None:
        mean = means[at].item()
        means[at] = value if mean != mean else (mean * self.batches + value) / (self.batches + 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a stage reads: thresholds that nothing exceeds where nothing merges, and the share of tokens left after
        each layer."""
        left, last = self.left.clone(), 1.0
        for at, share in enumerate(left.tolist()):
            last = left[at] = last if share != share else share
        return {"thresholds": self.thresholds.nan_to_num(nan=NEVER), "left": left}


def learner(cls: Any, learned: Learned) -> Stage:
    """The stage `cls`, which merges by batches instead of thresholds. As in the authors' calibration, every match
    inside a tower reorders the tokens of all pictures of the batch; at inference a picture that loses none keeps its
    order."""

    class Learner(cls):
        anew: ClassVar[bool] = True

        def taken(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
            return learned.cut(value, lengths, at)

    stage: Stage = Learner(thresholds=(0.0,) * len(learned.merges))
    return stage
