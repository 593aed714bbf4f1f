"""Options of `vtoken eval`, and the YAML file of `vtoken sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator, model_validator

from vtoken.evals.shared.options import DeviceOptions, SpeedOptions, option

if TYPE_CHECKING:
    from vtoken.config import Pipeline


class EvalOptions(DeviceOptions):
    """How a model is asked; the same in a sweep."""

    limit: int | None = option(None, "first N documents of every task (default: all)", ge=1)
    batch_size: int = option(1, "prompts at a time", ge=1)
    attn: str | None = option(None, "attention implementation (default: transformers' choice)")
    revision: str | None = option(None, "of a hub model (default: main)")
    min_pixels: int | None = option(None, "of a picture, Qwen (default: the processor's own)", ge=1)
    max_pixels: int | None = option(None, "of a picture, Qwen (default: the processor's own)", ge=1)
    frames: int = option(8, "most of a video", ge=1)
    system_prompt: str | None = option(None, "text, or a file that holds it (default: the template's)", "TEXT")
    max_new_tokens: int | None = option(None, "in place of what the tasks say", ge=1)
    prompts: str | None = option(None, "lmms-eval's model name whose prompts to use, as qwen_vl")
    include: tuple[Path, ...] = option((), "folders with tasks of yours", "DIR")

    def model_args(self) -> dict[str, Any]:
        """Arguments of `VtokenModel`, model and device aside."""
        names = {*EvalOptions.model_fields} - {"device", "limit", "attn", "prompts", "include"}
        return {"attn_implementation": self.attn, **self.model_dump(include=names)}


class Sweep(EvalOptions):
    """Pipelines x tasks, or methods x budgets x tasks, or both."""

    model: str = option(..., "shipped model (tiny-llava), local folder or hub name")
    tasks: tuple[str, ...] = option(..., "lmms-eval's tasks and groups, or suites")
    pipelines: tuple[str, ...] = option((), "presets, method:budget or YAML files")
    methods: tuple[str, ...] = option((), "stages that take a budget; each at every budget")
    budgets: tuple[Any, ...] = option((), "what `keep` accepts: 64, 25%, {total: 640}")
    speed: SpeedOptions | None = option(None, "options of the speed pass, {} for all defaults; none if left out")

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
        from vtoken.config import load

        crossed = [
            f"{method}:{json.dumps(budget) if isinstance(budget, dict) else budget}"
            for method in self.methods
            for budget in self.budgets
        ]
        return [load(each) for each in (*self.pipelines, *crossed)]
