"""The notebooks run from their first cell to their last, offline, and what is kept of a run is small."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
MISSING = [name for name in ("nbconvert", "ipykernel") if find_spec(name) is None]


def cells(file: Path) -> list[dict]:
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make docs installs them)")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    book = run.executed(file)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert [bool(cell.outputs) for cell in code] == [bool(cell["outputs"]) for cell in cells(file)]
    sys.modules.pop("run")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_kept_is_a_whole_run_and_small(file: Path) -> None:
    assert file.stat().st_size < 60_000
    text = file.read_text(encoding="utf-8")
    assert str(FOLDER.parents[1]) not in text and "site-packages" not in text and '"stderr"' not in text
    assert [cell["execution_count"] for cell in cells(file)] == [*range(1, len(cells(file)) + 1)]
    assert not [cell for cell in cells(file) if any(out["output_type"] == "error" for out in cell["outputs"])]


def test_there_are_two() -> None:
    assert [file.stem for file in FILES] == ["compare_methods", "prune_your_vlm"]
