"""Accuracy against visual tokens as inline SVG: one picture for a few methods, a small one each for many."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

# Drawn in these colours, then replaced by the page's variables so that the plot follows light and dark.
INK, SOFT, FAINT, PAPER = "#010203", "#070809", "#040506", "#fefdfc"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v")
FLOORS = {"uniform": "-", "random": ":", "resize": "-."}  # method -> dashes of its line in every small picture
COLUMNS = 6
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "vtoken", "font.size": 10}
Figures = Sequence[dict[str, Any]]


def plot(figures: Figures, label: str = "questions right, %") -> str:
    """Draws the rows of `Report.figures`, dense first: dashed where it lies, intervals as whiskers.

    Up to five methods share one picture; of more, each has its own, with uniform choice, random choice and smaller
    pictures behind it.

    Args:
        label: what `accuracy` of the rows is.
    """
    import matplotlib

    methods = list(dict.fromkeys(row["method"] for row in figures[1:]))
    with matplotlib.rc_context(STYLE):
        return (_together if len(methods) <= len(SERIES) else _apart)(figures, methods, label)


def _together(figures: Figures, methods: Sequence[str], label: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.subplots()
    dense = figures[0]
    _frame(axes, 100 * dense["accuracy"]["share"])
    axes.text(dense["tokens"], 100 * dense["accuracy"]["share"], "dense", color=INK, ha="right", va="bottom")
    ends = []
    for k, method in enumerate(methods):
        colour = SERIES[k]
        # Side by side, so that the whiskers of one budget do not hide each other.
        shift = 1.05 ** (k - (len(methods) - 1) / 2)
        x, y = _line(axes, figures, method, shift, color=colour, marker=MARKERS[k], linewidth=1.6)
        ends.append((y[-1], max(x[-1] * 1.1, x[-1] / shift * 1.2), method, colour))
    ends.sort()
    for y_label, (_, x_label, method, colour) in zip(_spaced([end[0] for end in ends]), ends, strict=True):
        patch = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}  # covers the dashed line
        axes.text(x_label, y_label, method, color=colour, va="center", weight="bold", bbox=patch)
    ticks = sorted({row["tokens"] for row in figures})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="visual tokens per picture", ylabel=label)
    return _svg(figure)


def _apart(figures: Figures, methods: Sequence[str], label: str) -> str:
    from matplotlib.figure import Figure

    own = [method for method in methods if method not in FLOORS]
    count = -(-len(own) // COLUMNS)
    top = max(104.0, *(100 * row["accuracy"]["high"] for row in figures))
    figure = Figure(figsize=(10.4, 1.75 * count + 0.3), layout="constrained")
    grid = figure.subplots(count, COLUMNS, sharex=True, sharey=True, squeeze=False)
    floors = {row["tokens"] for row in figures if row["method"] in ("uniform", "random")} or {
        min(row["tokens"] for row in figures)
    }
    ticks = sorted({figures[0]["tokens"], *floors})
    for k, axes in enumerate(grid.flat):
        if k >= len(own):
            axes.set_visible(False)
            continue
        _frame(axes, 100 * figures[0]["accuracy"]["share"])
        axes.set_ylim(0, top)
        for floor, dashes in FLOORS.items():
            x, y, _ = _of(figures, floor)
            axes.plot(x, y, dashes, color=SOFT, linewidth=1.2)
        _line(axes, figures, own[k], color=SERIES[0], marker="o", markersize=4, linewidth=1.8)
        axes.set_title(own[k], color=SERIES[0], weight="bold", fontsize=10, loc="left", pad=3)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.tick_params(labelbottom=k + COLUMNS >= len(own), labelsize=9)
    figure.supxlabel("visual tokens per picture", color=INK, fontsize=10)
    figure.supylabel(label, color=INK, fontsize=10)
    return _svg(figure)


def fronts(rows: Figures, cost: str, label: str) -> str:
    """Draws what is left of the dense score against a cost, whiskers where an interval is known.

    A thin line joins the budgets of a method, steps join the front. Beyond five methods those on a front have a colour,
    and whiskers.

    Args:
        rows: `pipelines` of `quality.analysis`, dense first.
        cost: key of the cost; rows that have none are left out. `label` is what it is called.
    """
    import matplotlib
    from matplotlib.figure import Figure

    known = [row for row in rows if row[cost] is not None and row["quality"] is not None]
    look = {**looks(rows), "dense": ("ink", INK, "*")}
    plain = {method for method, (name, _, _) in look.items() if name == "soft"}
    aside = cost == "tokens" and not plain  # Points of one budget stand side by side.
    shift = {method: 1.06 ** (k - len(look) / 2 + 1) if aside else 1.0 for k, method in enumerate(look)}
    shift["dense"] = 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7, 3.0), layout="constrained")
        axes = figure.subplots()
        _frame(axes, 100.0)
        best = sorted((row[cost], 100 * row["quality"]) for row in known if cost in row["fronts"])
        axes.plot(*zip(*best, strict=True), color=INK, linewidth=0.9, drawstyle="steps-post", zorder=1)
        for method in sorted(look, key=lambda method: method not in plain):
            (_, colour, marker), small = look[method], method in plain
            own = sorted((row for row in known if row["method"] == method), key=lambda row: row[cost])
            line = [(row[cost] * shift[method], 100 * row["quality"]) for row in own]
            axes.plot(
                *zip(*line, strict=True), color=FAINT if small else colour, linewidth=1, zorder=0.5 if small else 1.5
            )
            for row, (x, y) in zip(own, line, strict=True):
                whiskers = None if row["low"] is None or small else ([y - 100 * row["low"]], [100 * row["high"] - y])
                edge: dict[str, Any] = {"markeredgecolor": INK, "markeredgewidth": 1.2} if cost in row["fronts"] else {}
                size = 4 if small else 7
                axes.errorbar(x, y, whiskers, color=colour, marker=marker, elinewidth=0.9, markersize=size, **edge)
        ticks = sorted({round(row[cost]) for row in known})
        if cost == "tokens" and len(ticks) <= len(SERIES):
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
        elif cost == "tokens":
            axes.xaxis.set_major_formatter("{x:.0f}")
        else:
            axes.set_xscale("linear")
            axes.set_xlim(left=0)
        low = min(
            100 * (row["low"] if row["low"] is not None and row["method"] not in plain else row["quality"])
            for row in known
        )
        axes.set_ylim(max(0, 10 * math.floor(low / 10 - 0.2)), None)
        axes.set(xlabel=label, ylabel="% of dense")
        return _svg(figure, f"percent of dense against {label}")


def looks(rows: Figures) -> dict[str, tuple[str, str, str]]:
    """Method -> name of its colour on the page, the colour, its marker.

    Where there are more methods than colours, those that are on the fronts most often have them; the others look alike.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows[1:]))
    chosen = methods
    if len(methods) > len(SERIES):
        often = {method: sum(len(row["fronts"]) for row in rows if row["method"] == method) for method in methods}
        chosen = sorted(filter(often.get, methods), key=lambda method: -often[method])[: len(SERIES)]
    coloured = {method: (f"series-{k}", SERIES[k], MARKERS[k]) for k, method in enumerate(chosen)}
    return {method: coloured.get(method, ("soft", SOFT, MARKERS[0])) for method in methods}


def _frame(axes: Any, level: float) -> None:
    """Axes in the page's colours, dashed where dense lies, in percent."""
    axes.axhline(level, color=INK, linewidth=1, dashes=(5, 3))
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_ylim(0, 104)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


def _of(figures: Figures, method: str) -> tuple[list[float], list[float], Figures]:
    """Tokens and percent right of a method, by tokens, and its rows."""
    rows = sorted((row for row in figures if row["method"] == method), key=lambda row: row["tokens"])
    return [row["tokens"] for row in rows], [100 * row["accuracy"]["share"] for row in rows], rows


def _line(
    axes: Any, figures: Figures, method: str, shift: float = 1.0, **style: Any
) -> tuple[list[float], list[float]]:
    """Draws a method with its whiskers, tokens multiplied by `shift`; returns its points."""
    tokens, y, rows = _of(figures, method)
    x = [n * shift for n in tokens]
    low = [value - 100 * row["accuracy"]["low"] for value, row in zip(y, rows, strict=True)]
    high = [100 * row["accuracy"]["high"] - value for value, row in zip(y, rows, strict=True)]
    axes.errorbar(x, y, (low, high), elinewidth=0.9, **style)
    return x, y


def _svg(figure: Any, what: str = "accuracy against visual tokens") -> str:
    text = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    series = {colour: f"series-{k}" for k, colour in enumerate(SERIES)}
    for colour, name in {INK: "ink", SOFT: "soft", FAINT: "line", PAPER: "paper", **series}.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{what}; the numbers are in the table"', 1)


def _spaced(heights: Sequence[float], gap: float = 7.0) -> list[float]:
    """Label heights (ascending), moved until neighbours are `gap` apart; groups stay where their points are."""
    placed = list(heights)
    for _ in range(20):
        for k in range(len(placed) - 1):
            push = max(0.0, gap - (placed[k + 1] - placed[k])) / 2
            placed[k] -= push
            placed[k + 1] += push
    return placed
