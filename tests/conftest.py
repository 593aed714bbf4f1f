"""One thread per test process (they run side by side), no network, quiet transformers; GPU tests only where there is a
GPU."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

torch.set_num_threads(1)
# Helpers assert as well: a failure there shows its values.
HELPERS = [file.stem for room in ("support", "known") for file in (Path(__file__).parent / room).glob("*.py")]
pytest.register_assert_rewrite(*HELPERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
