"""`vtoken eval`: how good and how fast pipelines are on lmms-eval's tasks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from vtoken.errors import ConfigError
from vtoken.evals.quality.options import EvalOptions
from vtoken.evals.shared.options import argument, as_json, option

DESCRIPTION = "Scores pipelines with lmms-eval's tasks and scorers, and records what every answer cost."
EXAMPLES = """\
examples:
  vtoken eval tiny-llava --pipelines fastervlm:64 random:64 --tasks vtoken_glyph_qa --limit 60
      the shipped model on its own held-out questions, offline
  vtoken eval llava-hf/llava-1.5-7b-hf --pipelines fastervlm-64 mine.yaml --tasks pope,gqa,textvqa_val --out out
      lmms-eval's tasks; data come from the hub, most of them with a login (hf auth login)
  vtoken eval Qwen/Qwen2.5-VL-3B-Instruct --pipelines flowcut-64 --tasks pruning-suite --batch-size 8 --dtype bfloat16
      a suite: smoke, pruning-suite, pruning-suite-hires, pruning-suite-video, pruning-suite-judge
  vtoken eval Qwen/Qwen2.5-VL-3B-Instruct --tasks pope --lmms-eval-pixels
      the picture sizes that lmms-eval's own Qwen classes use; no pipeline: the stock model alone
  vtoken eval --paper flowcut
      published tables of FlowCut, their sources, and the commands that measure their rows; runs nothing
  vtoken eval llava-hf/llava-1.5-7b-hf --paper flowcut --limit 500
      runs those of that model, prints published beside measured

The model is loaded once; the stock model runs first and last. DIR holds results.json, one line per answer in requests/,
table.md and report.html (vtoken report DIR writes them anew).
Needs lmms-eval: `make eval-venv` in a checkout, or pip install "lmms-eval>=0.7.3,<0.8".
"""


class Settings(EvalOptions):
    """What is asked, and how."""

    model: str | None = argument("MODEL", "shipped model (tiny-llava), local folder or hub name", None)
    pipelines: tuple[str, ...] = option((), "presets, method:budget or YAML files", "PIPELINE")
    tasks: str | None = option(None, "lmms-eval's tasks and groups, or suites", "TASK,TASK")
    paper: str | None = option(
        None,
        "pipelines and tasks of the published tables of a method, measured beside published; without MODEL: what they "
        "say and what would be run",
        "METHOD",
    )
    out: Path = option(Path("vtoken-eval"), "new folder", "DIR")
    lmms_eval_pixels: bool = option(False, "both as lmms-eval's own Qwen classes set them")
    threads: int | None = option(None, "CPU threads of torch (default: torch's choice)", ge=1)
    in_json: bool = as_json("print what is in results.json and nothing else")


def run(asked: Settings) -> None:
    """Scores, writes and prints."""
    from vtoken.evals.lmms.suites import expand, has_judge
    from vtoken.evals.quality import paper

    named, given = asked.pipelines, asked.tasks
    if asked.paper is not None and asked.model is None:
        print(paper.beside(asked.paper))
        return
    if asked.model is None or (given is None and asked.paper is None):
        raise ConfigError("vtoken eval needs a MODEL and --tasks, or --paper METHOD; see `vtoken eval --help`")
    if asked.paper is not None:
        chosen = paper.of(asked.paper, asked.model)
        named = tuple(dict.fromkeys([*paper.pipelines(chosen), *named]))
        given = given or ",".join(paper.tasks(chosen, judge=has_judge()))
    from vtoken.config import load
    from vtoken.evals.lmms.prepare import prepare

    prepare("vtoken eval")
    pipelines = [load(each) for each in named]  # A typing error must not cost the loading of a model.
    tasks = expand((given or "").split(","))
    from vtoken.evals.lmms.harness import Harness
    from vtoken.evals.lmms.model import VtokenModel
    from vtoken.evals.quality.printed import publish
    from vtoken.evals.quality.run import evaluate, planned
    from vtoken.evals.shared.bars import progress
    from vtoken.evals.shared.models import set_threads

    planned(pipelines, asked.out)
    set_threads(asked.threads)
    harness = Harness(tasks, [folder.resolve() for folder in asked.include], asked.prompts)
    options = {"device": asked.device, "lmms_eval_pixels": asked.lmms_eval_pixels, **asked.model_args()}
    model, command = VtokenModel(asked.model, **options), shlex.join(["vtoken", *sys.argv[1:]])
    with progress():
        results = evaluate(model, pipelines, harness, asked.out, asked.limit, command)
    publish(results, asked.in_json, timed=True)
    if asked.paper is not None and not asked.in_json:
        print(paper.beside(asked.paper, results.to_dict()))


def kept(asked: Settings) -> str:
    if not (asked.out / "results.json").exists():
        return ""
    return (
        f"finished tasks are kept in {asked.out / 'results.json'} and {asked.out / 'requests'}; vtoken eval does not "
        "go on from them (run it with another --out), vtoken sweep does"
    )
