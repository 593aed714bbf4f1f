"""The demo's results as plain data and as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from PIL import Image

from vtoken.evals.pictures.plots import plot

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
    ttft: tuple[float, ...]


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
        """One dict per row with every number of the table: shares in 0..1, seconds, bytes, FLOPs."""
        return [_figures(row, self.rows[0]) for row in self.rows]

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


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson interval of a share (95 % by default): (low, high), each in 0..1; (0, 1) without observations."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # At 0 and at 1 the interval ends there; rounding must not put the share outside.
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def render(report: Report) -> str:
    """The demo's page.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    figures = report.figures()
    return page(
        "demo.html",
        report.conditions,
        report=report,
        rows=figures,
        dense=figures[0],
        kinds=list(report.rows[0].scores),
        plot=plot(figures),
    )


def page(template: str, conditions: Mapping[str, Any], **values: Any) -> str:
    """A page of `templates/`: no link, no file beside it, and whole without its script if it has one.

    Args:
        conditions: what its last part lists.
        values: what else the template names.

    Raises:
        ImportError: jinja2 is missing.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent, milliseconds=milliseconds, flops=_flops, bytes=_bytes, ratio=ratio, uri=_uri
    )
    return environment.get_template(template).render(conditions=conditions, **values)


def _figures(row: Row, dense: Row) -> dict[str, Any]:
    right, total = (sum(pair[k] for pair in row.scores.values()) for k in (0, 1))
    dense_right = sum(pair[0] for pair in dense.scores.values())
    return {
        "pipeline": row.pipeline,
        "method": row.method,
        "tokens": row.tokens,
        "accuracy": _share(right, total),
        "of_dense": right / dense_right if dense_right else None,
        "kinds": {kind: _share(*pair) for kind, pair in row.scores.items()},
        "flops": row.flops,
        "flops_ratio": row.flops / dense.flops,
        "language_flops": row.language_flops,
        "language_flops_ratio": row.language_flops / dense.language_flops,
        "ttft": _spread(row.ttft),
        "ttft_ratio": _spread([mine / theirs for mine, theirs in zip(row.ttft, dense.ttft, strict=True)]),
        "cache_bytes": row.cache_bytes,
        "cache_ratio": row.cache_bytes / dense.cache_bytes,
    }


def _share(right: int, total: int) -> dict[str, float]:
    low, high = wilson(right, total)
    return {"right": right, "total": total, "share": right / total if total else 0.0, "low": low, "high": high}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "low": low, "high": high}


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


def _uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.convert("RGB").save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
