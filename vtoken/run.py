"""State of one forward, and the trace: what a wrapped model did in its last prefill."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from vtoken.stages import Parts, size_of, uploaded

KINDS = ("image", "video")  # of visual tokens; Run.visual counts from 1


@dataclass
class StageTrace:
    """One stage of one prefill.

    Attributes:
        name, site: of the stage.
        tokens_in, tokens_out: visual tokens per image before and after it.
        kept: per image, ascending LongTensor of indices into the image's unpruned visual tokens. At site cache those that any KV head
            of the layer holds, with tokens_out their number per head (a mean); both empty where a method does not tell.
        into: per image, for every unpruned visual token the kept one that absorbed it (-1 dropped); None for pure pruning.
        stood_aside: why the stage did nothing, or None (rows of a batch that ran dense: `Trace.dense_rows`).
        substitutes: fact asked for -> fact it was given, where the family has no such fact.
        layer: the layer it acted at, for encoder, decoder, attention and cache sites.
        backend: at site attention, what computed it: torch, triton or flex.
        packed_bytes: at site cache, of a method that rounds to few bits: bytes of the layer's keys and values if they were packed so, which
            they are not (`Trace.cache_bytes` are held).
        frames: at site frames, per image, the frames that stayed (in Qwen models pairs of frames); an image is one.
        patches: at site frames, per image, the patches that the vision tower's layers see of it.
        densities: at site attention, per batch row: share of the causal blocks that was computed, head mean (scalars on the device).
    """

    name: str
    site: str
    tokens_in: list[int]
    tokens_out: list[int]
    kept: list[Tensor]
    into: list[Tensor] | None = None
    stood_aside: str | None = None
    layer: int | None = None
    packed_bytes: int | None = None
    substitutes: dict[str, str] = field(default_factory=dict)
    backend: str | None = None
    clock: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    densities: list[Tensor] = field(default_factory=list, repr=False)
    frames: list[list[int]] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)

    @property
    def density(self) -> list[float]:
        """`densities` as numbers (reading them waits for the device); empty at other sites and where the stage stood aside."""
        return [float(density) for density in self.densities]

    @property
    def milliseconds(self) -> float:
        """Time the decision took (device time on a GPU; reading it waits for the device)."""
        return self.clock()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "site": self.site,
            "layer": self.layer,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "kept": [k.tolist() for k in self.kept],
            "into": None if self.into is None else [i.tolist() for i in self.into],
            "milliseconds": self.milliseconds,
            "stood_aside": self.stood_aside,
            "density": self.density,
            "backend": self.backend,
            "packed_bytes": self.packed_bytes,
            "frames": self.frames,
            "patches": self.patches,
            "substitutes": self.substitutes,
        }


@dataclass
class Trace:
    """What happened in one prefill.

    Attributes:
        stages: one entry per stage and layer it acted at, in the order the data flowed.
        parts: rasters of each image, as in VisualTokens; `row` is its batch row.
        visual_tokens: per image, before anything was dropped.
        layers: for every decoder layer, visual tokens per image that it saw.
        prompt_tokens: per batch row, tokens that entered the first decoder layer (text and visual, no padding).
        cached: for every decoder layer, per batch row, prompt tokens that each KV head holds after a cache stage; empty without one.
        cache_bytes: bytes of keys and values after prefill (0 without a cache).
        dense_rows: batch rows that ran dense because they hold fewer visual tokens than the pipeline's `min_visual_tokens`.
    """

    stages: list[StageTrace] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    cached: list[list[int]] = field(default_factory=list)
    cache_bytes: int = 0
    dense_rows: list[int] = field(default_factory=list)

    @property
    def kept(self) -> list[Tensor]:
        """Per image, unpruned indices of the tokens alive after the last stage that chose; what a cache stage evicts took part."""
        for stage in reversed(self.stages):
            if stage.kept and stage.site != "cache":
                return stage.kept
        return [torch.arange(n) for n in self.visual_tokens]

    @property
    def tokens_out(self) -> list[int]:
        """Visual tokens per image after the last stage."""
        return [len(k) for k in self.kept]

    @property
    def average_tokens(self) -> float:
        """Visual tokens of the whole batch, averaged over decoder layers (papers mix this with tokens at entry)."""
        counts: Sequence[int] = [sum(layer) for layer in self.layers] or [sum(self.visual_tokens)]
        return sum(counts) / len(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return {
            "stages": [s.to_dict() for s in self.stages],
            "parts": [[list(grid) for grid in parts] for parts in self.parts],
            "row": self.row,
            "visual_tokens": self.visual_tokens,
            "layers": self.layers,
            "prompt_tokens": self.prompt_tokens,
            "cached": self.cached,
            "cache_bytes": self.cache_bytes,
            "dense_rows": self.dense_rows,
        }


@dataclass(frozen=True)
class Lineage:
    """What became of every unpruned visual token of a batch of images.

    Attributes:
        full: unpruned tokens per image.
        place: [ΣK] position of each live token in its image's unpruned raster.
        lengths: live tokens per image; None means `full`.
        home: [Σfull] position (in its image's raster) of the live token that stands for each unpruned one, -1 = dropped; None
            while nothing was merged.
    """

    full: tuple[int, ...]
    place: Tensor
    lengths: tuple[int, ...] | None = None
    home: Tensor | None = None

    def advance(self, keep: Any, image: Tensor) -> Lineage:
        """After a Keep. `image` [ΣK] is the image of each live token."""
        place, home = self.place[keep.index.to(self.place.device)], self.home
        if keep.into is not None or home is not None:
            device = self.place.device
            start = uploaded([0, *accumulate(self.full)][:-1], device)
            arange = torch.arange(len(self.place), device=device)
            if keep.into is None:
                target = torch.full_like(arange, -1)
                target[keep.index.to(device)] = place
            else:
                into = keep.into.to(device)
                target = torch.where(into >= 0, place[into.clamp(min=0)], -1)
            moved = torch.full((sum(self.full),), -1, device=device)
            moved[start[image.to(device)] + self.place] = target
            if home is None:
                home = moved
            else:
                of = torch.repeat_interleave(uploaded(self.full, device), output_size=sum(self.full))
                home = torch.where(home >= 0, moved[(start[of] + home).clamp(min=0)], -1)
        return Lineage(self.full, place, keep.lengths, home)

    def kept(self) -> list[Tensor]:
        return list(self.place.split(self.lengths or self.full))

    def size(self) -> Tensor | None:
        """[ΣK] float32, unpruned tokens that each live one stands for; None while nothing was merged."""
        if self.home is None:
            return None
        full, live = (uploaded(n, self.home.device) for n in (self.full, self.lengths or self.full))
        start = full.cumsum(0) - full
        slot = start.repeat_interleave(full, output_size=len(self.home)) + self.home
        counts = torch.zeros_like(slot, dtype=torch.float32).index_add_(0, slot.clamp(min=0), (self.home >= 0).float())
        return counts[start.repeat_interleave(live, output_size=len(self.place)) + self.place]

    def into(self) -> list[Tensor] | None:
        return None if self.home is None else list(self.home.split(self.full))


@dataclass(frozen=True)
class Layout:
    """How the language model sees one image or video. Tensors lie on the CPU.

    Attributes:
        parts: its rasters, as in VisualTokens.
        segment: [N] as in VisualTokens, None for a single frame or crop.
        newline: [N + newlines] bool, which of its placeholders are newline tokens; None without any.
        line: [N] index of the newline that closes each token's row, -1 for none; given when `newline` is.
        resized: tokens were interpolated after the tower, so that none is one tower position.
    """

    parts: Parts
    segment: Tensor | None = None
    newline: Tensor | None = None
    line: Tensor | None = None
    resized: bool = False

    @property
    def tokens(self) -> int:
        """Visual tokens, newlines not counted."""
        return size_of(self.parts)

    @property
    def length(self) -> int:
        """Placeholders in the prompt."""
        return self.tokens if self.newline is None else len(self.newline)


def newline_mask(layouts: Sequence[Layout]) -> Tensor:
    """[Σlength] bool: which placeholders of these images are newline tokens."""
    return torch.cat([torch.zeros(i.tokens, dtype=torch.bool) if i.newline is None else i.newline for i in layouts])


def tokens_of(layouts: Sequence[Layout], device: torch.device) -> Tensor:
    """[ΣN] which placeholders of these images are visual tokens, as indices on the device, which is not waited for."""
    return (~newline_mask(layouts)).nonzero()[:, 0].to(device, non_blocking=True)


def segments(layouts: Sequence[Layout]) -> Tensor | None:
    """[ΣN] segment of every token of these images; None when every one is a single segment."""
    if all(layout.segment is None for layout in layouts):
        return None
    return torch.cat([torch.zeros(i.tokens, dtype=torch.long) if i.segment is None else i.segment for i in layouts])


@dataclass(frozen=True)
class Call:
    """One call of the model's feature function.

    Attributes:
        kind: "image" or "video".
        arguments: what it was called with, by name.
        layouts: of each image or video, in order.
    """

    kind: str
    arguments: dict[str, Any]
    layouts: tuple[Layout, ...]


@dataclass
class Encode:
    """What the vision encoder of one call produced, until the language-model boundary consumes it.

    Attributes:
        layouts: of each image, in the order the model packs them.
        facts: Fact -> [ΣN, ...] aligned with the packed, unpruned visual tokens (NaN where dropped).
        probe: [ΣN] first channel of the projected features: proof that what reaches the LLM is what was scored.
        stages: trace entries of encoder-site stages.
        home: [ΣN] as in Lineage, when an encoder stage merged.
        untold: an encoder stage merged, but the model interpolated its output, so that no token stands for certain others.
    """

    layouts: tuple[Layout, ...]
    facts: dict[Any, Tensor]
    probe: Tensor
    stages: list[StageTrace]
    home: Tensor | None = None
    untold: bool = False


class Run(threading.local):
    """State of one forward, one per thread: two threads may call one model.

    Attributes:
        visual: [B, L] which kind of visual token a position holds: 0 none, 1 image, 2 video.
        labels, tail: of the outermost call, see Prefill.
        call, tower: the feature call and the tower call in progress.
        encodes: kind -> what was encoded last.
    """

    visual: Tensor | None = None
    labels: Tensor | None = None
    tail: int = 0
    call: Call | None = None
    tower: Any = None
    flow: Any = None
    trace: Trace | None = None

    def __init__(self) -> None:
        self.encodes: dict[str, Encode] = {}

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a wrapped model cannot be copied or pickled; call vtoken.unwrap(model) first (save_pretrained works as it is)"
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
