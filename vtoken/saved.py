"""A wrapped model with its pipeline, in a folder or on the Hub: `vtoken.wrap(model)` finds it there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vtoken import config, registry
from vtoken.config.beside import FILE, FOLDER
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.session import session_of
from vtoken.stages import Stage


def save(model: Any, folder: str | os.PathLike[str], **options: Any) -> Path:
    """Writes a wrapped model: what its own `save_pretrained` writes, `vtoken.yaml`, and in `vtoken/` copies of the
    files that stages name (gates, routers), as they are on disk now. Returns the folder. Of a PeftModel that is the
    adapter, beside which nobody looks: name the folder, `vtoken.wrap(model, folder)`.

    Args:
        options: as the model's `save_pretrained` takes them.

    Raises:
        UnsupportedError: the model is not wrapped.
        ConfigError: a stage that no file can name, or one whose file is gone.
    """
    session = session_of(model)
    if session is None:
        raise UnsupportedError("this model is not wrapped, so it has no pipeline to save; wrap it first")
    if options.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub=True would leave the pipeline behind; write vtoken.push_to_hub(model, repository)"
        )
    folder, copies = Path(folder), dict[str, str]()
    if os.path.isfile(folder):
        raise ConfigError(f"{str(folder)!r} is a file; write a folder")
    stages = tuple(_moved(stage, k, copies) for k, stage in enumerate(session.pipeline.stages))
    model.save_pretrained(folder, **options)
    for name, source in copies.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        if not (folder / name).exists() or not os.path.samefile(source, folder / name):
            shutil.copyfile(source, folder / name)
    (folder / FILE).write_text(config.dump(replace(session.pipeline, stages=stages)), encoding="utf-8")
    _forget(folder / "config.json")
    return folder


def push_to_hub(model: Any, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Writes a wrapped model, as `save` does, to a repository of the Hub, which is made if there is none; returns its
    address.

    Raises:
        UnsupportedError, ConfigError: as `save`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(model, folder)
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model with its vtoken pipeline")
    return str(made)


def _moved(stage: Stage, number: int, copies: dict[str, str]) -> Stage:
    """The stage with its files named where their copies will lie; notes them in `copies`, new name -> file."""
    if stage.name not in registry.stages():
        raise ConfigError(f"stage {stage.name!r} has no entry point, so {FILE} cannot name it; see CONTRIBUTING.md")
    moved = {}
    for option in stage.file_options():
        value = getattr(stage, option)
        if not isinstance(value, str) or (not os.path.isfile(value) and "." not in value):
            continue  # numbers, or the name of what is shipped
        if not os.path.isfile(value):
            raise ConfigError(f"stage {stage.name!r}: the file {value!r} of option {option!r} is gone; put it back")
        moved[option] = f"{FOLDER}/{number}-{stage.name}-{option}{Path(value).suffix}"
        copies[moved[option]] = value
    return stage.model_copy(update=moved)


def _forget(file: Path) -> None:
    """The pipeline that the config was loaded with, which would come before the file."""
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if said.pop("vtoken", None) is not None:
        file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
