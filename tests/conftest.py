"""One thread per test process (they run side by side), no network, quiet transformers; GPU tests only where there is a
GPU; of families a share of the tests, larger where they lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent
# Helpers assert as well: a failure there shows its values.
HELPERS = [file.stem for room in ("support", "known") for file in (ROOT / room).glob("*.py")]
pytest.register_assert_rewrite(*HELPERS)

# What runs on every family: its adapter, what upstream computes of it, its costs. Of the rest, one test in SHARE, spread
# by name, so that every stage and every mode meets some of them.
WHOLE = (
    "adapters/test_declared.py",
    "contract/test_oracle.py",
    "evals/cost/test_builtin_configs.py",
    "evals/cost/test_geometry.py",
)
SHARE = 32
# Of the tests of a leading family beside those, about half.
LEADING = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", action="store_true", help="all tests of all families and stages, as with -k NAME")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    named = config.getoption("keyword") or any("::" in argument for argument in config.args)
    if config.getoption("families") or named:
        return
    left_out = [item for item in items if not drawn(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def drawn(item: pytest.Item) -> bool:
    """Whether `make test` runs it."""
    given, (leading, others) = set(strings(vars(item).get("callspec", None))), names()
    if item.path.relative_to(ROOT).as_posix() in WHOLE or not given & (leading | others):
        return True
    return not crc32(item.nodeid.encode()) % (SHARE if given & others else LEADING)


@cache
def names() -> tuple[set[str], ...]:
    """Families that lead, and the others."""
    import tiny

    return set(tiny.families(leading=True)), set(tiny.families(leading=False))


def strings(given: Any) -> Iterator[str]:
    """All that stand in the parameters of a test."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from strings(each)
    elif params := getattr(given, "params", None):
        yield from strings(list(params.values()))
