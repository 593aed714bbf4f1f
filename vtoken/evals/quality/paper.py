"""Published tables with their sources, and what is run here to measure the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from vtoken import registry
from vtoken.config.yaml_source import read
from vtoken.errors import ConfigError, unknown
from vtoken.evals.lmms.suites import KNOWN
from vtoken.evals.shared.tables import markdown

FOLDER = Path(__file__).parent / "papers"


class Column(NamedTuple):
    """How a column of papers is measured here.

    Attributes:
        task: of lmms-eval.
        metrics: of its scorer, added up.
        factor: what makes a paper's number of them.
        differs: what lmms-eval does otherwise.
    """

    task: str
    metrics: tuple[str, ...]
    factor: float = 1
    differs: str | None = None


COLUMNS = {
    "GQA": Column("gqa", ("exact_match",), 100),
    "MMB": Column("mmbench_en_dev_static", ("gpt_eval_score",)),
    "MMB-CN": Column("mmbench_cn_dev", ("gpt_eval_score",), 1, "lmms-eval scores it with a judge behind an API"),
    "MME": Column("mme", ("mme_perception_score", "mme_cognition_score")),
    "MME-P": Column("mme", ("mme_perception_score",)),
    "POPE": Column("pope", ("pope_f1_score",), 100),
    "SQA": Column("scienceqa_img", ("exact_match",), 100),
    "SEED": Column("seedbench", ("seed_image",), 100),
    "VQAv2": Column("vqav2_val_lite", ("exact_match",), 100, "papers: test-dev; here: a part of the validation split"),
    "TextVQA": Column(
        "textvqa_val", ("exact_match",), 100, "LLaVA papers put OCR tokens into the prompt; lmms-eval does not"
    ),
    "VizWiz": Column("vizwiz_vqa_val", ("exact_match",), 100, "papers: often test-dev; here: the validation split"),
    "MMVet": Column("mmvet", ("gpt_eval_score",), 1, "lmms-eval scores it with a judge behind an API"),
    "MMMU": Column("mmmu_val", ("mmmu_acc",), 100),
    "ChartQA": Column("chartqa", ("relaxed_overall",), 100),
    "AI2D": Column("ai2d", ("exact_match",), 100),
    "OCRBench": Column("ocrbench", ("ocrbench_accuracy",), 1000),
    "OCRBench %": Column("ocrbench", ("ocrbench_accuracy",), 100),
}


class Row(BaseModel):
    """One line of a table: null where the number is not at hand.

    `percent` is the share of dense and `average` the mean as printed; `suspect` names columns, or "percent", that are
    not certain.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    tokens: int | str
    values: tuple[float | None, ...]
    percent: float | None = None
    average: float | None = None
    source: str | None = None
    suspect: tuple[str, ...] = ()
    preset: str | None = None
    pipeline: str | None = None


class Table(BaseModel):
    """One published table. `preset` and `pipeline` are patterns with {method} and {tokens}: what is run to measure a
    row here. Rows for which neither gives a pipeline cannot be measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    convention: str
    visual_tokens: int | None = None
    source: str
    note: str | None = None
    preset: str | None = None
    pipeline: str | None = None
    options: str = ""
    columns: tuple[str, ...]
    dense: tuple[float, ...]
    rows: tuple[Row, ...]

    def pipeline_of(self, row: Row) -> str | None:
        """What to run for a row; None where its settings are not published or not shipped."""
        names = {"method": row.method, "tokens": row.tokens}
        preset = (row.preset or self.preset or "").format(**names)
        if preset in registry.presets():
            return preset
        pipeline = (row.pipeline or self.pipeline or "").format(**names)
        return pipeline if pipeline and row.method in registry.stages() else None


@cache
def tables() -> tuple[Table, ...]:
    """All published tables that are shipped."""
    files = sorted(FOLDER.glob("*.yaml"))
    return tuple(Table.model_validate(read(file)[0]) for file in files)


def of(method: str, model: str | None = None) -> list[Table]:
    """Tables that have rows of a method, those rows alone.

    Args:
        model: hub name, or a folder called like its last part; None is any.
    """
    known = {row.method for table in tables() for row in table.rows}
    if method not in known:
        raise ConfigError(unknown("published method", method, known))
    found = [
        table.model_copy(update={"rows": tuple(row for row in table.rows if row.method == method)})
        for table in tables()
    ]
    found = [table for table in found if table.rows]
    fits = [table for table in found if model is None or Path(table.model).name == Path(model).name]
    if not fits:
        models = ", ".join(sorted({table.model for table in found}))
        raise ConfigError(f"no published table of {method} on {model}; there are some on {models}")
    return fits


def pipelines(chosen: Sequence[Table]) -> list[str]:
    """What to run for the rows, each once."""
    return list(dict.fromkeys(name for t in chosen for row in t.rows if (name := t.pipeline_of(row)) is not None))


def tasks(chosen: Sequence[Table], judge: bool = False) -> list[str]:
    """lmms-eval's tasks of the columns, each once; those scored by a model behind an API only with `judge`."""
    names = [COLUMNS[name].task for table in chosen for name in table.columns if name in COLUMNS]
    return [name for name in dict.fromkeys(names) if judge or name not in KNOWN or not KNOWN[name].judge]


def command(table: Table) -> str | None:
    """The command that measures a table's rows here; None where none of them can be."""
    names = pipelines([table])
    if not names:
        return None
    asked = f"--pipelines {' '.join(names)} --tasks {','.join(tasks([table]))}"
    return f"vtoken eval {table.model} {asked} {table.options}".rstrip()


def beside(method: str, results: Mapping[str, Any] | None = None) -> str:
    """Markdown: every published row of a method and below it what was measured, as percent of its own dense in
    brackets.

    Args:
        results: what results.json holds; None prints the published numbers and what would be run.
    """
    chosen = of(method, results["model"] if results else None)
    return "\n\n".join(_section(method, table, results) for table in chosen)


def _section(method: str, table: Table, results: Mapping[str, Any] | None) -> str:
    count = f", {table.visual_tokens:,} visual tokens" if table.visual_tokens else ""
    text = [f"## {method} on {table.model}{count}", f"Convention: {table.convention}.  \nSource: {table.source}."]
    if table.note:
        text[-1] += f"  \n{table.note}."
    measured = _measured(table, results["runs"]) if results else {}
    lines = [("dense", "published", *_cells(table.dense, table.dense), "100", "")]
    if measured:
        lines.append(("dense", "measured", *_cells(measured["dense"], measured["dense"]), "", ""))
    for row in table.rows:
        marks = ["?" if name in row.suspect else "" for name in table.columns]
        printed = "-" if row.percent is None else f"{row.percent:g}{'?' if 'percent' in row.suspect else ''}"
        cells = _cells(row.values, table.dense, marks)
        lines.append((f"{method} {row.tokens}", "published", *cells, printed, row.source or ""))
        name = table.pipeline_of(row)
        if name in measured:
            lines.append((name or "", "measured", *_cells(measured[name], measured["dense"]), "", ""))
        elif results and name is None:
            lines.append(
                (f"{method} {row.tokens}", "not run", *["-"] * len(table.columns), "", "no preset stands for this row")
            )
    head = ("row", "", *table.columns, "% of dense as printed", "source")
    text.append(markdown([head, *lines]))
    differs = [
        f"{name}: {COLUMNS[name].differs}" for name in table.columns if name in COLUMNS and COLUMNS[name].differs
    ]
    missing = [name for name in table.columns if name not in COLUMNS]
    differs += [f"{', '.join(missing)}: no task of vtoken's suites"] if missing else []
    text.append("In brackets: % of the dense row beside it; compare these. ?: suspect. " + ". ".join(differs) + ".")
    run = command(table)
    text.append(
        f"What is run: `{run}`"
        if run
        else "Nothing to run: the settings of these rows are not known, or no stage here has them."
    )
    return "\n\n".join(text)


def _measured(table: Table, runs: Sequence[Mapping[str, Any]]) -> dict[str | None, list[float | None]]:
    found: dict[str | None, list[float | None]] = {}
    for run in runs:
        found.setdefault(run["name"], [_value(COLUMNS.get(name), run["tasks"]) for name in table.columns])
    return found


def _value(column: Column | None, given: Mapping[str, Any]) -> float | None:
    if column is None or column.task not in given:
        return None
    task = given[column.task]
    main = KNOWN[column.task].metric if column.task in KNOWN else None
    if column.metrics == (main,):
        return None if task["value"] is None else column.factor * task["value"]
    leaves = list(task["metrics"].values())
    if any(metric not in leaf for leaf in leaves for metric in column.metrics):
        return None
    return column.factor * sum(leaf[metric] for leaf in leaves for metric in column.metrics) / len(leaves)


def _cells(values: Sequence[float | None], dense: Sequence[float | None], marks: Sequence[str] = ()) -> list[str]:
    marks = marks or [""] * len(values)
    return [
        "-" if value is None else f"{value:.6g}{mark} ({100 * value / base:.1f})" if base else f"{value:.4g}{mark}"
        for value, base, mark in zip(values, dense, marks, strict=True)
    ]
