"""The families that tests know, by `model_type`: one file each."""

from importlib import import_module
from pathlib import Path

from family import Family

FOUND: dict[str, Family] = {
    file.stem: import_module(f"families.{file.stem}").Tiny(file.stem)
    for file in sorted(Path(__file__).parent.glob("[!_]*.py"))
}
