"""`vtoken report`: what a run of `vtoken eval` says, as a page, as tables, as numbers."""

from __future__ import annotations

import json
from pathlib import Path

from vtoken.evals.shared.options import Options, argument, as_json, option

DESCRIPTION = """\
Percent of dense with paired bootstrap intervals and McNemar's test, Pareto fronts against tokens, FLOPs and time to
first token, what deciding costs, and the worst regressions with the tokens that were kept."""
EXAMPLES = """\
examples:
  vtoken report vtoken-eval                      DIR/report.html and DIR/table.md, anew
  vtoken report vtoken-eval --out pruning.html   the page elsewhere
  vtoken report vtoken-eval --json               every number, with intervals and tests, to stdout; writes nothing
  vtoken report vtoken-eval --paper flowcut      published numbers of FlowCut beside those measured

Needs neither lmms-eval nor the model. The page is one file and fetches nothing; it needs pip install jinja2 matplotlib.
"""


class Settings(Options):
    """Which run, and what of it."""

    folder: Path = argument("DIR", "that `vtoken eval --out DIR` wrote")
    out: Path | None = option(None, "the page (default: DIR/report.html)")
    paper: str | None = option(None, "print published numbers beside those measured", "METHOD")
    in_json: bool = as_json("print every number as one JSON object and write nothing")


def run(asked: Settings) -> None:
    """Reads, computes, writes."""
    from vtoken.evals.quality import paper, report
    from vtoken.evals.quality.analysis import analyse, read
    from vtoken.evals.shared.whole import check_folder

    check_folder(asked.out)
    evaluation = read(asked.folder)
    if asked.paper is not None and not asked.in_json:
        print(paper.beside(asked.paper, evaluation.results))
        return
    found = analyse(evaluation)
    if asked.in_json:
        print(json.dumps(found))
        return
    written = report.write(evaluation, found, asked.out)
    for file in written:
        print(f"wrote {file}")
    if len(written) == 1:
        print(report.MISSING.format(folder=asked.folder))
