"""Pipelines that travel with a model: in its config, in a file beside its weights, or in a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError, shown

FILE = "vtoken.yaml"
FOLDER = "vtoken"  # beside FILE; holds the files that options name
SAVE = "vtoken.save(model, folder) writes one"


def is_repository(text: str) -> bool:
    """Whether the text looks like the name of a repository: owner/name, or owner/name@revision."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", text) is not None


def in_folder(folder: Path) -> Path:
    """The pipeline file in a model's folder.

    Raises:
        ConfigError: there is none.
    """
    if not os.path.isfile(folder / FILE):
        raise ConfigError(f"{shown(str(folder))} is a folder without {FILE}; {SAVE}, or write a path to a YAML file")
    return folder / FILE


def on_hub(text: str) -> Path:
    """The pipeline file in a repository on the Hub, downloaded once together with the files that it names.

    Raises:
        ConfigError: there is no such repository, the Hub cannot be reached, or the repository holds no pipeline file.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = text.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=[FILE, f"{FOLDER}/*"])
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"cannot read repository {text!r} from the Hub: {type(error).__name__}: {reason}; check its name, "
            "`hf auth login` and the network"
        ) from error
    if not os.path.isfile(Path(folder, FILE)):
        raise ConfigError(f"repository {repository!r} of the Hub holds no {FILE}; {SAVE}, vtoken.push_to_hub, too")
    return Path(folder, FILE)


def of_model(config: Any) -> tuple[Any, str]:
    """The pipeline under `vtoken` in a model's config, or else the place of its weights, where the file is: both in a
    form that `load` takes. And the prefix of errors about it.

    Raises:
        ConfigError: there is neither.
    """
    pipeline = getattr(config, "vtoken", None)
    if pipeline is not None:
        return pipeline, "`vtoken` of the model's config"
    nothing = "no pipeline was given, and the model's config has no `vtoken`"
    name, revision = str(getattr(config, "name_or_path", "")), getattr(config, "_commit_hash", None)
    if os.path.isdir(name):
        return Path(name), nothing
    if is_repository(name):
        return f"{name}@{revision}" if revision else name, nothing
    raise ConfigError(
        f"{nothing}; it was not loaded from a folder or the Hub either (name_or_path {shown(name)}). Name one, as in "
        'vtoken.wrap(model, "fastervlm-64")'
    )
