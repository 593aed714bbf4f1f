"""State of one forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor

from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace, Trace
from vtoken.stages import Parts, size_of

KINDS = ("image", "video")  # of visual tokens; Run.kinds counts from 1
# Names of the arguments of models.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}

UNSEEN = "inputs_embeds came without pixels, so pictures that are merged in them already cannot be found"


def pixels_of(kind: str, given: Mapping[str, Any]) -> Any:
    """Pixels of one kind among the arguments of a call, or in what a processor returns; None without any."""
    return next((given[name] for name in PIXELS[kind] if given.get(name) is not None), None)


@dataclass(frozen=True)
class ImageLayout:
    """How the language model sees one image or video. Tensors lie on the CPU.

    Attributes:
        parts: its rasters, as in VisualTokens.
        segment: [N] as in VisualTokens, None for a single frame or crop.
        newline: [N + newlines] bool, which of its placeholders are newline tokens; None without any.
        closed_by: [N] index of the newline that closes each token's row, -1 for none; given when `newline` is.
        encoded: newlines are made by the tower (CLS tokens): one is there only if its row is.
        interpolated: tokens were interpolated after the tower, so that none stands for a single tower position.
    """

    parts: Parts
    segment: Tensor | None = None
    newline: Tensor | None = None
    closed_by: Tensor | None = None
    encoded: bool = False
    interpolated: bool = False

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


def runs(kinds: Tensor) -> list[int]:
    """Lengths of the runs of visual tokens in `kinds` [B, L], row by row. Asks the device."""
    return [len(list(run)) for row in (kinds > 0).tolist() for shown, run in groupby(row) if shown]


@dataclass(frozen=True)
class SkipPlan:
    """Which images of a feature call are left alone by stages of the encoder; skip_reason: why these do nothing at all,
    if so; counted: as in Trace."""

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
        """Per part, whether it is skipped, for images of `each` parts; empty where nothing is skipped."""
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
        deep: the same for what DeepStack taps from the tower, tap by tap.
        fingerprint: [ΣN] first channel of the projected features: proof that what reaches the LLM is what was scored.
        stages: trace entries of encoder-site stages.
        history: what the vision tower left of the images, where its images are the model's; the next two are for towers
            that see other ones (crops).
        alive: [ΣN] which tokens it left; None where it left all. Their values cannot tell it: a model may overflow.
        absorbed_by: [ΣN] as in TokenHistory, when an encoder stage merged.
        counted: as in Trace.
        places_unknown: an encoder stage merged, but the model interpolated its output, so that no token stands for
            certain others.
        resized: rasters that the tower saw of every image, where some were made smaller; their tokens are those in the
            upper left corner of `layouts`. None where none was.
    """

    layouts: tuple[ImageLayout, ...]
    facts: dict[Any, Tensor]
    fingerprint: Tensor
    stages: list[StageTrace]
    history: TokenHistory | None = None
    alive: Tensor | None = None
    absorbed_by: Tensor | None = None
    places_unknown: bool = False
    deep: tuple[Tensor | None, ...] = ()
    counted: str | None = None
    resized: tuple[Parts, ...] | None = None

    @property
    def shortened(self) -> bool:
        """Whether the vision tower left out any token."""
        return self.alive is not None if self.history is None else self.history.short

    def left(self) -> Tensor | None:
        """[ΣN] bool: which tokens the vision tower left; None where all."""
        return self.alive if self.history is None else self.history.mask()

    def absorbed(self) -> Tensor | None:
        """[ΣN] as in TokenHistory; None where nothing was merged."""
        return self.absorbed_by if self.history is None else self.history.absorbed_by


class Run(threading.local):
    """State of one forward, one per thread: two threads may call one model.

    Attributes:
        kinds: [B, L] which kind of visual token a position holds: 0 none, 1 image, 2 video.
        blocks: [B, L] columns of the same number see each other both ways, -1 at others; None: none do.
        mask: the attention mask that the adapter's `outer` was given.
        padding: [B, L] the mask of `generate`, before it makes those of a static cache; None: nothing is padded.
        unseen: the call has embeddings and no pixels, so that pictures may be in them already.
        labels, tail: of the outermost call, see `answered`.
        call, tower: the feature call and the tower call in progress.
        skip_plans: kind -> which images of the prompt to come are left alone.
        prompt: `input_ids` or `inputs_embeds` [B, L] of the prompt to come, of families whose layouts need it.
        cache: that of the forward in progress, if it holds a pruned prompt.
        encodes: kind -> what was encoded last; earlier: the same before the call in progress.
        generating: `generate` is at work, which may encode long before it uses the features, and use them several
            times.
    """

    kinds: Tensor | None = None
    blocks: Tensor | None = None
    mask: Any = None
    padding: Tensor | None = None
    unseen: bool = False
    labels: Tensor | None = None
    tail: int = 0
    call: FeatureCall | None = None
    tower: Any = None
    flow: Any = None
    cache: Any = None
    trace: Trace | None = None
    generating: bool = False

    def __init__(self) -> None:
        self.encodes: dict[str, Encoded] = {}
        self.earlier: dict[str, Encoded] = {}
        self.skip_plans: dict[str, SkipPlan] = {}
        self.prompt: dict[str, Tensor] = {}

    def begin(self) -> None:
        """A `generate`, or a forward outside of one, begins."""
        if not self.generating:
            self.earlier, self.prompt = dict(self.encodes), {}

    def forget(self) -> None:
        """Drops what was encoded and found out for a `generate`, or a forward outside of one, that is over. Features
        that were encoded before it may be used again."""
        if not self.generating:
            self.encodes = {kind: e for kind, e in self.encodes.items() if self.earlier.get(kind) is e}
            self.earlier, self.skip_plans, self.prompt, self.padding = {}, {}, {}, None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a wrapped model cannot be copied or pickled; call vtoken.unwrap(model) first (save_pretrained works as "
            "it is)"
        )


class Clock:
    """Moments on a device's own clock, taken without waiting for it; only asking for the time between two waits.

    As a context manager it times a block.
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
        """Waits for everything that the device was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds from start to end; waits for the device."""
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
        """Time of the block; waits for the device."""
        return self.between(self.start, self.end)
