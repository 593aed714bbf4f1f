"""What `vtoken eval` and `vtoken sweep` print of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from vtoken.evals.quality import report
from vtoken.evals.quality.analysis import analyse, read
from vtoken.evals.quality.results import Results
from vtoken.evals.shared import tables


def publish(results: Results, in_json: bool, timed: bool) -> None:
    """Writes the report of results, and prints them as one JSON object, or as a table with notes. On stderr it says how
    to have the page where a package is missing.

    Args:
        timed: whether the runs were asked one after the other on one machine, so that their own times mean something.
    """
    evaluation = read(results.folder)
    written = report.write(evaluation, analyse(evaluation))
    if len(written) == 1:
        print(report.MISSING.format(folder=results.folder), file=sys.stderr)
    if in_json:
        print(json.dumps(results.to_dict()))
        return
    tables.show(results.model, cells(results, timed))
    files = (results.folder / "results.json", *written)
    print(*notes(results, timed), *(f"wrote {file}" for file in files), sep="\n")


def cells(results: Results, timed: bool = False) -> list[tuple[str, ...]]:
    """Head and rows as text: every task's value with what share of dense it is, tokens, and times: those of the speed
    pass, or of the runs."""
    names = [
        f"{name}\n{about['metric']}" + (f" of {about['scale']:g}" if about["scale"] else "")
        for name, about in results.tasks.items()
    ]
    rows = [("pipeline", *names, "answers as dense", "visual tokens", "over layers")]
    for run in results.runs:
        same = f"{100 * results.mean(run, 'same_as_dense'):.1f} %"
        keys = ("visual_tokens_entry", "visual_tokens", "visual_tokens_mean")
        entry, full, mean = (f"{results.mean(run, key):.0f}" for key in keys)
        scores = (_score(run["tasks"].get(name)) for name in results.tasks)
        rows.append((run["name"], *scores, same, f"{entry} of {full}", mean))
    times: list[tuple[str, ...]] = [()] * len(rows)
    if results.speed is not None:
        speed = {row["name"]: row for row in results.speed["rows"]}
        times = [("TTFT ms", "TTFT / dense", "end / dense"), *(_benched(speed[run["name"]]) for run in results.runs)]
    elif timed:
        own = [[results.mean(run, key) for key in ("ttft_s", "ttft_to_dense")] for run in results.runs]
        times = [("TTFT ms", "TTFT / dense"), *((f"{1e3 * ttft:.1f}", f"{ratio:.2f}") for ttft, ratio in own)]
    return [(*row, *more) for row, more in zip(rows, times, strict=True)]


def notes(results: Results, timed: bool) -> list[str]:
    """Conditions in words."""
    about, drift = results.conditions, results.drift
    found = [
        f"{about['device']}, {about['dtype']}, batch {about['batch_size']}, {about['versions']}, lmms-eval "
        f"{about['lmms_eval']}"
    ]
    if results.speed is not None:
        found.append(
            "times: medians at batch 1 on random prompts, dense and pipelines interleaved; ratios within a round"
        )
    elif timed:
        found.append(
            "TTFT: medians over documents, averaged over tasks; pipelines ran one after the other, so drift counts: "
            "see vtoken bench"
        )
    if drift is not None:
        ttft = f"TTFT {drift['ttft']:.3f}; " if timed else ""
        found.append(f"drift: last dense run / first, {ttft}{drift['answers_changed']} answers changed")
    return found


def _score(scores: Mapping[str, Any] | None) -> str:
    """A run's value on one task, and what share of dense it is."""
    if scores is None or scores["value"] is None:
        return "n/a"
    share = "" if scores["of_dense"] is None else f" ({100 * scores['of_dense']:.0f} %)"
    return f"{scores['value']:.3f}{share}"


def _benched(row: Mapping[str, Any]) -> tuple[str, ...]:
    ratios = [(row["to_dense"] or {}).get(part) for part in ("ttft", "end_to_end")]
    shown = ["" if ratio is None else f"{ratio['median']:.3f}" for ratio in ratios]
    return (f"{row['milliseconds']['ttft']['median']:.1f}", *shown)
