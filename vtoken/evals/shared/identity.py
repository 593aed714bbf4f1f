"""Fingerprints of weights, files and code, whose names stay the same when they are edited."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import vtoken
from vtoken.config import Pipeline
from vtoken.errors import ConfigError, reason
from vtoken.evals.shared.configs import locate

LARGE = 64 * 2**20  # bytes from which on a file's time of change stands for its content
KINDS = (".bin", ".jinja", ".json", ".model", ".safetensors", ".txt")  # files of a model, its tokenizer and processor


def digest(*what: Any) -> str:
    """Fingerprint of plain data, short enough to name a file."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]


def digest_files(files: Sequence[Path]) -> str:
    """sha256 over names and contents; of large files size and time of change instead."""
    found = hashlib.sha256()
    for file in files:
        status = file.stat()
        large = status.st_size > LARGE
        found.update(f"{file.name} {status.st_size} {status.st_mtime_ns if large else ''}".encode())
        found.update(b"" if large else file.read_bytes())
    return found.hexdigest()


def weights(name: str, revision: str | None) -> str | None:
    """Fingerprint of a model: a hash of its files if it is a folder, its commit on the hub."""
    folder = Path(locate(name))
    if folder.is_dir():
        return digest_files(sorted(file for file in folder.iterdir() if file.suffix in KINDS))
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(name, revision=revision), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot find model {name!r}: {reason(error)}") from error


def named_files(pipeline: Pipeline) -> list[str]:
    """Fingerprints of the files that options name (gates, routers), in order: of the pipeline's stages, of its draft's,
    of its contrast's."""
    contrast = None if pipeline.contrast is None else pipeline.contrast.pipeline
    stages = [stage for each in (pipeline, pipeline.draft, contrast) if each is not None for stage in each.stages]
    options = [value for stage in stages for value in stage.model_dump().values() if isinstance(value, str)]
    return [digest_files([Path(value)]) for value in options if os.path.isfile(value)]


@cache
def code() -> str:
    """Fingerprint of vtoken's own source."""
    return digest_files(sorted(Path(vtoken.__file__).parent.rglob("*.py")))


def commit() -> str | None:
    """The commit of the checkout that vtoken runs from, with "+" if files differ from it; None where it is installed
    from a wheel."""
    here = Path(vtoken.__file__)

    def git(*words: str) -> str:
        words = ("git", "-C", str(here.parent), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    try:
        if not git("ls-files", str(here)):
            return None
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
