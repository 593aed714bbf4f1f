"""The prompt with smaller pictures that a resized one has to be like, made without vtoken."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from modes import greedy
from torch import Tensor
from torch.nn.functional import interpolate

import vtoken

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
PADDING = {"input_ids": tiny.PAD, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
SIDE = 2  # patches along an edge of a token


def picture(patches: Tensor, grid: list[int], size: int) -> Tensor:
    """[frames, C, H, W] of the patches of one picture, one by one."""
    t, h, w = grid
    depth = patches.shape[1] // (3 * size**2)
    out = torch.empty(t * depth, 3, h * size, w * size)
    places = ((f, r, c, i, j) for f in range(t) for r in range(h // SIDE) for c in range(w // SIDE) for i, j in INNER)
    for patch, (f, r, c, i, j) in zip(patches, places, strict=True):
        y, x = (SIDE * r + i) * size, (SIDE * c + j) * size
        frames = patch.view(3, depth, size, size).transpose(0, 1)
        out[f * depth : (f + 1) * depth, :, y : y + size, x : x + size] = frames
    return out


INNER = [(i, j) for i in range(SIDE) for j in range(SIDE)]


def patches(frames: Tensor, grid: list[int], size: int, depth: int) -> Tensor:
    """The inverse of `picture`."""
    t, h, w = grid
    out = []
    for f in range(t):
        for r in range(h // SIDE):
            for c in range(w // SIDE):
                for i, j in INNER:
                    y, x = (SIDE * r + i) * size, (SIDE * c + j) * size
                    cut = frames[f * depth : (f + 1) * depth, :, y : y + size, x : x + size]
                    out.append(cut.transpose(0, 1).flatten())
    return torch.stack(out)


def shrunk(given: Tensor, before: list[int], after: list[int], size: int) -> Tensor:
    """Patches of the resampled picture."""
    frames = picture(given, before, size)
    low, high = frames.amin((0, 2, 3))[:, None, None], frames.amax((0, 2, 3))[:, None, None]
    across = interpolate(frames, (before[1] * size, after[2] * size), mode="bicubic", antialias=True)
    down = across.minimum(high).maximum(low)
    small = interpolate(down, (after[1] * size, after[2] * size), mode="bicubic", antialias=True)
    return patches(small.minimum(high).maximum(low), after, size, len(frames) // before[0])


def smaller(model: Any, batch: dict[str, Tensor], wanted: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    """The batch with pictures of the wanted grids (in patches, per kind), as a processor would write it."""
    config, out = model.config.vision_config, dict(batch)
    drop = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    found = {kind: [s for s in tiny.segments(model, batch) if s.kind == kind] for kind in PIXELS}
    for kind, (pixels, grids) in PIXELS.items():
        if grids not in batch:
            continue
        before = batch[grids].tolist()
        parts = batch[pixels].split([t * h * w for t, h, w in before])
        each = zip(parts, before, wanted[kind], strict=True)
        out[pixels] = torch.cat([p if b == a else shrunk(p, b, a, config.patch_size) for p, b, a in each])
        out[grids] = torch.tensor(wanted[kind])
        for segment, (t, h, w), (_, rows, columns) in zip(found[kind], before, wanted[kind], strict=True):
            gone = torch.ones(t, h // SIDE, w // SIDE, dtype=torch.bool)
            gone[:, : rows // SIDE, : columns // SIDE] = False
            drop[segment.row, segment.columns] = gone.flatten()
    masks = batch["attention_mask"].bool() & ~drop
    length = int(masks.sum(1).max())
    for name, pad in PADDING.items():
        if name in batch:
            rows = [row[stay] for row, stay in zip(batch[name], masks, strict=True)]
            out[name] = torch.stack([torch.nn.functional.pad(r, (length - len(r), 0), value=pad) for r in rows])
    return out


def of_trace(model: Any, batch: dict[str, Tensor], trace: Any) -> dict[str, list[list[int]]]:
    """The grids that the trace's first stage left, per kind: as many rows and columns as its corners have."""
    found: dict[str, list[list[int]]] = {"image": [], "video": []}
    segments = tiny.segments(model, batch)
    repeats = len(trace.parts) // len(segments)  # of rows, for beams and return sequences
    first = [i for i, row in enumerate(trace.row) if row % repeats == 0]
    for segment, i in zip(segments, first, strict=True):
        kept, ((t, h, w),) = trace.stages[0].kept[i], trace.parts[i]
        assert len(segment.columns) == t * h * w
        rows, columns = (len(set(values.tolist())) for values in (kept // w % h, kept % w))
        assert len(kept) == t * rows * columns and len(set((kept // (h * w)).tolist())) == t
        found[segment.kind].append([t, SIDE * rows, SIDE * columns])
    return found


def compare(model: Any, batch: dict[str, Tensor], stages: list[Any], new: int = 5, **options: Any) -> Any:
    """Holds a pipeline that resizes first against the rest of it (the stock model, where nothing is left) on the
    smaller pictures; returns the trace."""
    with vtoken.wrapped(model, stages):
        got = greedy(model, batch, n=new, return_dict_in_generate=True, output_logits=True, **options)
        trace = vtoken.trace(model)
    small = smaller(model, batch, of_trace(model, batch, trace))
    with vtoken.wrapped(model, stages[1:]):
        want = greedy(model, small, n=new, return_dict_in_generate=True, output_logits=True, **options)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=tiny.family(model).float32_error, rtol=1e-4
    )
    assert torch.equal(got.sequences[:, -new:], want.sequences[:, -new:])
    length = batch["input_ids"].shape[1]
    given = batch["input_ids"].repeat_interleave(len(got.sequences) // len(batch["input_ids"]), 0)
    assert torch.equal(got.sequences[:, :length], given), "the prompt is returned as it was given"
    return trace
