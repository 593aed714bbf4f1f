"""Every registered method against its known answer: a function of its name in one of the files known_*.py."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from vtoken import registry
from vtoken.stages.budget import Budget

FILES = [import_module(file.stem) for file in sorted(Path(__file__).parents[1].glob("known/known_*.py"))]
KNOWN = {name: vars(module)[name] for module in FILES for name in registry.stages() if name in vars(module)}


@pytest.mark.parametrize("name", registry.stages())
def test_known_answer(name):
    KNOWN[name]()


@pytest.mark.parametrize(
    "value, lengths, row, want",
    [
        (64, (576, 40), (0, 0), (64, 40)),
        ("25%", (576, 3, 1), (0, 0, 1), (144, 1, 1)),
        ("33.3%", (1000,), (0,), (333,)),
        ("29%", (100,), (0,), (29,)),
        ("11.1%", (576, 577, 100), (0, 0, 0), (64, 64, 11)),
        ("22.2%", (576,), (0,), (128,)),
        ("33.3%", (576,), (0,), (192,)),
        ("50%", (5, 7, 1), (0, 0, 0), (2, 3, 1)),
        ("30%", (5, 2), (0, 0), (1, 1)),
        ({"total": 640}, (576, 1728), (0, 0), (160, 480)),
        ({"total": 10}, (7, 7, 7, 5), (0, 0, 0, 1), (4, 3, 3, 5)),
        ({"total": 2}, (10, 10, 10), (0, 0, 0), (1, 1, 1)),
        ({"total": 3}, (100, 1, 1), (0, 0, 0), (1, 1, 1)),
        ({"per_frame": 3}, (16, 2), (0, 0), (3, 2)),
        (1, (0,), (0,), (0,)),
    ],
)
def test_budget(value, lengths, row, want):
    assert Budget(value).counts(lengths, row) == want
    assert Budget(Budget(value).plain()) == Budget(value)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1.0,
        0.5,
        True,
        "0%",
        "101%",
        "x",
        "%",
        "64",
        "1/3%",
        "1e1%",
        {"total": 0},
        {"totl": 3},
        {"per_crop": 0},
        {"per_crop": 1, "total": 2},
        None,
        [3],
    ],
)
def test_bad_budget(value):
    with pytest.raises(ValueError, match="keep"):
        Budget(value)
