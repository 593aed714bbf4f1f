"""What the workflows and the pre-commit hooks call exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in JOBS.items()}


def test_jobs_call_targets_and_files_that_exist() -> None:
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}
    called = {name for lines in COMMANDS.values() for line in lines for name in re.findall(r"^make ([\w-]+)", line)}
    assert called == {"test", "test-oldest", "docs", "wheel"} and called <= targets
    files = {name for lines in COMMANDS.values() for line in lines for name in re.findall(r"tests/[\w/.]+", line)}
    assert len(files) == 3 and all((ROOT / name).is_file() for name in files)
    assert COMMANDS["check"] == [".ci/run"]


def test_pythons_from_the_oldest_that_is_supported_on() -> None:
    tested = JOBS["tests"]["strategy"]["matrix"]["python-version"]
    assert tested == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == f">={tested[0]}"


def test_torch_is_that_of_the_constraints() -> None:
    (pinned,) = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for text in (*COMMANDS["app"], (ROOT / "Makefile").read_text(encoding="utf-8")):
        assert {*re.findall(r"torch==([\d.]+)", text)} <= {pinned}


def test_hooks_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    asked = {hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in hooks}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    made = {line.strip().removesuffix(" .") for line in re.findall(r"\$\(VENV\)/bin/(.*)", lint)}
    assert asked == made == {"ruff check", "ruff format --check", "mypy"}
