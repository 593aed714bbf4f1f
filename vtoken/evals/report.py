"""The demo's results as plain data and as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from PIL import Image

TEMPLATE = Path(__file__).parent / "templates" / "demo.html"
# Drawn in these colours, then replaced by the page's variables so that the plot follows light and dark.
INK, FAINT, PAPER = "#010203", "#040506", "#fefdfc"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Row:
    """What one pipeline scored and cost.

    Attributes:
        pipeline, method: "fastervlm:64" and "fastervlm"; both "dense" for the unpruned model.
        scores: (right, total) of every question kind.
        tokens: visual tokens of one picture that enter the language model.
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
    """One pipeline's view of a question: what it kept, what it answered."""

    pipeline: str
    answer: str
    right: bool
    picture: Image.Image


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
    """The page: no script, no link, no file beside it.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=_percent, milliseconds=_milliseconds, flops=_flops, bytes=_bytes, ratio=_ratio)
    environment.filters["uri"] = _uri
    figures = report.figures()
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report, rows=figures, dense=figures[0], kinds=list(report.rows[0].scores), plot=plot(figures)
    )


def plot(figures: Sequence[dict[str, Any]]) -> str:
    """Accuracy against visual tokens as inline SVG: a line per method, dense dashed, Wilson intervals as whiskers."""
    import matplotlib
    from matplotlib.figure import Figure

    dense, pruned = figures[0], figures[1:]
    methods = list(dict.fromkeys(row["method"] for row in pruned))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vtoken", "font.size": 10}):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.axhline(100 * dense["accuracy"]["share"], color=INK, linewidth=1, dashes=(5, 3))
        axes.text(dense["tokens"], 100 * dense["accuracy"]["share"], "dense", color=INK, ha="right", va="bottom")
        ends = []
        for k, method in enumerate(methods):
            rows = sorted((row for row in pruned if row["method"] == method), key=lambda row: row["tokens"])
            # Side by side, so that the whiskers of one budget do not hide each other.
            x = [row["tokens"] * 1.05 ** (k - (len(methods) - 1) / 2) for row in rows]
            y = [100 * row["accuracy"]["share"] for row in rows]
            low = [100 * (row["accuracy"]["share"] - row["accuracy"]["low"]) for row in rows]
            high = [100 * (row["accuracy"]["high"] - row["accuracy"]["share"]) for row in rows]
            colour = SERIES[k % len(SERIES)]
            axes.errorbar(
                x, y, (low, high), color=colour, marker=MARKERS[k % len(MARKERS)], linewidth=1.6, elinewidth=0.9
            )
            ends.append((y[-1], max(x[-1] * 1.1, rows[-1]["tokens"] * 1.2), method, colour))
        ends.sort()
        for y_label, (_, x_label, method, colour) in zip(_apart([end[0] for end in ends]), ends, strict=True):
            patch = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}  # covers the dashed line
            axes.text(x_label, y_label, method, color=colour, va="center", weight="bold", bbox=patch)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for row in figures})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(ylim=(0, 104), xlabel="visual tokens per picture", ylabel="questions right, %")
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        text = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    series = {colour: f"series-{k}" for k, colour in enumerate(SERIES)}
    for colour, name in {INK: "ink", FAINT: "line", PAPER: "paper", **series}.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace(
        "<svg", '<svg role="img" aria-label="accuracy against visual tokens; the numbers are in the table"', 1
    )


def _apart(heights: Sequence[float], gap: float = 7.0) -> list[float]:
    """Label heights (ascending), moved until neighbours are `gap` apart; groups stay where their points are."""
    placed = list(heights)
    for _ in range(20):
        for k in range(len(placed) - 1):
            push = max(0.0, gap - (placed[k + 1] - placed[k])) / 2
            placed[k] -= push
            placed[k + 1] += push
    return placed


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


def _percent(share: float | None, digits: int = 1) -> str:
    return "n/a" if share is None else f"{100 * share:.{digits}f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _flops(count: float) -> str:
    power = min(max(int(math.log10(max(count, 1)) // 3), 2), 4)
    return f"{count / 1000**power:.3g}\u00a0{('MFLOP', 'GFLOP', 'TFLOP')[power - 2]}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f}\u00a0MiB" if count >= 2**20 else f"{count / 2**10:.0f}\u00a0KiB"


def _uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.convert("RGB").save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
