"""The report of a run of `vtoken eval`: report.html, one self-contained page, and table.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtoken.evals.pictures.plots import SERIES, fronts, looks, plot
from vtoken.evals.pictures.report import Case, Panel, milliseconds, page, percent, ratio
from vtoken.evals.quality.analysis import COSTS, Evaluation, loss, sign
from vtoken.evals.shared import tables, whole
from vtoken.evals.shared.media import still
from vtoken.evals.shared.tables import or_na

FEW = 20  # pictures; with fewer a bootstrap over them is too sure of itself
MANY = 20  # rows of a table that are too many to show at once, of what few readers look for
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # markers as text
MISSING = "report.html needs jinja2 and matplotlib: pip install jinja2 matplotlib, then `vtoken report {folder}`"
# Of table.md: all pipelines, and every task.
COLUMNS: tables.Columns = {
    "pipeline": lambda row: row["name"],
    "% of dense": lambda row: percent(row["quality"]),
    "95 %": lambda row: _range(row["low"], row["high"]),
    "answers as dense, %": lambda row: percent(row["same"]),
    "visual tokens": lambda row: f"{row['tokens']:.0f}",
    "at entry": lambda row: f"{row['entry']:.0f}",
    "FLOPs / dense": lambda row: ratio(row["flops_ratio"]),
    "TTFT ms": lambda row: milliseconds(row["ttft"]),
    "TTFT / dense": lambda row: ratio(row["ttft_ratio"]),
    "fronts": lambda row: ", ".join(COSTS[cost] for cost in row["fronts"]) or "-",
}
TASK_COLUMNS: tables.Columns = {
    "pipeline": lambda task: task["name"],
    "value": lambda task: or_na(task["value"], ".4g"),
    "% of dense": lambda task: percent(task["of_dense"]),
    "95 %": lambda task: _interval(task),
    "lost": lambda task: or_na(task["lost"]),
    "won": lambda task: or_na(task["won"]),
    "McNemar p": lambda task: or_na(task["p"], ".3g"),
    "answers as dense, %": lambda task: percent(task["same"]),
    "questions for 1 point": lambda task: or_na(task["needed"], ","),
}


def write(evaluation: Evaluation, found: Mapping[str, Any], file: Path | None = None) -> list[Path]:
    """Writes table.md into the folder of the results and the page, where jinja2 and matplotlib are installed.

    Args:
        found: what `analyse` returns.
        file: the page; None is report.html in the folder.

    Returns:
        The files written: without the page if a package is missing.
    """
    table = evaluation.folder / "table.md"
    table.write_text(markdown(found), encoding="utf-8")
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        return [table]
    file = evaluation.folder / "report.html" if file is None else file
    file.write_text(render(evaluation, found), encoding="utf-8")
    return [table, file]


def render(evaluation: Evaluation, found: Mapping[str, Any]) -> str:
    """The page."""
    rows = grouped(found["pipelines"])
    drawn = {cost: [row for row in rows if cost in row["fronts"]] for cost in COSTS}
    plots = [(name, fronts(rows, cost, name), drawn[cost]) for cost, name in COSTS.items() if drawn[cost]]
    key = [(method, colour, GLYPHS[marker]) for method, (colour, _, marker) in looks(rows).items()]
    coloured = [each for each in key if each[1] != "soft"]
    known = [_as_plotted(row) for row in rows if None not in (row["quality"], row["tokens"])]
    return page(
        "eval.html",
        conditions(found),
        found=found,
        rows=rows,
        dense=rows[0],
        plots=plots,
        key=coloured if len(coloured) == len(key) else [*coloured, ("others", "soft", GLYPHS["o"])],
        each=plot(known, "% of dense") if len(key) > len(SERIES) and rows[0]["quality"] is not None else None,
        cases=cases(evaluation),
        few=FEW,
        many=len(rows) > MANY,
        written={row["name"]: " ".join(row["pipeline"].split()) for row in rows if row["pipeline"]},
        reasons=sorted({task["no_flops"] for row in rows for task in row["tasks"].values() if task["no_flops"]}),
    )


def grouped(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense, then method by method in the order they ran, each from many tokens to few."""
    methods = list(dict.fromkeys(row["method"] for row in rows[1:]))
    return [rows[0], *sorted(rows[1:], key=lambda row: (methods.index(row["method"]), -(row["entry"] or 0)))]


def _as_plotted(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as `plot` takes it, with what is left of dense as accuracy."""
    share = row["quality"]
    low, high = (share if row[end] is None else row[end] for end in ("low", "high"))
    about = {"method": row["method"], "tokens": round(row["tokens"])}
    return {**about, "accuracy": {"share": share, "low": low, "high": high}}


def conditions(found: Mapping[str, Any]) -> dict[str, str]:
    """Provenance in words: what ran, where, on which data, and how the two dense runs differ."""
    conditions = {key.replace("_", " "): str(value) for key, value in found["conditions"].items() if value is not None}
    conditions["command"] = found["command"]
    for name, about in found["tasks"].items():
        conditions[name] = f"documents sha256 {about['hash'][:16]}, " + ", ".join(
            f"{leaf}: {', '.join(f'{key} {value}' for key, value in options.items() if value is not None)}"
            for leaf, options in about["leaves"].items()
        )
    if found["drift"]:
        conditions["drift"] = (
            f"last dense run / first: TTFT {ratio(found['drift']['ttft'])}, {found['drift']['answers_changed']} "
            "answers changed"
        )
    return {key: value for key, value in conditions.items() if value}


def cases(evaluation: Evaluation) -> tuple[Case, ...]:
    """The documents that were lost, with every panel that was drawn of them: dense, then those that lost them, then
    others."""
    results = evaluation.results
    names = [run["name"] for run in results["runs"]]
    lines = {
        (names[k], line["task"], line["doc"]): line
        for k in reversed(range(len(names)))  # of the two dense runs the first stays
        for line in evaluation.lines[k]
    }
    found = []
    signs = {leaf: sign(about) for about in results["tasks"].values() for leaf in about["leaves"]}
    for case in results["cases"]:
        mine = {name: lines[name, case["task"], case["doc"]] for name in case["panels"] if name in names}
        base = mine["dense"]
        panels = []
        for name, line in mine.items():
            file, picture = case["panels"][name], None
            if file is not None:
                picture = still(whole.inside(evaluation.folder, file, evaluation.folder / "results.json"))
            panels.append(Panel(name, line["answer"], loss(line, base, signs) <= 0, picture))
        panels[1:] = sorted(panels[1:], key=lambda panel: panel.right)
        found.append(Case(base["question"], str(base["target"]), tuple(panels)))
    return tuple(found)


def markdown(found: Mapping[str, Any]) -> str:
    """table.md: all pipelines, then every task."""
    about = found["conditions"]
    rows = found["pipelines"]
    text = [
        f"# {found['model']}",
        f"{about['device']}, {about['dtype']}, batch {about['batch_size']}, {about['versions']}",
    ]
    if not found["complete"]:
        text.append("**Not complete**: the run was interrupted.")
    text.append(tables.markdown(tables.table(COLUMNS, rows), numbers=True))
    for name, task in found["tasks"].items():
        text.append(f"## {name}")
        text.append(
            f"{task['metric']}, {task['docs']} documents, {task['pictures']} different pictures or sets of them"
        )
        own = [{**row["tasks"][name], "name": row["name"]} for row in rows]
        text.append(tables.markdown(tables.table(TASK_COLUMNS, own), numbers=True))
        if task["pictures"] < FEW:
            text.append(
                f"{task['pictures']} pictures are too few for an interval drawn over pictures; it is too narrow."
            )
    return "\n\n".join(text) + "\n"


def _interval(task: Mapping[str, Any]) -> str:
    if task["interval"] is None:
        return "n/a"
    return _range(*task["interval"][1:]) + ("" if task["own_mean"] else " (mean of documents)")


def _range(low: float | None, high: float | None) -> str:
    return "n/a" if low is None or high is None else f"{percent(low)}–{percent(high)}"
