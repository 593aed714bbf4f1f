"""What a type checker sees of an editable install: signatures, and that a mistake is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD = """\
import vtoken

class Model:
    def __call__(self, *args: object, **kwargs: object) -> object: ...

model = Model()
reveal_type(vtoken.wrap(model, "fastervlm-64"))
reveal_type(vtoken.unwrap(model))
reveal_type(vtoken.trace(model).tokens_out)
with vtoken.wrapped(model, {"stages": []}) as same:
    reveal_type(same)
reveal_type(vtoken.available("preset"))
"""
BAD = """\
import vtoken

model = len
vtoken.wrap(model, 64)
vtoken.wrap("llava-hf/llava-1.5-7b-hf", "fastervlm-64")
vtoken.warp(model, "fastervlm-64")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds vtoken's editable install and nothing else."""
    folder = tmp_path_factory.mktemp("types")
    project = folder / "project"
    shutil.copytree(ROOT / "vtoken", project / "vtoken", ignore=shutil.ignore_patterns("__pycache__", "reference"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    venv.create(folder / "env", with_pip=False)
    code = f"from setuptools.build_meta import build_editable; build_editable({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project, capture_output=True)
    (wheel,) = folder.glob("vtoken-*.whl")
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    return folder / "env" / "bin" / "python"


def checked(python: Path, text: str) -> str:
    """What mypy says of a file somewhere else, in its own words."""
    file = python.parents[2] / "mine.py"
    file.write_text(text)
    words = [
        "--python-executable",
        str(python),
        "--ignore-missing-imports",
        "--cache-dir",
        str(python.parents[2] / "c"),
    ]
    command = [sys.executable, "-m", "mypy", "--config-file=", *words, str(file)]
    # Whoever runs the tests may have the checkout on the path; the install alone is to lead there.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=python.parents[2], env=clean, capture_output=True, text=True).stdout


def test_types_are_seen(installed: Path) -> None:
    said = checked(installed, GOOD)
    found = re.findall(r'Revealed type is "(.*)"', said)
    assert "error" not in said
    assert [re.sub(r"builtins\.|mine\.", "", each) for each in found] == [
        "Model",
        "Model",
        "list[int]",
        "Model",
        "list[str]",
    ]


def test_mistakes_are_errors(installed: Path) -> None:
    errors = re.findall(r"mine\.py:(\d+): error: (.*)", checked(installed, BAD))
    assert [line for line, _ in errors] == ["4", "5", "6"]
    assert 'has incompatible type "int"' in errors[0][1] and '"M" of "wrap" cannot be "str"' in errors[1][1]
    assert 'Module has no attribute "warp"' in errors[2][1]
