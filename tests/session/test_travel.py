"""A pipeline travels with its model: saved beside the weights, found there and on the Hub."""

from __future__ import annotations

import json
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import gates
import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForImageTextToText

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.stages import Pruner

GATED = {"positions": "compact", "stages": [{"fastervlm": {"keep": 7}}, {"dyvte": {"gates": gates.file(3)}}]}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.build(model, [[3, "img", 5, 6, 7]], seed=3)).logits


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, moved away from where it was saved and from the file of its gates."""
    first, then = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("then") / "mine"
    own = shutil.copy(gates.file(3), first / "own.safetensors")
    with vtoken.wrapped(tiny.llava(), [{"fastervlm": {"keep": 7}}, {"dyvte": {"gates": str(own)}}]) as model:
        torch.save(logits(model), first / "logits.pt")
        assert vtoken.save(model, first / "saved") == first / "saved"
    shutil.copytree(first / "saved", then)
    torch.save(torch.load(first / "logits.pt"), then / "logits.pt")
    shutil.rmtree(first)
    return then


def test_a_saved_model_brings_its_pipeline(home: Path) -> None:
    model = loaded(home)
    dense = logits(model)
    assert vtoken.wrap(model) is model
    found = vtoken.pipeline(model)
    assert found and found.name == "mine" and [stage.name for stage in found.stages] == ["fastervlm", "dyvte"]
    assert torch.equal(logits(model), torch.load(home / "logits.pt")) and not torch.equal(logits(model), dense)
    vtoken.unwrap(model)
    with vtoken.wrapped(model), vtoken.wrapped(tiny.llava(), home):
        pass


def test_files_are_named_relatively_and_lie_apart(home: Path) -> None:
    text = (home / "vtoken.yaml").read_text(encoding="utf-8")
    assert "dyvte: {gates: vtoken/1-dyvte-gates.safetensors}" in text and str(home) not in text
    assert [file.name for file in home.glob("*.safetensors")] == ["model.safetensors"], "loaders take every one"
    assert [file.name for file in (home / "vtoken").iterdir()] == ["1-dyvte-gates.safetensors"]


def test_saving_where_it_came_from_changes_nothing(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home, tmp_path / "mine")
    before = {file.name: file.read_bytes() for file in folder.rglob("*") if file.suffix in (".yaml", ".safetensors")}
    vtoken.save(vtoken.wrap(loaded(folder)), folder)
    assert before == {f.name: f.read_bytes() for f in folder.rglob("*") if f.suffix in (".yaml", ".safetensors")}


def test_the_config_may_say_it(tmp_path: Path) -> None:
    model = tiny.llava()
    model.config.vtoken = "fastervlm:5"
    model.save_pretrained(tmp_path / "a")
    again = vtoken.wrap(loaded(tmp_path / "a"))
    assert repr(vtoken.pipeline(again)) == repr(config.load("fastervlm:5"))
    vtoken.unwrap(again)
    vtoken.save(vtoken.wrap(again, "fastervlm:6"), tmp_path / "b")
    assert "vtoken" not in json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))
    assert repr(vtoken.pipeline(vtoken.wrap(loaded(tmp_path / "b")))) == repr(config.load("fastervlm:6"))
    assert again.config.vtoken == "fastervlm:5", "the model keeps what it was given"


def test_files_beside_any_pipeline_file(tmp_path: Path, monkeypatch: Any) -> None:
    """Relative to it; otherwise to where Python runs, as on a command line."""
    (tmp_path / "sub").mkdir()
    shutil.copy(gates.file(3), tmp_path / "sub" / "g.safetensors")
    shutil.copy(gates.file(4), tmp_path / "here.safetensors")
    for name in ("g", "here"):
        (tmp_path / "sub" / f"{name}.yaml").write_text(f"stages: [dyvte: {{gates: {name}.safetensors}}]\n")
    monkeypatch.chdir(tmp_path)
    (stage,) = config.load("sub/g.yaml").stages
    assert Path(stage.gates) == tmp_path / "sub" / "g.safetensors"
    (stage,) = config.load("sub/here.yaml").stages
    assert stage.gates == "here.safetensors"


API, DOWNLOAD = huggingface_hub.HfApi, huggingface_hub.snapshot_download


class Hub:
    """A stand-in for the client, that takes what the client takes: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []

    def snapshot_download(self, repository: str, revision: Any = None, allow_patterns: Any = None) -> str:
        signature(DOWNLOAD).bind(repository, revision=revision, allow_patterns=allow_patterns)
        self.asked.append((repository, revision, allow_patterns))
        if not (self.root / repository).is_dir():
            raise LocalEntryNotFoundError("no such repository, or no network\nmore words")
        return str(self.root / repository)

    def create_repo(self, repository: str, private: Any, exist_ok: bool) -> Any:
        signature(API.create_repo).bind(self, repository, private=private, exist_ok=exist_ok)
        assert exist_ok
        (self.root / repository).mkdir(parents=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repository}")

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        given = {"repo_id": repo_id, "folder_path": folder_path, "commit_message": commit_message}
        signature(API.upload_folder).bind(self, **given)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: hub)
    return hub


def test_to_the_hub_and_back(hub: Hub) -> None:
    with vtoken.wrapped(tiny.llava(), GATED) as model:
        want = logits(model)
        assert vtoken.push_to_hub(model, "someone/small") == "https://huggingface.co/someone/small"
    again = loaded(hub.root / "someone" / "small")
    again.config.name_or_path, again.config._commit_hash = "someone/small", "abc"
    with vtoken.wrapped(again):
        assert torch.equal(logits(again), want)
    assert hub.asked == [("someone/small", "abc", ["vtoken.yaml", "vtoken/*"])], "the weights are there already"
    with vtoken.wrapped(tiny.llava(), "someone/small") as other:
        found = vtoken.pipeline(other)
        assert found and found.name == "someone/small" and found.positions == "compact"


def refusal(call: Any, *given: Any) -> str:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        call(*given)
    return str(caught.value)


def test_where_nothing_is_found(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny.llava()
    said = refusal(vtoken.wrap, model)
    assert "no pipeline was given, and the model's config has no `vtoken`; it was not loaded from a folder" in said
    assert said.endswith('Name one, as in vtoken.wrap(model, "fastervlm-64")')
    model.save_pretrained(tmp_path / "plain")
    said = refusal(vtoken.wrap, loaded(tmp_path / "plain"))
    assert (
        f"has no `vtoken`: '{tmp_path}/plain' is a folder without vtoken.yaml; vtoken.save(model, folder) writes one"
        in said
    )
    model.config.name_or_path = "no/where"
    said = refusal(vtoken.wrap, model)
    assert "cannot read repository 'no/where' from the Hub: LocalEntryNotFoundError: no such repository" in said
    assert "more words" not in said and "`hf auth login`" in said
    (hub.root / "some" / "bare").mkdir(parents=True)
    assert "repository 'some/bare' of the Hub holds no vtoken.yaml" in refusal(vtoken.wrap, model, "some/bare")
    monkeypatch.chdir(tmp_path)
    assert "'plain' is a folder without vtoken.yaml" in refusal(vtoken.wrap, model, "plain")
    assert "expected a Hugging Face model" in refusal(vtoken.wrap, torch.nn.Linear)
    model.config.vtoken = "fastervml-64"
    assert "unknown preset 'fastervml-64', did you mean 'fastervlm-64'" in refusal(vtoken.wrap, model)


class Mine(Pruner):
    """A stage of a notebook."""


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny.llava()
    assert "not wrapped, so it has no pipeline to save" in refusal(vtoken.save, model, tmp_path / "x")
    with vtoken.wrapped(model, [Mine(keep=3)]):
        assert "stage 'test_travel' has no entry point" in refusal(vtoken.save, model, tmp_path / "x")
        with pytest.raises(ConfigError, match="would leave the pipeline behind"):
            vtoken.save(model, tmp_path / "x", push_to_hub=True)
    own = Path(shutil.copy(gates.file(3), tmp_path / "own.safetensors"))
    with vtoken.wrapped(model, [{"dyvte": {"gates": str(own)}}]):
        assert "is a file; write a folder" in refusal(vtoken.save, model, own)
        own.unlink()
        assert f"stage 'dyvte': the file '{own}' of option 'gates' is gone" in refusal(
            vtoken.save, model, tmp_path / "x"
        )
    assert not (tmp_path / "x").exists(), "nothing is written before it is known that all can be"
