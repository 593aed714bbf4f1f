"""The overlay's geometry and the report page, on made-up data."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from html_page import Page
from PIL import Image, ImageStat

from vtoken.evals.pictures.overlay import GAP, as_seen, overlay, owners, sheet, views
from vtoken.evals.pictures.report import Case, Panel, Report, Row, render, wilson
from vtoken.evals.shared.media import Media
from vtoken.hooks.state.trace import StageTrace, Trace

GRID = (1, 2, 3)
RED = Image.new("RGB", (30, 20), (200, 40, 40))


def inside(picture: Image.Image, token: int, cell: int = 20) -> tuple[float, ...]:
    """Mean colour of a cell without its border."""
    left, top = token % GRID[2] * cell, token // GRID[2] * cell
    return tuple(ImageStat.Stat(picture.crop((left + 2, top + 2, left + cell - 2, top + cell - 2))).mean)


def test_kept_cells_keep_their_colour_and_dropped_cells_lose_it():
    picture = overlay(RED, torch.tensor([1, 5]), GRID, dim=0.5, side=40)
    assert picture.size == (60, 40)
    for token in range(6):
        red, green, blue = inside(picture, token)
        if token in (1, 5):
            assert (red, green, blue) == (200, 40, 40)
        else:
            assert red == green == blue < 100
    assert picture.getpixel((20, 0)) == picture.getpixel((40, 19)) == (255, 255, 255)
    assert picture.getpixel((19, 10)) != (255, 255, 255)


def test_merged_cells_share_a_tint_with_the_cell_that_took_them():
    picture = overlay(RED, [0, 5], GRID, into=[0, 0, -1, -1, 5, 5], side=40)
    dropped, first, second = (inside(picture, t) for t in (2, 1, 4))
    assert len({dropped, first, second}) == 3
    assert len({*dropped}) == 1 < len({*first})
    assert inside(picture, 0) == inside(picture, 5) == (200, 40, 40)
    assert picture.getpixel((1, 0)) != picture.getpixel((59, 39)) != (255, 255, 255)


def test_small_pictures_grow_and_cells_stay_whole():
    picture = overlay(Image.new("RGB", (192, 192)), range(576), (1, 24, 24))
    assert picture.size == (480, 480)
    captioned = overlay(RED, [], GRID, caption="a caption that is far too long for one line " * 3)
    assert captioned.width == 720 and captioned.height > 480 + 2 * 20


def test_tokens_of_other_rasters_are_left_out():
    picture = overlay(RED, [1, 7, 20], GRID, side=40, first=6)
    assert [inside(picture, token) == (200, 40, 40) for token in range(6)] == [False, True, False, False, False, False]


def test_a_token_that_ended_in_another_raster_has_the_tint_of_its_owner():
    into = [0, 1, 1, 0, -1, -1, *(1, 0, -1, -1, -1, -1)]
    here, there = (overlay(RED, [0, 1], GRID, into, side=40, first=first) for first in (0, 6))
    assert inside(there, 0) == inside(here, 2) != inside(there, 1) == inside(here, 3)
    assert len({*inside(there, 2)}) == 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="2 frames"):
        overlay(RED, [0], (2, 2, 3))


def test_sheet_size():
    assert sheet([RED] * 5, columns=2).size == (2 * 30 + 3 * GAP, 3 * 20 + 4 * GAP)
    assert sheet([RED] * 3).size == (3 * 30 + 4 * GAP, 20 + 2 * GAP) and sheet([RED]) is RED
    wide = Image.new("RGB", (50, 20))
    assert sheet([RED, wide, RED], columns=2, background="white").size == (30 + 50 + 3 * GAP, 2 * 20 + 3 * GAP)


def test_the_picture_as_the_model_saw_it():
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    )
    pixels = torch.tensor([200, 40, 40]).view(1, 3, 1, 1).expand(1, 3, 4, 4) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    seen = as_seen(processor, ((pixels - mean) / std)[0])
    assert seen.size == (4, 4) and seen.getpixel((0, 0)) == (200, 40, 40)


def test_pictures_of_their_own_size_are_shown_without_padding():
    """A raster covers the picture, not what pads it to the size of the largest in the batch."""
    plain = SimpleNamespace(do_normalize=False)
    sizes, pixels = [(2, 3), (4, 1)], torch.zeros(2, 3, 4 * 14, 3 * 14)
    for picture, (rows, columns) in zip(pixels, sizes, strict=True):
        picture[:, : rows * 14, : columns * 14] = 1
    shown = views(plain, pixels, Media((RED, RED), video=False), [((1, *size),) for size in sizes])
    assert [view.size for (view,) in shown] == [(3 * 14, 2 * 14), (14, 4 * 14)]
    assert all(view.getextrema() == ((255, 255),) * 3 for (view,) in shown)


def test_owners_are_those_of_the_last_stage():
    merge = StageTrace("m", "tokens", [4], [3], [torch.tensor([0, 2, 3])], into=[torch.tensor([0, 0, 2, 3])])
    after = StageTrace("p", "tokens", [3], [2], [torch.tensor([0, 3])], into=[torch.tensor([0, 0, -1, 3])])
    prune = StageTrace("p", "tokens", [4], [2], [torch.tensor([0, 3])])
    assert owners(Trace([merge, after], visual_tokens=[4]), 0) == [0, 0, -1, 3]
    assert owners(Trace([prune], visual_tokens=[4]), 0) is None


def test_wilson():
    assert wilson(0, 0) == (0, 1)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == pytest.approx(1)


@pytest.fixture(scope="module")
def report() -> Report:
    dense = Row(
        "dense", "dense", {"digit": (9, 10), "read": (7, 10)}, 6, 4_000_000, 1_000_000, 4096, (0.02, 0.04, 0.03)
    )
    pruned = Row("fast:2", "fast", {"digit": (8, 10), "read": (4, 10)}, 2, 3_000_000, 250_000, 1024, (0.03, 0.02, 0.03))
    case = Case("what <digit> is red?", "7", (Panel("dense", "7", True, RED), Panel("fast:2", "", False, RED)))
    return Report("toy", (dense, pruned), (case,), {"command": "vtoken demo", "seed": "0"})


def test_page_is_whole_and_fetches_nothing(report):
    text = render(report)
    page = Page(text)
    assert not page.open
    assert page.fetched and all(link.startswith(("data:image/", "#")) for link in page.fetched)
    assert "<script" not in text and "<link" not in text and "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert "what &lt;digit&gt; is red?" in text and "✓ right" in text and "✗ wrong" in text


def test_page_shows_the_numbers_of_the_data(report):
    rows = {row[0].strip(): " ".join(row[1:]).split() for row in reversed(Page(render(report)).rows)}
    low, high = wilson(12, 20)
    text = " ".join(rows["fast:2"])
    assert text.startswith(
        f"2 60.0 {100 * low:.1f}–{100 * high:.1f} 75.0 3 MFLOP LM 0.25 MFLOP 0.75 LM 0.25 30.0 25.0–30.0 1.00"
    )
    assert text.endswith("1 KiB 0.25")
    assert " ".join(rows["dense"]).startswith("6 80.0")


def many(methods: int) -> Report:
    scores = {"digit": (9, 10)}
    rows = [Row("dense", "dense", scores, 576, 4_000_000, 1_000_000, 4096, (0.02, 0.04))]
    for k in range(methods):
        name = ("uniform", "random", *(f"m{n}" for n in range(methods)))[k]
        rows += [Row(f"{name}:{t}", name, {"digit": (k, 10)}, t, 3_000_000, 9, 9, (0.03, 0.02)) for t in (16, 64)]
    return Report("toy", tuple(rows), (Case("what?", "7", (Panel("dense", "7", True, RED),) * methods),), {})


def test_many_methods_get_a_picture_each():
    few, crowd = (render(many(methods)) for methods in (5, 9))
    assert 'class="plot"' in few and 'class="plot many"' in crowd and not Page(crowd).open
    assert "random choice (dotted)" in crowd and "random choice (dotted)" not in few
    axes = [re.findall(r'id="axes_\d+"', text) for text in (few, crowd)]
    # Every method but the floors, which stand behind each, on a grid of 6 columns whose last places stay empty.
    assert [len(found) for found in axes] == [1, 7]
    assert 'class="case"' in few and 'class="case many"' in crowd
    assert all(f">{name}</text>" in crowd for name in ("m0", "m6"))


def test_ratios_are_paired_by_round(report):
    dense, pruned = report.figures()
    assert dense["ttft_ratio"]["median"] == 1
    assert pruned["ttft_ratio"]["median"] == 1.0  # of 1.5, 0.5 and 1.0
    assert pruned["ttft"]["median"] == 0.03
    assert json.loads(json.dumps(report.to_dict()))["pipelines"][1]["kinds"]["read"]["right"] == 4


def test_page_is_the_same_twice(report):
    assert render(report) == render(report)


def test_interval_holds_its_share():
    for right, total in ((40, 40), (0, 40), (96, 96), (1, 1)):
        low, high = wilson(right, total)
        assert 0 <= low <= right / total <= high <= 1
