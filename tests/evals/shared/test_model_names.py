"""A name that is no model is refused at once: nothing is asked of the network, and the nearest name is suggested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from vtoken.cli import main
from vtoken.errors import ConfigError
from vtoken.evals import processors, reference
from vtoken.evals.shared import models, samples
from vtoken.evals.shared.configs import resolve_config
from vtoken.evals.shared.identity import weights

WAYS = {
    "model": models.load,
    "random weights": lambda name: models.load(name, random_weights=True),
    "config": resolve_config,
    "processor": processors.load,
    "samples": samples.load,
    "sweep": lambda name: weights(name, None),
}
NAMES = {
    "tiny-lava": "unknown model 'tiny-lava', did you mean 'tiny-llava'?",
    "tiny-qwen2.5vl": "did you mean 'tiny-qwen2.5-vl'?",
    "llava-1.5-7b-hf": "did you mean 'llava-hf/llava-1.5-7b-hf'?",
    "Qwen2.5-VL-7B-Instruct": "did you mean 'Qwen/Qwen2.5-VL-7B-Instruct'?",
    "mine": "unknown model 'mine'. Known: ",
    "": "unknown model ''. Known: ",
    "./mine": "no model folder './mine'",
    "/no/such/folder": "no model folder '/no/such/folder'",
    "a/b/c": "no model folder 'a/b/c'",
    "owner/a name": "no model folder 'owner/a name'",
    "x" * 5000: "unknown model 'xxx",
    "a\0b": "unknown model 'a\\x00b'",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: Any, *args: Any, **rest: Any) -> None:
        raise AssertionError(f"{name} was looked for")

    for cls in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor"):
        # Before 5.18 the last one cannot even be looked at without torchvision.
        if cls != "AutoImageProcessor" or Version(transformers.__version__) >= Version("5.18"):
            monkeypatch.setattr(getattr(transformers, cls), "from_pretrained", never)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:20].encode("unicode_escape").decode())
def test_what_cannot_be_a_model_is_refused_at_once(way: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WAYS[way](name)
    assert NAMES[name] in str(caught.value) and len(str(caught.value)) < 2500


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["owner/model", "owner/model-1.5_x"])
def test_names_of_the_hub_are_looked_for(way: str, name: str) -> None:
    with pytest.raises(AssertionError, match=f"{name} was looked for"):
        WAYS[way](name)


COMMANDS = [
    "show tiny-lava none PICTURE", "bench tiny-lava fastv:4", "flops tiny-lava fastv:4", "calibrate vtw tiny-lava",
    "train-exit tiny-lava --data reference -o OUT", "calibrate dtome tiny-lava --images FOLDER -o OUT", "demo --model "
                                                                                                        "tiny-lava",
]  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_suggest_the_name(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    places = {"PICTURE": tmp_path / "a.png", "OUT": tmp_path / "out", "FOLDER": tmp_path}
    assert main([str(places.get(word, word)) for word in line.split()]) == 2
    assert "model 'tiny-lava', did you mean 'tiny-llava'?" in capsys.readouterr().err


def test_the_reference_suggests_the_name() -> None:
    for ask in (reference.path, reference.load):
        with pytest.raises(ConfigError, match="unknown reference model 'tiny-lava', did you mean 'tiny-llava'"):
            ask("tiny-lava")


def test_an_error_without_a_message_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **named: object) -> None:
        raise OSError

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(ConfigError, match=r"nor on the hub \(OSError\)"):
        resolve_config("owner/model")
    with pytest.raises(ConfigError, match="cannot find model 'owner/model': OSError"):
        weights("owner/model", None)
