"""Saves a wrapped model with its pipeline, in a folder or on the Hub; `vtoken.wrap(model)` finds the pipeline there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vtoken import config, registry
from vtoken.config import Pipeline
from vtoken.config.beside import FILE, FOLDER
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.session import session_of
from vtoken.stages import Stage


def save(model: Any, folder: str | os.PathLike[str], **options: Any) -> Path:
    """Saves a wrapped model: the files of its own `save_pretrained`, `vtoken.yaml`, and under `vtoken/` copies of the
    files that stages name (gates, routers), as they are on disk now. Returns the folder.

    A PeftModel saves its adapter only, and `wrap` does not look for a pipeline beside an adapter: pass the folder,
    `vtoken.wrap(model, folder)`.

    Args:
        options: passed to the model's `save_pretrained`.

    Raises:
        UnsupportedError: the model is not wrapped.
        ConfigError: a stage cannot be named in a file, or a file that a stage names is gone.
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
    moved = _moved(session.pipeline, copies)
    model.save_pretrained(folder, **options)
    for name, source in copies.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        if not (folder / name).exists() or not os.path.samefile(source, folder / name):
            shutil.copyfile(source, folder / name)
    (folder / FILE).write_text(config.dump(moved), encoding="utf-8")
    _forget(folder / "config.json")
    return folder


def push_to_hub(model: Any, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Saves a wrapped model, as `save` does, to a repository on the Hub, which is created if it does not exist; returns
    its address.

    Raises:
        UnsupportedError, ConfigError: as in `save`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(model, folder)
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model with its vtoken pipeline")
    return str(made)


def _moved(pipeline: Pipeline, copies: dict[str, str], first: int = 0) -> Pipeline:
    """The pipeline, its draft and its contrast, with file options changed to where the copies will be. Stages are
    numbered from `first`."""
    stages = tuple(_stage_moved(stage, k, copies) for k, stage in enumerate(pipeline.stages, first))
    draft = None if pipeline.draft is None else _moved(pipeline.draft, copies, first + len(stages))
    against = pipeline.contrast
    if against is not None:
        after = first + len(stages) + (0 if draft is None else len(draft.stages))
        against = replace(against, pipeline=_moved(against.pipeline, copies, after))
    return replace(pipeline, stages=stages, draft=draft, contrast=against)


def _stage_moved(stage: Stage, number: int, copies: dict[str, str]) -> Stage:
    """The stage with its file options changed to where the copies will be; adds new name -> file to `copies`."""
    if stage.name not in registry.stages():
        raise ConfigError(f"stage {stage.name!r} has no entry point, so {FILE} cannot name it; see CONTRIBUTING.md")
    moved = {}
    for option in stage.file_options():
        value = getattr(stage, option)
        if not isinstance(value, str) or (not os.path.isfile(value) and "." not in value):
            continue  # numbers, or the name of a shipped file
        if not os.path.isfile(value):
            raise ConfigError(f"stage {stage.name!r}: the file {value!r} of option {option!r} is gone; put it back")
        moved[option] = f"{FOLDER}/{number}-{stage.name}-{option}{Path(value).suffix}"
        copies[moved[option]] = value
    return stage.model_copy(update=moved)


def _forget(file: Path) -> None:
    """Removes the pipeline that the config was loaded with, which would take precedence over vtoken.yaml."""
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if data.pop("vtoken", None) is not None:
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
