"""What a sweep is to do: its YAML file, and the points that come of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field, field_validator, model_validator

import vtoken
from vtoken import config
from vtoken.config import Pipeline
from vtoken.errors import ConfigError
from vtoken.evals.lmms.suites import expand
from vtoken.evals.shared.names import locate
from vtoken.evals.shared.yaml_options import YamlOptions


class Speed(YamlOptions):
    """The speed pass: `vtoken bench` at batch 1, everything interleaved in one process."""

    new_tokens: int = Field(16, ge=1, description="generated per prompt, whatever the model would say")
    text_tokens: int = Field(32, ge=1, description="prompt tokens that are not visual")
    images: int = Field(1, ge=1, description="per prompt")
    frames: int = Field(1, ge=1, description="per image; above 1 it is a video")
    image_size: int | tuple[int, int] | None = Field(None, description="pixels, or [height, width]")
    repeats: int = Field(7, ge=1, description="rounds that count")
    warmup: int = Field(2, ge=0, description="rounds before them that do not")
    seed: int = Field(0, description="of texts and pictures")


class Sweep(YamlOptions):
    """Pipelines x tasks, or methods x budgets x tasks, or both."""

    model: str = Field(description="shipped model (tiny-llava), local folder or hub name")
    tasks: tuple[str, ...] = Field(description="lmms-eval's tasks and groups, or suites")
    pipelines: tuple[str, ...] = Field((), description="presets, method:budget or YAML files")
    methods: tuple[str, ...] = Field((), description="stages that take a budget; each at every budget")
    budgets: tuple[Any, ...] = Field((), description="what `keep` accepts: 64, 25%, {total: 640}")
    limit: int | None = Field(None, ge=1, description="first documents of every task; all if left out")
    batch_size: int = Field(1, ge=1, description="prompts at a time in the accuracy pass")
    device: str | None = Field(None, description="cpu, cuda or cuda:1; the GPUs if there are any")
    dtype: str | None = Field(None, description="float32, bfloat16 or float16; the model's own if left out")
    attn: str | None = Field(None, description="attention implementation")
    revision: str | None = Field(None, description="of a hub model")
    min_pixels: int | None = Field(None, ge=1, description="of a picture, Qwen")
    max_pixels: int | None = Field(None, ge=1, description="of a picture, Qwen")
    frames: int = Field(8, ge=1, description="most of a video")
    system_prompt: str | None = Field(None, description="text, or a file that holds it")
    max_new_tokens: int | None = Field(None, ge=1, description="in place of what the tasks say")
    prompts: str | None = Field(None, description="lmms-eval's model name whose prompts to use")
    include: tuple[Path, ...] = Field((), description="folders with tasks of yours")
    speed: Speed | None = Field(None, description="options of the speed pass, {} for all defaults; none if left out")

    @model_validator(mode="after")
    def _crossed(self) -> Sweep:
        if bool(self.methods) != bool(self.budgets):
            raise ValueError("methods and budgets go together: give both or neither")
        return self

    @field_validator("budgets")
    @classmethod
    def _plain(cls, budgets: tuple[Any, ...]) -> tuple[Any, ...]:
        if any(isinstance(budget, list) or budget is None for budget in budgets):
            raise ValueError("write budgets as a list of what `keep` accepts, as in [64, 25%]")
        return budgets

    def all_pipelines(self) -> list[Pipeline]:
        """Every pipeline, read and checked."""
        crossed = [
            f"{method}:{json.dumps(budget) if isinstance(budget, dict) else budget}"
            for method in self.methods
            for budget in self.budgets
        ]
        return [config.load(each) for each in (*self.pipelines, *crossed)]

    def model_args(self) -> dict[str, Any]:
        """Arguments of `VtokenModel`, the device aside."""
        names = ("dtype", "revision", "batch_size", "min_pixels", "max_pixels", "frames", "system_prompt")
        found = {name: getattr(self, name) for name in (*names, "max_new_tokens")}
        return {"pretrained": self.model, "attn_implementation": self.attn, **found}


@dataclass(frozen=True)
class Point:
    """One pipeline on one task.

    Attributes:
        run: number of the pipeline in the list; the first and the last are dense.
        key: names the point's file; the same if and only if everything that decides its numbers is.
    """

    run: int
    pipeline: Pipeline
    task: str
    key: str


def points(sweep: Sweep, runs: Sequence[Pipeline], commit: str | None) -> list[Point]:
    """Every pipeline of the list on every task, in this order."""
    common = {
        **sweep.model_dump(mode="json", include={"prompts", "limit"}),
        **sweep.model_args(),
        "device": sweep.device,
        "weights": weights(sweep.model, sweep.revision),
        "include": [_digest(sorted(f for f in folder.rglob("*") if f.is_file())) for folder in sweep.include],
        "versions": [vtoken.__version__, commit, torch.__version__, transformers.__version__],
    }
    last = len(runs) - 1

    def point(k: int, pipeline: Pipeline, task: str) -> Point:
        # The last dense run asks again what the first did; a pipeline's place in the list does not matter.
        own = [config.dump(pipeline), named_files(pipeline), task, "last" if k == last > 0 else "first"]
        return Point(k, pipeline, task, digest(common, own))

    return [point(k, pipeline, task) for k, pipeline in enumerate(runs) for task in expand(sweep.tasks)]


def digest(*what: Any) -> str:
    """Name of a file for plain data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]


def weights(name: str, revision: str | None) -> str | None:
    """What tells the model's weights from others of its name: the files' hash for a folder, the commit for a hub model.

    Raises:
        ConfigError: no such model.
    """
    folder = Path(locate(name))
    if folder.is_dir():
        return _digest(sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".jinja")))
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(name, revision=revision), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot find model {name!r}: {str(error).strip().splitlines()[0]}") from error


def named_files(pipeline: Pipeline) -> list[str]:
    """What tells the files that options name (gates, routers) from others of their names, in order."""
    options = [value for stage in pipeline.stages for value in stage.model_dump().values() if isinstance(value, str)]
    return [_digest([Path(value)]) for value in options if len(value) < 4096 and Path(value).is_file()]


@cache
def code() -> str:
    """What tells vtoken's own files from others."""
    return _digest(sorted(Path(vtoken.__file__).parent.rglob("*.py")))


def _digest(files: Sequence[Path]) -> str:
    """sha256 over names and contents; of files above 64 MB size and time of change instead."""
    found = hashlib.sha256()
    for file in files:
        about = file.stat()
        large = about.st_size > 64 * 2**20
        found.update(f"{file.name} {about.st_size} {about.st_mtime_ns if large else ''}".encode())
        found.update(b"" if large else file.read_bytes())
    return found.hexdigest()
