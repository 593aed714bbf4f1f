"""What a pipeline adds to a prefill grows only on purpose: counts do not depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from operations import PIPELINES, model, operations


@pytest.fixture(scope="module")
def stock() -> tuple[Any, int]:
    made = model()
    return made, operations(made)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_adds_no_more_operations_than_it_did(name: str, stock: tuple[Any, int]) -> None:
    made, dense = stock
    pipeline, ceiling = PIPELINES[name]
    assert operations(made, pipeline) - dense <= ceiling
