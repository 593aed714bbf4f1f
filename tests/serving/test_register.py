"""The entry point runs in every vLLM process of everybody who has vtoken installed."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from ast import literal_eval
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from vtoken.serving import vllm as plugin
from vtoken.serving.family import families

ROOT = Path(__file__).parents[2]
MODELS = {family.architecture: family.model for family in families().values()}


@pytest.fixture
def stand_in(monkeypatch):
    """vLLM as far as the entry point looks at it."""
    registered = {}
    module = SimpleNamespace(
        __version__="0.32.0",
        ModelRegistry=SimpleNamespace(register_model=registered.__setitem__),
        registered=registered,
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_the_entry_point_is_the_function():
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = group["vtoken"].partition(":")
    assert getattr(import_module(module), name) is plugin.register


def test_models_are_named_and_nothing_is_imported(tmp_path):
    (tmp_path / "vllm.py").write_text(
        "__version__ = '0.32.1'\nseen = {}\nclass ModelRegistry:\n    register_model = staticmethod(seen.__setitem__)\n"
    )
    code = (
        "import sys; from vtoken.serving.vllm import register; register(); register(); import vllm; print(vllm.seen)\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'vtoken.stages', 'vtoken.config'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert literal_eval(done.stdout) == MODELS


def test_models_that_are_named_are_there():
    assert MODELS
    for path in MODELS.values():
        module, _, name = path.partition(":")
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert f"\nclass {name}(" in file.read_text()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4+cpu", "0.32.0.dev3"])
def test_versions_that_were_tried(stand_in, version, caplog):
    stand_in.__version__ = version
    plugin.register()
    assert stand_in.registered == MODELS and not caplog.records


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_another_version_keeps_its_models_and_is_told(stand_in, version, caplog):
    stand_in.__version__ = version
    with caplog.at_level(logging.INFO):
        plugin.register()
    assert not stand_in.registered
    (record,) = caplog.records
    assert version in record.getMessage() and "0.32" in record.getMessage()
