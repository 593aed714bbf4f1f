"""The demo's results as plain data and as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vtoken.evals.pictures.overlay import data_uri
from vtoken.evals.pictures.plots import plot
from vtoken.evals.statistics import spread, wilson

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Row:
    """What one pipeline scored and cost.

    Attributes:
        pipeline, method: "fastervlm:64" and "fastervlm"; both "dense" for the unpruned model.
        scores: (right, total) of every question kind.
        tokens: visual tokens of one picture in the language model, rounded mean over its layers.
        flops: up to the first token, vision tower included; `language_flops` is the language model's part of them.
        cache_bytes: keys and values after prefill.
        ttft: seconds to the first token, one per round; round i of every row timed the same question.
    """

    pipeline: str
    method: str
    scores: dict[str, tuple[int, int]]
    tokens: int
    flops: int
    language_flops: int
    cache_bytes: int
    ttft: Sequence[float]

    def figures(self, dense: Row) -> dict[str, Any]:
        """Every number of the table: shares in 0..1, seconds, bytes, FLOPs."""
        right, total = (sum(pair[k] for pair in self.scores.values()) for k in (0, 1))
        dense_right = sum(pair[0] for pair in dense.scores.values())
        ratios = [mine / theirs for mine, theirs in zip(self.ttft, dense.ttft, strict=True)]
        return {
            "pipeline": self.pipeline,
            "method": self.method,
            "tokens": self.tokens,
            "accuracy": _share(right, total),
            "of_dense": right / dense_right if dense_right else None,
            "kinds": {kind: _share(*pair) for kind, pair in self.scores.items()},
            "flops": self.flops,
            "flops_ratio": self.flops / dense.flops,
            "language_flops": self.language_flops,
            "language_flops_ratio": self.language_flops / dense.language_flops,
            "ttft": vars(spread(self.ttft)),
            "ttft_ratio": vars(spread(ratios)),
            "cache_bytes": self.cache_bytes,
            "cache_ratio": self.cache_bytes / dense.cache_bytes,
        }


@dataclass(frozen=True)
class Panel:
    """One pipeline's view of a question: what it kept, what it answered; no picture where nothing can be drawn."""

    pipeline: str
    answer: str
    right: bool
    picture: Image.Image | None


@dataclass(frozen=True)
class Case:
    """One question with a panel per pipeline, dense first."""

    question: str
    expected: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Report:
    """Everything the page shows. `rows[0]` is dense; `conditions` say what was run, where and how."""

    model: str
    rows: tuple[Row, ...]
    cases: tuple[Case, ...]
    conditions: dict[str, str]

    def figures(self) -> list[dict[str, Any]]:
        return [row.figures(self.rows[0]) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes; the pictures stay out."""
        cases = [
            {
                "question": case.question,
                "expected": case.expected,
                "answers": {p.pipeline: {"answer": p.answer, "right": p.right} for p in case.panels},
            }
            for case in self.cases
        ]
        return {"model": self.model, "conditions": self.conditions, "pipelines": self.figures(), "examples": cases}


def render(report: Report) -> str:
    """The demo's page; needs jinja2 and matplotlib."""
    figures, kinds = report.figures(), list(report.rows[0].scores)
    named = {"report": report, "rows": figures, "dense": figures[0], "kinds": kinds, "plot": plot(figures)}
    return page("demo.html", report.conditions, **named)


def page(template: str, conditions: Mapping[str, Any], **values: Any) -> str:
    """A page of `templates/`: no link, no file beside it, and whole without its script if it has one. Needs jinja2.

    Args:
        conditions: what its last part lists.
        values: what else the template names.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["uri"] = partial(data_uri, kind="JPEG")
    environment.filters.update(percent=percent, milliseconds=milliseconds, flops=_flops, bytes=_bytes, ratio=ratio)
    return environment.get_template(template).render(conditions=conditions, **values)


def _share(right: int, total: int) -> dict[str, float]:
    low, high = wilson(right, total)
    return {"right": right, "total": total, "share": right / total if total else 0.0, "low": low, "high": high}


def percent(share: float | None, digits: int = 1) -> str:
    return "n/a" if share is None else f"{100 * share:.{digits}f}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _flops(count: float | None) -> str:
    if count is None:
        return "n/a"
    power = min(max(int(math.log10(max(count, 1)) // 3), 2), 4)
    return f"{count / 1000**power:.3g}\u00a0{('MFLOP', 'GFLOP', 'TFLOP')[power - 2]}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f}\u00a0MiB" if count >= 2**20 else f"{count / 2**10:.0f}\u00a0KiB"
