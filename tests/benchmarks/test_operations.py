"""What a pipeline adds to a prefill grows only on purpose: counts do not depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from operations import PIPELINES, inputs, model, operations, step


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


@pytest.fixture(scope="module")
def masked(stock: tuple[Any, int, int, float]) -> bool:
    """Whether `generate` hands its padding mask to every step, as it did in 5.17: somebody has to look at it then."""
    masks = []
    handle = stock[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    stock[0].generate(**inputs(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    handle.remove()
    return masks[-1] is not None


@pytest.mark.parametrize(
    ("name", "most"),
    [("random:64", 9), ("fastv, two cuts", 31), ("flowcut:64, 22 layers", 9), ("snapkv:64, 4 layers", 9)],
)
def test_a_generated_token_takes_no_more_operations(
    name: str, most: int, stock: tuple[Any, int, int, float], masked: bool
) -> None:
    assert step(stock[0], PIPELINES[name][0]) - stock[3] <= (most if masked else 0)
