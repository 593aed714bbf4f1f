"""Which image each visual token belongs to, where its newlines stand, and whether it is the image that was scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import NotWholeError, UnsupportedError
from vtoken.hooks.state.live_tokens import LiveTokens
from vtoken.hooks.state.run import KINDS, Encoded, ImageLayout, newline_mask
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Grid, Parts

HIDDEN = (
    "the attention_mask hides a part of a picture, whose tokens this model numbers by rows and columns; show all of it "
    "or hide all of it with the tokens that mark its beginning and end"
)


@dataclass(frozen=True)
class Newlines:
    """The newline tokens of a prefill, and where they stand; closed_by: [ΣN] which ends each token's row, -1: none."""

    batch_row: Tensor
    column: Tensor
    closed_by: Tensor


@dataclass(frozen=True)
class ImageSpans:
    """The images of a prefill, in reading order.

    Attributes:
        layouts: of each image; `row` is its batch row.
        encodes: the encoder calls they came from; empty when features came precomputed.
        origin: per image, index of its encoder call and of the image in that call.
        source: [ΣN] index of each token in the packed values of all encodes, one after the other; None when both orders
            are the same.
        batch_row, column: [ΣN] where each token stands in the batch.
        newlines: None where there are none.
    """

    layouts: tuple[ImageLayout, ...]
    row: tuple[int, ...]
    encodes: tuple[Encoded, ...]
    origin: tuple[tuple[int, int], ...]
    source: Tensor | None
    batch_row: Tensor
    column: Tensor
    newlines: Newlines | None

    @property
    def smaller(self) -> list[Grid | None]:
        """The raster that each image was resized to; None where it was not."""
        resized = [self.encodes[encode].resized if self.encodes else None for encode, _ in self.origin]
        return [of[image][0] if of else None for of, (_, image) in zip(resized, self.origin, strict=True)]

    def as_seen(self, tokens: LiveTokens, device: torch.device) -> tuple[tuple[Parts, ...], tuple[int, ...], Tensor]:
        """Rasters (of resized pictures the smaller ones) and batch row of every image, [ΣK] raster indices in these."""
        if not any(smaller := self.smaller):
            return tokens.parts, tokens.row, tokens.history.raster_index.to(device)
        parts = tuple((new,) if new else old for new, old in zip(smaller, tokens.parts, strict=True))
        return parts, tokens.row, tokens.places_in([grid for (grid, *_) in parts]).to(device)

    def gather(self, values: Sequence[Tensor]) -> Tensor:
        """[ΣN, ...] in the order of the tokens here; values: one packed tensor per encode."""
        value = values[0] if len(values) == 1 else torch.cat([v.to(values[0].device) for v in values])
        return value if self.source is None else value[self.source.to(value.device)]

    @property
    def counted(self) -> str | None:
        """As in Trace."""
        return next((encode.counted for encode in self.encodes if encode.counted), None)

    def stages(self) -> list[StageTrace]:
        """What encoder stages did, for the images of this batch."""
        if not any(encode.stages for encode in self.encodes):
            return []
        first = self.encodes[0]
        if len(self.encodes) == 1 and self.origin == tuple((0, i) for i in range(len(first.layouts))):
            return list(first.stages)
        return [self._of_batch(traces) for traces in zip(*(encode.stages for encode in self.encodes), strict=True)]

    def _of_batch(self, traces: Sequence[StageTrace]) -> StageTrace:
        """One stage's entries, one per encode, as one entry."""

        def pick(name: str) -> list[Any]:
            values = [getattr(trace, name) for trace in traces]
            return [values[e][i] for e, i in self.origin if values[e]]

        of_batch: dict[str, Any] = {
            name: pick(name) for name in ("tokens_in", "tokens_out", "kept", "frames", "patches", "resized", "into")
        }
        if len(of_batch["into"]) < len(self.origin):
            of_batch["into"] = None
        return replace(min(traces, key=lambda trace: trace.stood_aside is not None), **of_batch)


@dataclass(frozen=True)
class Image:
    layout: ImageLayout
    row: int
    encode: int
    index: int  # among the images of that encode
    start: int  # of its tokens in the packed values of all encodes


def visual_positions(kinds: Tensor, number: int, several: bool) -> tuple[Tensor, Tensor]:
    """Batch row and column [number] of the visual tokens in `kinds` [B, L]; several: there may be images and videos.
    Does what nonzero() does, which would ask the device for the number."""
    marks = kinds.flatten() > 0 if several else kinds.flatten()
    at = torch.argsort(marks, descending=True, stable=True)[:number]
    return (at // kinds.shape[1], at % kinds.shape[1]) if len(kinds) > 1 else (torch.zeros_like(at), at)


def locate(
    kinds: Tensor,
    counts: Sequence[Sequence[int]],
    encodes: dict[str, Encoded],
    adapter: Any,
    at: tuple[Tensor, Tensor] | None = None,
) -> ImageSpans:
    """Finds the images behind the visual positions of `kinds` [B, L]: 0 none, 1 image, 2 video.

    Args:
        counts: per kind, how many positions of each row are of it.
        at: `visual_positions`, where they are known.

    Raises:
        NotWholeError: the rows cannot be filled with whole images.
        ValueError: some features came precomputed and some did not.
    """
    if at is None:
        at = visual_positions(kinds, sum(map(sum, counts)), sum(any(per_row) for per_row in counts) > 1)
    batch_row, column = at
    known, queues = queued(counts, encodes, adapter)
    images = list(*queues.values()) if len(queues) == 1 else interleave(queues, kinds[batch_row, column].tolist())
    layouts, newlines = tuple(i.layout for i in images), None
    if any(layout.newline is not None for layout in layouts):
        is_newline, device = newline_mask(layouts), batch_row.device
        here, rest = (m.nonzero()[:, 0].to(device, non_blocking=True) for m in (is_newline, ~is_newline))
        newlines = Newlines(batch_row[here], column[here], closed_by(layouts).to(device, non_blocking=True))
        batch_row, column = batch_row[rest], column[rest]
    rows, origin = tuple(i.row for i in images), tuple((i.encode, i.index) for i in images)
    return ImageSpans(layouts, rows, known, origin, source_of(images) if known else None, batch_row, column, newlines)


def queued(
    counts: Sequence[Sequence[int]], encodes: dict[str, Encoded], adapter: Any
) -> tuple[tuple[Encoded, ...], dict[int, deque[Image]]]:
    """The encoder calls that the kinds in a prompt came from (none: precomputed), and by kind its images, row by
    row."""
    found = {k: per_row for k, per_row in enumerate(counts) if any(per_row)}
    given = [encodes.get(KINDS[k]) for k in found]
    known = tuple(e for e in given if e is not None)
    if known and len(known) < len(given):
        raise ValueError("the features of images and of videos must come the same way; encode both after vtoken.wrap")
    queues, offset = {}, 0
    for number, ((k, per_row), encode) in enumerate(zip(found.items(), given, strict=True)):
        known_layouts = None if encode is None else encode.layouts
        queues[k] = deque(assign(per_row, known_layouts, adapter, number, offset))
        offset += 0 if encode is None else len(encode.fingerprint)
    return known, queues


def source_of(images: Sequence[Image]) -> Tensor | None:
    """`ImageSpans.source` of these images."""
    lengths = [image.layout.tokens for image in images]
    if [image.start for image in images] == [0, *accumulate(lengths)][:-1]:
        return None
    return torch.cat([torch.arange(i.start, i.start + n) for i, n in zip(images, lengths, strict=True)])


def interleave(queues: dict[int, deque[Image]], kinds: list[int]) -> list[Image]:
    """Images and videos in the order in which their tokens stand; `kinds` is the kind of every visual position, row by
    row."""
    images, at = [], 0
    while at < len(kinds):
        images.append(queues[kinds[at] - 1].popleft())
        at += images[-1].layout.length
    return images


def closed_by(layouts: Sequence[ImageLayout]) -> Tensor:
    """[ΣN] index, among all newlines of the batch, of the one that closes each token's row; -1 for none."""
    out, first = [], 0
    for layout in layouts:
        if layout.newline is None or layout.closed_by is None:
            out.append(torch.full((layout.tokens,), -1))
            continue
        out.append(torch.where(layout.closed_by < 0, -1, layout.closed_by + first))
        first += layout.length - layout.tokens
    return torch.cat(out)


def assign(
    counts: Sequence[int], layouts: Sequence[ImageLayout] | None, adapter: Any, number: int = 0, offset: int = 0
) -> list[Image]:
    """Shares the encoded images of one kind out among the batch rows.

    `generate` may expand the batch after encoding (beams, several return sequences): then E consecutive rows hold the
    same images.

    Args:
        counts: visual positions of this kind in each batch row.
        layouts: of what the tower of this call saw, or None when features came precomputed.
        number, offset: index of the encode among all of this call, and where its tokens begin in their packed values.

    Raises:
        NotWholeError: the rows cannot be filled with whole images.
    """
    if layouts is None:
        return [Image(layout, r, number, 0, 0) for r, n in enumerate(counts) for layout in adapter.split(n)]
    lengths = [layout.length for layout in layouts]
    starts = [0, *accumulate(layout.tokens for layout in layouts)]
    copies, rest = divmod(sum(counts), sum(lengths))
    if rest or not copies:
        parted = any(layout.newline is not None for layout in layouts)
        raise NotWholeError(
            f"this call holds {sum(counts)} visual tokens but {sum(lengths)} were encoded"
            f"{', with the tokens between their rows, which a prompt must have' if parted else ''}; a prompt prefilled "
            "in chunks cannot be pruned (set prefill_chunk_size=None), and images must be encoded in the call that "
            "uses them"
        )
    images: list[Image] = []
    following = first = 0
    for r, need in enumerate(counts):
        if r % copies == 0:
            first = following
        following, covered = first, 0
        while covered < need and following < len(lengths):
            images.append(Image(layouts[following], r, number, following, offset + starts[following]))
            covered += lengths[following]
            following += 1
        if covered != need:
            raise NotWholeError(
                f"row {r} holds {need} visual tokens, which is not a whole number of the encoded images"
            )
    return images


def check(values: Tensor, positions: Tensor | None, located: ImageSpans, seen: LiveTokens) -> None:
    """Refuses features that are not the ones that were scored, and images that a model with M-RoPE would read as a line
    of text. Asks the device.

    Args:
        values: [ΣN, D] what stands at the visual positions.
        positions: of a model with M-RoPE, [axes, B or 1, L]; the last two of the axes are rows and columns. Else None.
        seen: the visual tokens that the padding mask does not hide.

    Raises:
        ValueError: e.g. features were encoded earlier, and another picture has been encoded since.
        UnsupportedError: all axes are equal on images that have more than one token per frame, because an argument is
            missing or transformers is too old.
    """
    same, distinct = True, True
    if located.encodes:
        fingerprint = located.gather([encode.fingerprint for encode in located.encodes])
        same = len(fingerprint) == len(values) and (
            bool(same_features(fingerprint, values))
            or bool(same_features(fingerprint.nan_to_num(), values.nan_to_num()))
        )
    if positions is not None and any(
        n and r * c > 1 for n, parts in zip(seen.lengths, seen.parts, strict=True) for _, r, c in parts
    ):
        distinct = bool(apart(positions, seen.batch_row, seen.column))
    if not same:
        raise ValueError(
            "the visual features of this call are not those the vision tower encoded last in this thread; "
            "pass pixel_values, or encode right before the call that uses the features"
        )
    if distinct:
        return
    raise UnsupportedError(
        "the images of this call have the positions of text (all axes of M-RoPE are equal). Pass input_ids, "
        "mm_token_type_ids and image grids of the whole conversation, or position_ids; where that does not help, "
        "transformers is older than 5.21 and does so to every new image of a cached conversation: start again without "
        "past_key_values, or upgrade"
    )


def same_features(fingerprint: Tensor, values: Tensor) -> Tensor:
    """[] bool: whether the first channel of `values` [ΣN, D] is `fingerprint` [ΣN]."""
    given = values[:, 0].detach().to(fingerprint.device)
    return (fingerprint.to(given.dtype) == given).all()


def apart(positions: Tensor, batch_row: Tensor, column: Tensor) -> Tensor:
    """[] bool: whether the positions [..., B or 1, L] tell rows and columns of visual tokens apart."""
    if positions.ndim != 3 or len(positions) == 1:
        return torch.zeros((), dtype=torch.bool, device=positions.device)
    batch_row = batch_row if positions.shape[1] > 1 else torch.zeros_like(batch_row)
    rows, columns = positions[-2:, batch_row.to(positions.device), column.to(positions.device)]
    return (rows != columns).any()
