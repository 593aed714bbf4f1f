"""Runs the notebooks here and writes what they print and draw into them: `python docs/notebooks/run.py` (`make notebooks`).
Kept small: no warnings, no times of cells, no picture twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def executed(file: Path) -> Any:
    """The notebook, run from its first cell to its last in a fresh kernel, offline.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # So small a model gains nothing from more, and loses on busy cores.
    root = str(HERE.parents[1])  # Runs from a checkout that is not installed, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(file, as_version=4)
    ExecutePreprocessor(timeout=300).preprocess(book, {"metadata": {"path": str(HERE)}})
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "image/jpeg" in output.get("data", {}):
                output.data.pop("image/png", None)
    book.metadata.language_info = {"name": "python"}
    return book


if __name__ == "__main__":
    import nbformat

    for each in sorted(HERE.glob("*.ipynb")):
        nbformat.write(executed(each), each)
        print(f"{each.name}: {each.stat().st_size // 1024} kB")
