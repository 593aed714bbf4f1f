"""Positions of pruned prompts, chunk by chunk, against the stock model's of the whole prompt."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tiny
import torch
from tiny_models import IMG, VID

from vtoken.serving._mrope import BASE, Span, coordinates, placed, prompt_positions, with_places, without_places

WIDTH = 8
PROMPTS = {
    "one picture": [3, "img", 5],
    "nothing before": ["img", 2],
    "text": [6],
    "sizes": [2, ("img", (1, 4, 8)), 1, ("img", (1, 12, 4)), 4, ("img", (1, 2, 2)), 3],
    "no text between": [1, ("img", (1, 4, 8)), ("img", (1, 8, 4)), 1],
    "video": [2, ("video", 2, 4, 4), 3],
    "long video": [2, ("video", 6, 4, 2), 3, "img", 2],
    "videos and pictures": [1, "img", 2, ("video", 4, 4, 8), 1, ("img", (1, 8, 8)), 3, ("video", 3, 8, 4), 2],
}
made = cache(tiny.make)
CASES = [
    (family, seconds)
    for family in tiny.families(mrope=True, deepstack=0, served=True)
    for seconds in ((1.0, 0.5, 2.5) if "tokens_per_second" in tiny.family(family).tower() else (None,))
]


def stock(family, prompt, seconds):
    """Ids [L], positions [3, L] of transformers, and (columns, grid, step) of every picture."""
    model = made(family)
    batch = tiny.build(model, [prompt])
    if "second_per_grid_ts" in batch:
        batch["second_per_grid_ts"] = torch.full_like(batch["second_per_grid_ts"], seconds)
    given = {name: batch.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    if seconds is not None:
        given["second_per_grid_ts"] = batch.get("second_per_grid_ts")
    ids = batch["input_ids"]
    types = batch.get("mm_token_type_ids", torch.zeros_like(ids))
    positions, _ = model.model.get_rope_index(input_ids=ids, mm_token_type_ids=types, **given)
    grids = {kind: iter(batch.get(f"{kind}_grid_thw", torch.empty(0)).tolist()) for kind in ("image", "video")}
    found = []
    for _, columns, kind in tiny.segments(model, batch):
        t, h, w = next(grids[kind])
        step = 1.0 if kind == "image" or seconds is None else 2 * seconds
        found.append((columns, (t, h // 2, w // 2), step))
    return ids[0], positions[:, 0], found


@cache
def rounds_seconds_down(family):
    """As transformers 5.17 does: frames half a second apart stand at one time."""
    _, positions, ((columns, *_),) = stock(family, PROMPTS["video"], 0.5)
    return bool(positions[0, columns[0]] == positions[0, columns[-1]])


def behind_all_axes(positions, found):
    """The same, but text behind a video stands beyond its last frame as well, as vLLM has it."""
    out = positions.clone()
    for columns, (frames, rows, width), step in found:
        out[:, columns[-1] + 1 :] += max(0, int((frames - 1) * step) + 1 - max(rows, width))
    return out


def pruned(found, length, share, generator):
    """[L] bool, what stays; the spans of what is left, and the places of their tokens."""
    stays = torch.ones(length, dtype=torch.bool)
    for columns, *_ in found:
        stays[columns] = torch.rand(len(columns), generator=generator) < share
        stays[columns[torch.randint(len(columns), (1,), generator=generator)]] = True
    spans, places = [], []
    for columns, grid, step in found:
        index = stays[columns].nonzero()[:, 0]
        spans.append(Span(int(stays[: columns[0]].sum()), len(index), grid, step))
        places.append(coordinates(index, spans[-1]))
    return stays, spans, places


def run(positions, media, embeddings, chunks):
    """Positions after these chunks (start, stop), each given the embeddings of its own placeholders."""
    for start, stop in chunks:
        n, first = int(media[start:stop].sum()), int(media[:start].sum())
        x, places = without_places(embeddings[first : first + n])
        assert x.shape == (n, WIDTH)
        positions = placed(positions, media, places, start)
    return positions


@pytest.mark.parametrize(("share", "dtype"), [(1.0, torch.float32), (0.3, torch.bfloat16)])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("family", "seconds"), CASES)
def test_equals_transformers_wherever_the_prompt_is_cut(family, seconds, prompt, share, dtype):
    if seconds in (0.5, 2.5) and "video" in prompt and rounds_seconds_down(family):
        pytest.skip("this transformers rounds seconds between frames down; vLLM and later ones do not")
    ids, positions, found = stock(family, PROMPTS[prompt], seconds)
    wanted = behind_all_axes(positions, found)
    generator = torch.Generator().manual_seed(1)
    stays, spans, places = pruned(found, len(ids), share, generator)
    wanted, ids, total = wanted[:, stays], ids[stays], int(stays.sum())
    media = (ids == IMG) | (ids == VID)
    x = torch.randn(int(media.sum()), WIDTH, generator=generator).to(dtype)
    embeddings = with_places(x, torch.cat([torch.empty(0, 3, dtype=torch.long), *places]))
    assert embeddings.dtype == dtype and torch.equal(without_places(embeddings)[0], x)
    start, delta = prompt_positions(total, spans)
    assert torch.equal(start[:, ~media], wanted[:, ~media])
    assert total + delta == int(wanted[0, -1]) + 1
    for cut in range(total + 1):
        found_here = run(start, media, embeddings, [(0, cut), (cut, total)])
        assert torch.equal(found_here, wanted), cut
        # What lies before was found in the prefix cache: it was never encoded.
        cached = run(start, media, embeddings, [(cut, total)])
        assert torch.equal(cached[:, cut:], wanted[:, cut:]), cut
        # Put off, and computed again from the beginning, or from a cached prefix.
        assert torch.equal(run(found_here, media, embeddings, [(cut // 2, cut), (cut, total)]), wanted), cut
    one_by_one = run(start, media, embeddings, [(k, k + 1) for k in range(total)])
    assert torch.equal(one_by_one, wanted)


def test_chunks_of_the_whole_are_not_written_over():
    """A chunk places its own tokens and no others."""
    spans = [Span(1, 3, (1, 2, 2))]
    start, _ = prompt_positions(5, spans)
    media = torch.tensor([False, True, True, True, False])
    places = coordinates(torch.tensor([0, 1, 3]), spans[0])
    out = placed(start, media, places[1:2], 2)
    assert out.tolist() == [[0, -2, 1, -2, 3], [0, -2, 1, -2, 3], [0, -2, 2, -2, 3]]
    assert start[0].tolist() == [0, -2, -2, -2, 3]


def test_pictures_may_touch():
    """vLLM replaces placeholders one by one, so a prompt need not hold text between them."""
    spans = [Span(2, 2, (1, 3, 2)), Span(4, 1, (1, 2, 2))]
    start, delta = prompt_positions(6, spans)
    media = torch.tensor([False, False, True, True, True, False])
    places = torch.cat([coordinates(torch.tensor([1, 4]), spans[0]), coordinates(torch.tensor([3]), spans[1])])
    wanted = [[0, 1, 2, 2, 5, 7], [0, 1, 2, 4, 6, 7], [0, 1, 3, 2, 6, 7]]
    assert delta == 2
    for cut in range(6):
        n = int(media[:cut].sum())
        first = placed(start, media, places[:n], 0)
        assert placed(first, media, places[n:], cut).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_coordinate_survives_its_dtype(dtype):
    every = torch.arange(BASE**2)
    places = torch.stack([every, every.flip(0), every.roll(1)], 1)
    x = torch.zeros(len(every), 2, dtype=dtype)
    assert torch.equal(without_places(with_places(x, places))[1], places)


@pytest.mark.parametrize("step", [2 * 0.7, 2 / 3, 1.0, 2 * float(np.float32(0.1)), 25.0])
def test_frames_are_counted_in_double_precision(step):
    """As vLLM counts the unpruned video's, where float32 would round some to another position."""
    span = Span(0, 0, (300, 2, 3), step)
    frames, rows, columns = np.indices(span.grid).reshape(3, -1)
    wanted = np.stack([(frames * step).astype(np.int64), rows, columns], 1)
    assert coordinates(torch.arange(1800), span).tolist() == wanted.tolist()
    assert span.extent == max(wanted.max() + 1, 3)
