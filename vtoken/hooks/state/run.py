"""State of one forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from vtoken.hooks.state.trace import StageTrace, Trace
from vtoken.stages import Parts, size_of, uploaded

KINDS = ("image", "video")  # of visual tokens; Run.kinds counts from 1

UNSEEN = "inputs_embeds came without pixels, so pictures that are merged in them already cannot be found"


@dataclass(frozen=True)
class TokenHistory:
    """What became of every unpruned visual token of a batch of images.

    Attributes:
        full: unpruned tokens per image.
        raster_index: [ΣK] position of each live token in its image's unpruned raster.
        lengths: live tokens per image; None means `full`.
        absorbed_by: [Σfull] position (in its image's raster) of the live token that stands for each unpruned one, -1 =
            dropped; None while nothing was merged.
    """

    full: tuple[int, ...]
    raster_index: Tensor
    lengths: tuple[int, ...] | None = None
    absorbed_by: Tensor | None = None

    def advance(self, keep: Any, image: Tensor) -> TokenHistory:
        """After a Keep. `image` [ΣK] is the image of each live token."""
        raster_index, absorbed_by = keep.index.to(self.raster_index.device), self.absorbed_by
        if len(self.full) > 1 or self.counts != self.full:  # of one whole image, a token's row is its place
            raster_index = self.raster_index[raster_index]
        if keep.into is not None or absorbed_by is not None:
            device = self.raster_index.device
            start = uploaded([0, *accumulate(self.full)][:-1], device)
            arange = torch.arange(len(self.raster_index), device=device)
            if keep.into is None:
                target = torch.full_like(arange, -1)
                target[keep.index.to(device)] = raster_index
            else:
                into = keep.into.to(device)
                target = torch.where(into >= 0, raster_index[into.clamp(min=0)], -1)
            moved = torch.full((sum(self.full),), -1, device=device)
            moved[start[image.to(device)] + self.raster_index] = target
            if absorbed_by is None:
                absorbed_by = moved
            else:
                of = torch.repeat_interleave(uploaded(self.full, device), output_size=sum(self.full))
                absorbed_by = torch.where(absorbed_by >= 0, moved[(start[of] + absorbed_by).clamp(min=0)], -1)
        return TokenHistory(self.full, raster_index, keep.lengths, absorbed_by)

    @property
    def counts(self) -> tuple[int, ...]:
        """Live tokens per image."""
        return self.full if self.lengths is None else self.lengths

    def kept(self) -> list[Tensor]:
        return list(self.raster_index.split(self.counts))

    def size(self) -> Tensor | None:
        """[ΣK] float32, unpruned tokens that each live one stands for; None while nothing was merged."""
        if self.absorbed_by is None:
            return None
        full, live = (uploaded(n, self.absorbed_by.device) for n in (self.full, self.counts))
        start = full.cumsum(0) - full
        slot = start.repeat_interleave(full, output_size=len(self.absorbed_by)) + self.absorbed_by
        counts = torch.zeros_like(slot, dtype=torch.float32).index_add_(
            0, slot.clamp(min=0), (self.absorbed_by >= 0).float()
        )
        return counts[start.repeat_interleave(live, output_size=len(self.raster_index)) + self.raster_index]

    def into(self) -> list[Tensor] | None:
        return None if self.absorbed_by is None else list(self.absorbed_by.split(self.full))


@dataclass(frozen=True)
class ImageLayout:
    """How the language model sees one image or video. Tensors lie on the CPU.

    Attributes:
        parts: its rasters, as in VisualTokens.
        segment: [N] as in VisualTokens, None for a single frame or crop.
        newline: [N + newlines] bool, which of its placeholders are newline tokens; None without any.
        closed_by: [N] index of the newline that closes each token's row, -1 for none; given when `newline` is.
        resized: tokens were interpolated after the tower, so that none is one tower position.
    """

    parts: Parts
    segment: Tensor | None = None
    newline: Tensor | None = None
    closed_by: Tensor | None = None
    resized: bool = False

    @property
    def tokens(self) -> int:
        """Visual tokens, newlines not counted."""
        return size_of(self.parts)

    @property
    def length(self) -> int:
        """Placeholders in the prompt."""
        return self.tokens if self.newline is None else len(self.newline)


def newline_mask(layouts: Sequence[ImageLayout]) -> Tensor:
    """[Σlength] bool: which placeholders of these images are newline tokens."""
    return torch.cat([torch.zeros(i.tokens, dtype=torch.bool) if i.newline is None else i.newline for i in layouts])


def tokens_of(layouts: Sequence[ImageLayout], device: torch.device) -> Tensor:
    """[ΣN] which placeholders of these images are visual tokens, as indices on the device, which is not waited for."""
    return (~newline_mask(layouts)).nonzero()[:, 0].to(device, non_blocking=True)


def segments(layouts: Sequence[ImageLayout]) -> Tensor | None:
    """[ΣN] segment of every token of these images; None when every one is a single segment."""
    if all(layout.segment is None for layout in layouts):
        return None
    return torch.cat([torch.zeros(i.tokens, dtype=torch.long) if i.segment is None else i.segment for i in layouts])


@dataclass(frozen=True)
class SkipPlan:
    """Which images of a call of the feature function stages of the encoder leave alone; `skip_reason` says why if they
    do nothing at all, `counted` as in Trace."""

    images: tuple[bool, ...]
    skip_reason: str | None = None
    counted: str = "rows"


@dataclass(frozen=True)
class FeatureCall:
    """One call of the model's feature function.

    Attributes:
        kind: "image" or "video".
        arguments: what it was called with, by name.
        layouts: of each image or video, in order.
        skip_plan: None where nothing is skipped.
    """

    kind: str
    arguments: dict[str, Any]
    layouts: tuple[ImageLayout, ...]
    skip_plan: SkipPlan | None = None

    def skipped(self, each: Sequence[int]) -> tuple[bool, ...]:
        """Of the parts of the images, so many each; empty where nothing is skipped."""
        if self.skip_plan is None or not any(self.skip_plan.images):
            return ()
        return tuple(s for s, n in zip(self.skip_plan.images, each, strict=True) for _ in range(n))

    @property
    def counted(self) -> str | None:
        """As in Trace."""
        return None if self.skip_plan is None else self.skip_plan.counted

    @property
    def skip_reason(self) -> str | None:
        """Why stages of the encoder do nothing, or None."""
        return None if self.skip_plan is None else self.skip_plan.skip_reason


@dataclass
class Encoded:
    """What the vision encoder of one call produced, until the language-model boundary consumes it.

    Attributes:
        layouts: of each image, in the order the model packs them.
        facts: Fact -> [ΣN, ...] aligned with the packed, unpruned visual tokens (0 where dropped).
        alive: [ΣN] which of them the vision tower left; None where all are. Values tell nothing: a model may overflow.
        deep: the same for what DeepStack taps from the tower, tap by tap.
        fingerprint: [ΣN] first channel of the projected features: proof that what reaches the LLM is what was scored.
        stages: trace entries of encoder-site stages.
        absorbed_by: [ΣN] as in TokenHistory, when an encoder stage merged.
        counted: as in Trace.
        untold: an encoder stage merged, but the model interpolated its output, so that no token stands for certain
            others.
    """

    layouts: tuple[ImageLayout, ...]
    facts: dict[Any, Tensor]
    fingerprint: Tensor
    stages: list[StageTrace]
    absorbed_by: Tensor | None = None
    untold: bool = False
    alive: Tensor | None = None
    deep: tuple[Tensor | None, ...] = ()
    counted: str | None = None


class Run(threading.local):
    """State of one forward, one per thread: two threads may call one model.

    Attributes:
        kinds: [B, L] which kind of visual token a position holds: 0 none, 1 image, 2 video.
        unseen: it was given embeddings alone, which may hold pictures.
        labels, tail: of the outermost call, see Prefill.
        call, tower: the feature call and the tower call in progress.
        skip_plan: kind -> which images of the prompt to come are left alone.
        due: a cache layer whose newest tokens a cache stage is asked about after the attention in progress.
        encodes: kind -> what was encoded last; earlier: the same before the call in progress.
        generating: `generate` is at work, which may encode long before it uses the features, and use them several
            times.
    """

    kinds: Tensor | None = None
    unseen: bool = False
    labels: Tensor | None = None
    tail: int = 0
    call: FeatureCall | None = None
    tower: Any = None
    flow: Any = None
    trace: Trace | None = None
    due: Any = None
    generating: bool = False

    def __init__(self) -> None:
        self.encodes: dict[str, Encoded] = {}
        self.earlier: dict[str, Encoded] = {}
        self.skip_plans: dict[str, SkipPlan] = {}

    def begin(self) -> None:
        """A `generate`, or a forward outside of one, begins."""
        if not self.generating:
            self.earlier = dict(self.encodes)

    def forget(self) -> None:
        """What was encoded and found out for a `generate`, or a forward outside of one, that is over. Features that
        were encoded before it may be used again."""
        if not self.generating:
            self.encodes = {kind: e for kind, e in self.encodes.items() if self.earlier.get(kind) is e}
            self.earlier, self.skip_plans = {}, {}

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a wrapped model cannot be copied or pickled; call vtoken.unwrap(model) first (save_pretrained works as "
            "it is)"
        )


class Clock:
    """Moments on a device's own clock, taken without waiting for it: only who asks how far apart they are waits.

    As a context it takes the moments around a block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """For everything the device was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds."""
        if self.device.type != "cuda":
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)

    def __enter__(self) -> Clock:
        self.start = self.now()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end = self.now()

    def milliseconds(self) -> float:
        """Of the block."""
        return self.between(self.start, self.end)
