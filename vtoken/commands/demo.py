"""`vtoken demo`: the reference VLM, dense and pruned, as one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from vtoken.errors import VtokenError, unknown
from vtoken.evals.shared.options import Options, as_json, option

DESCRIPTION = """\
Runs dense, fastervlm, uniform, random and resize (where the model takes pictures of any size) at three budgets on the
shipped pictures: accuracy, tokens, FLOPs, time to first token, cache bytes. Writes report.html with the table, a plot
and pictures of the kept tokens."""
EXAMPLES = """examples:
  vtoken demo                                  # writes vtoken-demo/report.html
  vtoken demo --limit 480                      # four times the questions: intervals half as wide
  vtoken demo --all --limit 96                 # every method there is, at three budgets
  vtoken demo --budgets 128,64,8 --out wide    # other budgets, other folder
  vtoken demo --model tiny-qwen2.5-vl          # another family
  vtoken demo --json | jq '.pipelines[] | [.pipeline, .accuracy.share]'
"""


def _budgets(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 64,32,16")
    return found


class Settings(Options):
    """What is compared."""

    model: str = option("tiny-llava", "shipped model")
    out: Path = option(Path("vtoken-demo"), "folder", "DIR")
    limit: int = option(120, "first N questions, 6 per picture", ge=1)
    all: bool = option(
        False,
        "every stage that runs on the model, those without a budget once (default: fastervlm, uniform, random, resize)",
    )
    budgets: tuple[int, ...] | None = option(
        None, "visual tokens to keep (default: about 1/9, 1/18 and 1/36 of the picture's)", "N,N,N", read=_budgets
    )
    in_json: bool = as_json("print the numbers as one JSON object")

    def command(self) -> str:
        """The command line that makes the report, without where it is written."""
        parts = ["vtoken demo", f"--model {self.model}", f"--limit {self.limit}"]
        parts += ["--all"] if self.all else []
        parts += [f"--budgets {','.join(map(str, self.budgets))}"] if self.budgets else []
        return " ".join(parts)


def run(asked: Settings) -> None:
    """Runs the demo and writes the page."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise VtokenError(f"the report needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from vtoken.evals import reference
    from vtoken.evals.pictures import demo
    from vtoken.evals.pictures.report import render
    from vtoken.evals.shared.bars import progress
    from vtoken.evals.shared.models import set_threads
    from vtoken.evals.shared.whole import check_out

    if asked.model not in reference.names():
        raise VtokenError(unknown("reference model", asked.model, reference.names()))
    check_out(asked.out)
    if asked.command() == Settings().command():
        print("takes about a minute of one core, no GPU", file=sys.stderr)
    set_threads(1)  # So small a model gains nothing from more, and loses where cores are busy.
    with progress():
        report = demo.run(asked.model, asked.budgets, asked.limit, asked.all, asked.command())
    asked.out.mkdir(parents=True, exist_ok=True)
    page = asked.out / "report.html"
    page.write_text(render(report), encoding="utf-8")
    if asked.in_json:
        print(json.dumps({"report": str(page), **report.to_dict()}))
        return
    rows = report.figures()
    wide = max(len(row["pipeline"]) for row in rows)
    for row in rows:
        print(
            f"{row['pipeline']:<{wide}} {row['tokens']:>4} tokens  {100 * row['accuracy']['share']:5.1f} % right  "
            f"FLOPs x{row['flops_ratio']:.2f}  TTFT {1000 * row['ttft']['median']:6.1f} ms "
            f"x{row['ttft_ratio']['median']:.2f}  cache {row['cache_bytes'] / 1024:7.0f} KiB"
        )
    print(f"wrote {page}")
