"""`vtoken report`: what a run of `vtoken eval` says, as a page, as tables, as numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = """\
examples:
  vtoken report vtoken-eval                      DIR/report.html and DIR/table.md, anew
  vtoken report vtoken-eval --out pruning.html   the page elsewhere
  vtoken report vtoken-eval --json               every number, with intervals and tests, to stdout; writes nothing
  vtoken report vtoken-eval --paper flowcut      published numbers of FlowCut beside those measured

Needs neither lmms-eval nor the model. The page is one file and fetches nothing; it needs pip install jinja2 matplotlib.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Percent of dense with paired bootstrap intervals and McNemar's test, Pareto fronts against tokens, FLOPs and "
        "time to\nfirst token, what deciding costs, and the worst regressions with the tokens that were kept."
    )
    parser.epilog = EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="that `vtoken eval --out DIR` wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")
    parser.add_argument("--paper", metavar="METHOD", help="print published numbers beside those measured")
    parser.add_argument("--json", action="store_true", help="print every number as one JSON object and write nothing")


def run(args: argparse.Namespace) -> int:
    """Reads, computes, writes."""
    from vtoken.evals.quality import paper, report
    from vtoken.evals.quality.analysis import analyse, read

    evaluation = read(args.folder)
    found = analyse(evaluation)
    if args.json:
        print(json.dumps(found))
        return 0
    if args.paper is not None:
        print(paper.beside(args.paper, evaluation.results))
        return 0
    written = report.write(evaluation, found, args.out)
    for file in written:
        print(f"wrote {file}")
    if len(written) == 1:
        print(report.MISSING.format(folder=args.folder))
    return 0
