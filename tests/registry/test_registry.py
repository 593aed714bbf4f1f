"""Names come from files and entry points; other people's packages are installed, broken and colliding here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vtoken
from vtoken import config, registry
from vtoken.adapters.base import Adapter
from vtoken.config.schema import schema as pipeline_schema
from vtoken.errors import ConfigError, UnsupportedError, VtokenError
from vtoken.stages import Compressor, Pruner

MIDDLE = '''"""Middle: keep the first tokens."""
from typing import ClassVar

from vtoken.stages import Pruner, Site


class Middle(Pruner):
    """Keeps the first tokens. No paper: an example."""

    site: ClassVar[Site] = "decoder"
    name: ClassVar[str] = "middle"
    layer: int = 2

    def score(self, tokens):
        return -tokens.raster_index.float()


class _Helper(Pruner):
    pass
'''

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package with one module and these entry points on sys.path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def package(module: str, source: str, points: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(points)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return package


def refusal(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(VtokenError) as caught:
        call(*args)
    return str(caught.value)


def test_names_come_from_file_names() -> None:
    files = {"pruner": "pruners", "compressor": "compressors"}
    root = Path(vtoken.__file__).parent
    for kind, folder in files.items():
        expected = {f.stem: f.parent.name for f in (root / folder).glob("*/*.py") if not f.stem.startswith("_")}
        assert vtoken.available(kind) == sorted(expected)  # type: ignore[call-overload]
        for name, site in expected.items():
            cls = registry.stage(name)
            assert (cls.name, cls.kind, cls.site) == (name, kind, site), "the folder says kind and site"
    assert {name.partition("-")[0] for name in vtoken.available("preset")} == {
        f.stem for f in (root / "presets").iterdir()
    }
    assert "llava" in vtoken.available("adapter") and "base" not in vtoken.available("adapter")
    assert vtoken.available() == {kind: vtoken.available(kind) for kind in registry.KINDS}  # type: ignore[call-overload]


def test_asking_for_names_imports_nothing_heavy() -> None:
    code = "import sys, vtoken; vtoken.available(); assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_met_with_a_suggestion() -> None:
    assert "unknown stage 'fastervm', did you mean 'fastervlm'? `vtoken list` shows all" == refusal(
        registry.stage, "fastervm"
    )
    assert "unknown kind 'pruners', did you mean 'pruner'?" in refusal(vtoken.available, "pruners")
    with pytest.raises(UnsupportedError, match="unknown model_type 'llama', did you mean 'llava'"):
        registry.adapter("llama")
    assert "unknown model_type 'base'" in refusal(registry.adapter, "base")
    assert isinstance(ConfigError(""), ValueError) and isinstance(UnsupportedError(""), TypeError)


def test_adapters_by_model_type() -> None:
    for name in registry.adapters():
        cls = registry.adapter(name)
        assert issubclass(cls, Adapter) and cls.model_type == name


@pytest.mark.parametrize("target", ["acme_good:Middle", "acme_good"])
def test_a_stage_of_another_package(install: Install, target: str, tmp_path: Path) -> None:
    install("acme_good", MIDDLE, f"[vtoken.stages]\nmiddle = {target}\n")
    assert "acme_good" not in sys.modules and "middle" in registry.stages()
    assert not registry.is_built_in("middle")
    assert "middle" in vtoken.available("pruner") and "middle" not in vtoken.available("compressor")
    assert config.load("middle:25%").stages[0].model_dump() == {"keep": "25%", "layer": 2}
    assert "middle" in pipeline_schema()["properties"]["stages"]["items"]["anyOf"][0]["properties"]
    late = tmp_path / "late.yaml"
    late.write_text("stages:\n  - middle: {keep: 9}\n  - random: {keep: 4}\n")
    assert refusal(config.load, late).startswith(
        f"{late}:3: stage 'random' acts at site tokens but comes after 'middle'"
    )


def test_a_stage_that_takes_a_taken_name(install: Install) -> None:
    install("acme_clash", MIDDLE, "[vtoken.stages]\nrandom = acme_clash:Middle\n")
    message = refusal(registry.stage, "random")
    assert "vtoken itself (vtoken.pruners.tokens.random)" in message and "acme_clash 1.2 (acme_clash:Middle)" in message
    assert registry.stage("uniform").name == "uniform"
    assert registry.stages().count("random") == 1 and vtoken.available("pruner").count("random") == 1
    assert "random" in registry.catalogue()[1] and "random" not in registry.catalogue()[0]


def test_two_packages_that_take_one_name(install: Install) -> None:
    install("acme_one", MIDDLE, "[vtoken.stages]\nmiddle = acme_one:Middle\n")
    install("acme_two", MIDDLE, "[vtoken.stages]\nmiddle = acme_two:Middle\n")
    message = refusal(registry.stage, "middle")
    assert "acme_one 1.2" in message and "acme_two 1.2" in message


@pytest.mark.parametrize(
    ("source", "point", "words"),
    [
        (MIDDLE.replace('"middle"', '"centre"'), "acme_bad:Middle", 'declare `name: ClassVar[str] = "middle"`'),
        (MIDDLE.replace('    name: ClassVar[str] = "middle"\n', ""), "acme_bad", "calls itself 'acme_bad'"),
        (
            "import no_such_module",
            "acme_bad:Middle",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such",
        ),
        ("1 / 0", "acme_bad:Middle", "ZeroDivisionError"),
        (MIDDLE, "acme_bad:Nothing", "cannot be imported: AttributeError"),
        ("Middle = dict", "acme_bad:Middle", "is not a subclass of vtoken.stages.base.Stage"),
        ("x = 1", "acme_bad", "must define exactly one public Stage subclass, found none"),
        (MIDDLE + "class Two(Pruner):\n    pass\n", "acme_bad", "found Middle, Two"),
        (MIDDLE.replace('"decoder"', '"nowhere"'), "acme_bad", "one of pixels, frames, encoder, tokens"),
    ],
)
def test_a_broken_stage_matters_only_when_it_is_asked_for(
    install: Install, source: str, point: str, words: str
) -> None:
    install("acme_bad", source, f"[vtoken.stages]\nmiddle = {point}\n")
    assert "middle" in registry.stages() and config.load("random:4")
    message = refusal(registry.stage, "middle")
    assert words in message and "acme_bad" in message
    usable, broken = registry.catalogue()
    assert broken == {"middle": message} and "random" in usable
    assert "middle" not in vtoken.available("pruner")


def test_adapters_of_other_packages(install: Install) -> None:
    source = "from vtoken.adapters.llava import Llava\n\n\nclass Mine(Llava):\n    model_type = 'my_vlm'\n"
    install("acme_vlm", source, "[vtoken.adapters]\nmy_vlm = acme_vlm:Mine\nother_vlm = acme_vlm\nllava = acme_vlm\n")
    assert registry.adapter("my_vlm").__name__ == "Mine"
    assert 'declare `model_type: ClassVar[str] = "other_vlm"`' in refusal(registry.adapter, "other_vlm")
    assert "vtoken itself (vtoken.adapters.llava) and by package acme_vlm 1.2" in refusal(registry.adapter, "llava")


def test_base_classes_are_no_stages() -> None:
    assert not {"pruner", "compressor", Pruner.name, Compressor.name} & set(registry.stages())


def test_chunked_decoders_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="within chunks"):
        registry.adapter("llama4")


def test_a_tower_whose_tokens_are_of_one_patch_or_four_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="one patch or four"):
        registry.adapter("video_llama_3")
