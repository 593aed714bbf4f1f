"""`vtoken sweep`: pipelines x tasks from one YAML file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.evals.shared.options import Options, argument, as_json, option

if TYPE_CHECKING:
    from vtoken.evals.quality.results import Results

DESCRIPTION = "Scores pipelines on tasks, point by point and resumably, then times them."
EXAMPLES = """\
a sweep file:
  model: tiny-llava
  methods: [fastervlm, visionzip, random]     # each at every budget
  budgets: [64, 32, 16]
  pipelines: [fastervlm-64, mine.yaml]        # and these as they are
  tasks: [vtoken_glyph_qa]
  limit: 48
  speed: {new_tokens: 16, repeats: 7}         # a second pass, batch 1, interleaved; left out: none
other keys: batch_size, device, dtype, attn, revision, min_pixels, max_pixels, frames, system_prompt, max_new_tokens,
prompts, include; they mean what the options of vtoken eval mean.

examples:
  vtoken sweep sweep.yaml --out out
      run it again after a kill: what is in out/points is not asked again
  vtoken sweep sweep.yaml --out out --workers 4
      four processes, each with its model, on the GPUs in turn; each takes the next pipeline and task
  vtoken sweep sweep.yaml --out out --ray auto --workers 8
      eight actors of a Ray cluster, one GPU each; --ray alone takes the cluster of this machine or starts one, and
      without --workers every GPU has an actor. A point whose actor dies is asked once more. vtoken, model and tasks
      must be the same on all machines; results are written here (pip install ray)
  torchrun --nproc-per-node 4 -m vtoken sweep sweep.yaml --out out
      every task's documents shared out over the processes; accelerate launch does as well

The stock model is asked first and last. DIR holds results.json, requests/, table.md and report.html, as of vtoken eval.
A point is asked again when model, weights, pipeline, task, limit, generation settings or versions differ. Documents of
hub data sets are not part of that: if they changed, the sweep says so.
"""


class Settings(Options):
    """Where a sweep runs."""

    file: Path = argument("SWEEP.yaml", "what to sweep")
    out: Path = option(Path("vtoken-sweep"), "folder", "DIR")
    workers: int | None = option(None, "processes (default: 1), or actors of --ray", ge=1)
    threads: int | None = option(None, "CPU threads of torch, of all workers together", ge=1)
    ray: str | None = option(None, "spread points over a Ray cluster (needs Ray)", "ADDRESS", bare="")
    in_json: bool = as_json("print what is in results.json and nothing else")


def run(asked: Settings) -> None:
    """Sweeps, writes and prints."""
    from vtoken.evals.lmms.prepare import prepare, prepare_ray
    from vtoken.evals.quality.options import Sweep
    from vtoken.evals.shared.whole import check_out
    from vtoken.evals.shared.yaml_options import read

    sweep = read(Sweep, asked.file)
    check_out(asked.out)
    if asked.ray is not None:
        prepare_ray()
    prepare("vtoken sweep")
    from vtoken.evals.lmms.harness import ranks
    from vtoken.evals.quality import sweep as sweeping
    from vtoken.evals.quality.report import publish
    from vtoken.evals.shared.bars import progress
    from vtoken.evals.shared.models import set_threads

    set_threads(asked.threads)
    command = shlex.join(["vtoken", *sys.argv[1:]])
    with progress(shown=ranks()[0] == 0):
        results = sweeping.run(sweep, asked.out, asked.workers, command, asked.ray)
    if results is not None:
        publish(results, cells(results), notes(results), asked.in_json)


def kept(asked: Settings) -> str:
    folder = asked.out / "points"
    points = len(list(folder.glob("*.json")))
    return f"{points} finished points are kept in {folder}; the same command goes on from them" if points else ""


def cells(results: Results) -> list[tuple[str, ...]]:
    """Head and rows as text: accuracy, and speed where there was a speed pass."""
    from vtoken.evals.quality.results import score_text

    timed = {} if results.speed is None else {row["name"]: row for row in results.speed["rows"]}
    names = [f"{name}\n{about['metric']}" for name, about in results.tasks.items()]
    times = ("TTFT ms", "TTFT / dense", "end / dense") if timed else ()
    rows = [("pipeline", *names, "answers as dense", "visual tokens", "over layers", *times)]
    for run in results.runs:
        keys = ("same_as_dense", "visual_tokens_entry", "visual_tokens_mean")
        same, entry, mean = (results.mean(run, key) for key in keys)
        scores = (score_text(run["tasks"].get(name)) for name in results.tasks)
        speed = _times(timed[run["name"]]) if timed else ()
        rows.append((run["name"], *scores, f"{100 * same:.1f} %", f"{entry:.0f}", f"{mean:.0f}", *speed))
    return rows


def notes(results: Results) -> list[str]:
    """Conditions in words."""
    about = results.conditions
    found = [f"{about['device']}, {about['dtype']}, {about['versions']}, lmms-eval {about['lmms_eval']}"]
    if results.speed is not None:
        found.append(
            "times: medians at batch 1 on random prompts, dense and pipelines interleaved; ratios within a round"
        )
    if results.drift is not None:
        changed = results.drift["answers_changed"]
        found.append(f"drift: {changed} answers of the last dense run differ from the first one's")
    return found


def _times(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = [(row["to_dense"] or {}).get(part) for part in ("ttft", "end_to_end")]
    shown = ["" if ratio is None else f"{ratio['median']:.3f}" for ratio in ratios]
    return (f"{row['milliseconds']['ttft']['median']:.1f}", *shown)
