"""Which pipelines the demo compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vtoken.config import Pipeline, load
from vtoken.errors import UnsupportedError, VtokenError
from vtoken.evals.cost.support_matrix import example_stage
from vtoken.evals.shared.dense import DENSE
from vtoken.hooks.state.trace import Trace
from vtoken.registry import adapter, catalogue
from vtoken.session import trace, watched, wrapped
from vtoken.stages import Stage

FEW = ("fastervlm", "uniform", "random", "resize")
FLOORS = ("uniform", "random", "resize")
DEPTH = 24  # of CLIP-L, which authors' layer numbers are about


@dataclass(frozen=True)
class DemoPipelines:
    """What is compared.

    Attributes:
        pipelines: by label, as "fastervlm:64" or "pool"; the first is "dense".
        shown: labels whose kept tokens the page shows: the middle budget of every method.
        left_out: method -> why it is not among them.
        options: method -> options other than the defaults.
    """

    pipelines: dict[str, Pipeline]
    shown: tuple[str, ...]
    left_out: dict[str, str]
    options: dict[str, dict[str, int]] = field(default_factory=dict)


def choose(model: Any, prompt: Any, budgets: Sequence[int], everything: bool = False) -> DemoPipelines:
    """Dense and every method at every budget: a few methods, or everything that runs on the model and changes this
    prompt.

    Args:
        prompt: model inputs of one question, batch 1.
        budgets: tokens to keep, descending.
        everything: all stages there are; those without a budget (filters, pooling) once, with their defaults.
    """
    pipelines = {DENSE.name: DENSE}
    left_out: dict[str, str] = {}
    changed: dict[str, dict[str, int]] = {}
    if everything:
        stages, broken = catalogue()
        left_out |= broken
        depth = len(adapter(model.config.model_type)(model).encoder.layers)
        # The floors first, then what has a budget, then the rest.
        order = sorted(stages, key=lambda name: (name not in FLOORS, "keep" not in stages[name].model_fields, name))
        for name in order:
            try:
                found, changed[name] = _runnable(stages[name], model, prompt, budgets, depth)
                pipelines |= found
            except VtokenError as error:
                left_out[name] = str(error)
    else:
        for method in FEW:
            found = _budgeted(method, budgets, {})
            try:
                with wrapped(model, next(iter(found.values()))):
                    pipelines |= found
            except UnsupportedError as error:
                left_out[method] = str(error)
    middle = str(budgets[len(budgets) // 2])
    shown = tuple(label for label in pipelines if label.partition(":")[2] in ("", middle))
    return DemoPipelines(pipelines, shown, left_out, {name: own for name, own in changed.items() if own})


def _runnable(
    cls: type[Stage], model: Any, prompt: Any, budgets: Sequence[int], depth: int
) -> tuple[dict[str, Pipeline], dict[str, int]]:
    """A stage at every budget, and the options that were fitted to the model."""
    if "keep" not in cls.model_fields:
        stage = example_stage(cls)
        if stage is None:
            raise VtokenError("has options without a default")
        _changing(cls, prefill(model, load(stage), prompt))
        return {cls.name: load(stage)}, {}
    options: dict[str, int] = {}
    found = _budgeted(cls.name, budgets, options)
    try:
        seen = prefill(model, next(reversed(found.values())), prompt)
    except UnsupportedError:
        options = _fitted(cls, depth)
        if not options:
            raise
        found = _budgeted(cls.name, budgets, options)
        seen = prefill(model, next(reversed(found.values())), prompt)
    _changing(cls, seen, budgets[-1])
    return found, options


def _changing(cls: type[Stage], seen: Trace, keep: int = 0) -> None:
    """Refuses a stage that is there to drop tokens and dropped none of a picture of more than `keep`."""
    if cls.site in ("frames", "tokens") and sum(seen.layers[-1]) == sum(seen.visual_tokens) > keep:
        raise VtokenError("leaves a single picture whole")


def _budgeted(name: str, budgets: Sequence[int], options: dict[str, int]) -> dict[str, Pipeline]:
    return {f"{name}:{k}": load([{name: {"keep": k, **options}}]) for k in budgets}


def _fitted(cls: type[Stage], depth: int) -> dict[str, int]:
    """Encoder layers that the defaults name and this tower does not have, at the same share of its depth."""
    named = {key: field.default for key, field in cls.model_fields.items() if key.endswith("_layer")}
    return {key: round(k * depth / DEPTH) for key, k in named.items() if isinstance(k, int) and k >= depth}


def prefill(model: Any, pipeline: Pipeline, prompt: Any) -> Trace:
    """What the pipeline does to one prompt."""
    with watched(model, pipeline):
        model.generate(**prompt, do_sample=False, max_new_tokens=1)
        return trace(model)
