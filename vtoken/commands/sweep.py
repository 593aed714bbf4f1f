"""`vtoken sweep`: pipelines x tasks from one YAML file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from vtoken.evals.shared.options import Options, argument, as_json, option

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
    from vtoken.evals.quality.printed import publish
    from vtoken.evals.shared.bars import progress
    from vtoken.evals.shared.models import set_threads

    set_threads(asked.threads)
    command = shlex.join(["vtoken", *sys.argv[1:]])
    with progress(shown=ranks()[0] == 0):
        results = sweeping.run(sweep, asked.out, asked.workers, command, asked.ray)
    if results is not None:
        publish(results, asked.in_json, timed=False)


def kept(asked: Settings) -> str:
    folder = asked.out / "points"
    points = len(list(folder.glob("*.json")))
    return f"{points} finished points are kept in {folder}; the same command goes on from them" if points else ""
