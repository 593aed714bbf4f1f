"""Published tables: what is written down must agree with itself, and measured numbers come out in a paper's units."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_folder import run, write

from vtoken import config, registry
from vtoken.cli import main
from vtoken.errors import ConfigError
from vtoken.evals.lmms import suites
from vtoken.evals.quality import paper

TABLES = paper.tables()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.model}-{table.source[:12]}")
def test_cells_give_the_printed_percentage(table: paper.Table) -> None:
    """A cell in a wrong column shows here; percentages over other benchmarks say so in their source."""
    assert len(table.dense) == len(table.columns)
    for row in table.rows:
        assert len(row.values) == len(table.columns) and {*row.suspect} <= {*table.columns, "percent"}
        whole = None not in row.values and "benchmarks" not in (row.source or "") and "video" not in table.source
        if row.percent is not None and whole and "percent" not in row.suspect:
            shares = [100 * value / base for value, base in zip(row.values, table.dense, strict=True)]
            assert sum(shares) / len(shares) == pytest.approx(row.percent, abs=0.35), row


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.model}-{table.source[:12]}")
def test_what_is_run_can_be_run(table: paper.Table) -> None:
    for name in paper.pipelines([table]):
        config.load(name)
    for row in table.rows:
        name = table.pipeline_of(row)
        if name is not None:
            stages = [stage.name for stage in config.load(name).stages]
            assert row.method in stages
            # DyMU's table counts ToMe's [CLS] token.
            tokens = int(row.tokens) - 1 if row.method == "tome" else row.tokens
            assert str(tokens).rstrip("%").split(".")[0] in name
    for column in table.columns:
        known = paper.COLUMNS.get(column)
        if known is not None and known.task in suites.KNOWN:
            task = suites.KNOWN[known.task]
            assert known.metrics[0] == task.metric
            if column not in ("MME", "MME-P"):
                assert known.factor * task.scale in (100, 1000)
    assert not any(suites.KNOWN[name].judge for name in paper.tasks([table]) if name in suites.KNOWN)


def test_every_seed_method_with_numbers_is_there() -> None:
    methods = {row.method for table in TABLES for row in table.rows}
    assert {"flowcut", "fastervlm", "visionzip", "hired", "dart", "sparsevlm", "fastv", "divprune"} <= methods
    assert methods - {"tome", "dymu"} <= set(registry.stages())


def test_without_a_model_it_says_what_would_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--paper", "flowcut"]) == 0
    printed = capsys.readouterr().out
    assert "re-run in the STD paper" in printed and "| flowcut 64 | published | 55.6 (89.8) |" in printed
    assert "vtoken eval llava-hf/llava-1.5-7b-hf --pipelines flowcut-192 flowcut-64 flowcut-128 --tasks gqa," in printed
    assert main(["eval", "--paper", "flowct"]) == 2
    assert "did you mean 'flowcut'" in capsys.readouterr().err
    assert main(["eval", "tiny-llava", "--paper", "flowcut"]) == 2
    assert "no published table of flowcut on tiny-llava" in capsys.readouterr().err
    assert main(["eval", "tiny-llava"]) == 2
    assert "--tasks, or --paper" in capsys.readouterr().err


def test_measured_stands_beside_published(tmp_path: Path) -> None:
    rows = [
        run("dense", None, {"gqa": [1.0, 1.0, 0.0, 0.0]}),
        run("flowcut-64", "flowcut: {keep: 64}", {"gqa": [1.0, 0.0, 0.0, 0.0]}),
    ]
    folder = write(tmp_path / "out", rows, pictures=4)
    results = json.loads((folder / "results.json").read_text())
    for each, perception in zip(results["runs"], (1000.0, 900.0), strict=True):
        each["tasks"]["mme"] = {"value": perception, "metrics": {"mme": {"mme_perception_score": perception}}}
    with pytest.raises(ConfigError, match="no published table of flowcut on made/up-model"):
        paper.beside("flowcut", results)
    results["model"] = "copies/llava-1.5-7b-hf"
    printed = paper.beside("flowcut", results)
    assert "| dense | measured | 50 (100.0) | - | - | - |" in printed  # MME needs cognition too
    assert "| flowcut-64 | measured | 25 (50.0) |" in printed and "flowcut-192 | measured" not in printed
    for each in results["runs"]:
        each["tasks"]["mme"]["metrics"]["mme"]["mme_cognition_score"] = 200.0
    assert "| flowcut-64 | measured | 25 (50.0) | - | - | 1100 (91.7) |" in paper.beside("flowcut", results)
