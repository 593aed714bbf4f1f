"""Prints this folder: `lmms-eval --include_path $(python -m vtoken.evals.lmms.tasks)`."""

from pathlib import Path

print(Path(__file__).parent)
