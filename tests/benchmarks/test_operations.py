"""What a pipeline adds to a prefill grows only on purpose: counts do not depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from operations import PIPELINES, model, operations, step


@pytest.fixture(scope="module")
def stock() -> tuple[Any, int, int, float]:
    made = model()
    return made, operations(made), operations(made, pictures=4), step(made)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_adds_no_more_operations_than_it_did(name: str, stock: tuple[Any, int, int, float]) -> None:
    made, one, four, _ = stock
    pipeline, *ceilings = PIPELINES[name]
    assert operations(made, pipeline) - one <= ceilings[0]
    assert operations(made, pipeline, pictures=4) - four <= ceilings[1]


@pytest.mark.parametrize("name", ["random:64", "fastv, two cuts", "flowcut:64, 22 layers", "snapkv:64, 4 layers"])
def test_a_generated_token_takes_no_more_operations(name: str, stock: tuple[Any, int, int, float]) -> None:
    assert step(stock[0], PIPELINES[name][0]) == stock[3]
