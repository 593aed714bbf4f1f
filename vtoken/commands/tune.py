"""`vtoken tune`: the cheapest pipeline that keeps a model's answers."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtoken.errors import VtokenError
from vtoken.evals.shared.options import DATA, ModelCommand, as_json, number, option

DESCRIPTION = "Searches stages, budgets and options: quality against cost."
EXAMPLES = """\
a space file:
  alternatives:                                # each a list of stages, as in a pipeline file
    before: [fastervlm: {keep: {low: 16, high: 192, log: true}}]
    inside: [fastv: {layer: {values: [1, 2]}, keep: {low: 16, high: 192, log: true}}]
  positions: {values: [original, compact]}     # left out: original; newline, anyres and min_visual_tokens likewise
a range is {values: [..]} or {low:, high:}, with step: or log: true; whole bounds give whole numbers.

examples:
  vtoken tune tiny-llava --data reference --limit 48 --space space.yaml --trials 12
      the shipped model on its own held-out questions: as many answers as possible like dense's, as few FLOPs as
      possible
  vtoken tune llava-hf/llava-1.5-7b-hf --data mine.jsonl --quality accuracy --keep-accuracy 98% \
--objective ttft --space space.yaml
      lines {"image": FILE, "question": TEXT, "answer": TEXT}; cost is measured, dense and pruned interleaved
  vtoken tune Qwen/Qwen2.5-VL-3B-Instruct --data textvqa_val,gqa --limit 100 --keep-accuracy 98% --space space.yaml
      lmms-eval's tasks, scored by their own scorers
  vtoken tune Qwen/Qwen2.5-VL-3B-Instruct --data textvqa_val --limit 30 --quality cosine --space space.yaml --trials 50
      their prompts alone, and VFlowOpt's objective; no labels needed

agreement: share of answers that are dense's; accuracy: that are the right ones, of tasks: mean over tasks of the metric
vtoken eval reports, as a share of dense's; cosine: of the last prompt token's final hidden state with dense's. A trial
is stopped when it cannot reach the floor any more, or is below it and below the median of earlier trials after the
first samples; a metric that is no mean over documents (F1, sums) is known only after all of them, so nothing is
stopped.

Run it again with more --trials to go on. DIR holds best-1.yaml, best-2.yaml, ... (the Pareto front; the cheapest that
keeps enough comes first; none that cost as much as dense or more), tune.json (all trials) and study.db (Optuna's). The
samples that choose a pipeline flatter it: score the best with vtoken eval on others.
"""


def _share(text: str) -> float:
    try:
        return number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 98% or 0.98") from None


class Settings(ModelCommand):
    """What is searched, on what."""

    space: Path = option(..., "what may vary")
    keep_accuracy: float = option(0.98, "of dense's quality (default: 98%)", "SHARE", read=_share, gt=0, le=1)
    data: str = option("reference", f"{DATA}; or lmms-eval's tasks", "DATA")
    limit: int | None = option(None, "first N samples (of each task)", ge=1)
    include: tuple[Path, ...] = option((), "folders with tasks of yours (lmms-eval's YAML)", "DIR")
    quality: str | None = option(
        None,
        "what is kept (default: accuracy of lmms-eval's tasks, else agreement)",
        choices=("agreement", "accuracy", "cosine"),
    )
    objective: str = option("flops", "cost", choices=("flops", "ttft"))
    trials: int = option(30, "earlier ones count", ge=1)
    first: int = option(8, "samples after which a trial may be stopped", ge=1)
    batch_size: int = option(1, "prompts at a time", ge=1)
    out: Path = option(Path("vtoken-tune"), "folder", "DIR")
    seed: int = option(0, "of the search")
    revision: str | None = option(None, "of a hub model (default: main)")
    in_json: bool = as_json("print what is in tune.json and nothing else")


def run(given: Settings) -> None:
    """Searches, writes and prints."""
    from vtoken.evals.shared.whole import check_out
    from vtoken.evals.shared.yaml_options import read
    from vtoken.evals.tune.space import Space

    space = read(Space, given.space)
    space.check()
    check_out(given.out)
    if find_spec("optuna") is None:
        raise VtokenError("vtoken tune needs Optuna: pip install optuna")
    from vtoken.evals.lmms.generation import TextGenerator
    from vtoken.evals.shared.bars import progress
    from vtoken.evals.shared.models import load_pair
    from vtoken.evals.tune import samples
    from vtoken.evals.tune.cost import shape
    from vtoken.evals.tune.quality import Judge
    from vtoken.evals.tune.search import Search

    tasks = samples.tasks(given.data, given.limit, folders=[folder.resolve() for folder in given.include])
    quality: Any = given.quality or ("agreement" if tasks is None else "accuracy")
    asked = tasks.samples if tasks else samples.load(given.data, given.limit, answered=quality == "accuracy")
    generator = TextGenerator(*load_pair(given.model, given.device, given.dtype, given.revision))
    judge = Judge(generator, asked, quality, given.batch_size, tasks, given.first)
    about: dict[str, Any] = {"model": given.model, "revision": given.revision, "dtype": str(generator.model.dtype)}
    about |= {"batch_size": given.batch_size, "samples": samples.fingerprint(asked)}
    if tasks is not None and quality == "accuracy":
        about |= {"scorers": tasks.names, "lmms_eval": version("lmms-eval")}
    objective: Any = given.objective
    like, keep = shape(generator, asked[0]), given.keep_accuracy
    search = Search(judge, space, given.out, like, objective, keep, given.first, given.seed, about)
    with progress():
        search.run(given.trials)
    files = search.write()
    if given.in_json:
        print(json.dumps(search.to_dict()))
    else:
        _print(search, files)


def kept(asked: Settings) -> str:
    study = asked.out / "study.db"
    return f"finished trials are kept in {study}; the same command goes on from them" if study.exists() else ""


def _print(search: Any, files: list[Path]) -> None:
    from vtoken.evals.shared.tables import show

    found, best = search.to_dict(), search.best()
    rows = [("file", search.judge.measure, f"{search.objective} / dense", "pipeline")]
    for file, trial in zip(files, best, strict=True):
        stages = trial.user_attrs["pipeline"].partition("stages:")[2].strip()
        rows.append((file.name, *(f"{value:.4f}" for value in trial.values), stages))
    show("", rows, width=160)
    stopped, refused = (sum(bool(trial[why]) for trial in found["trials"]) for why in ("stopped", "refused"))
    print(
        f"{len(found['trials'])} trials, {stopped} stopped early, {refused} refused by the model; dense "
        f"{search.judge.dense:.4f}, floor {search.floor:.4f}, {len(search.judge.samples)} samples, cost of a prompt of "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in search.shape.items())
    )
    if found["dense"] is not None:
        print("dense: " + ", ".join(f"{name} {value:.6g}" for name, value in found["dense"].items()))
    word, slow = "faster" if search.objective == "ttft" else "cheaper", len(search.no_gain())
    if slow:
        print(f"{slow} trials were not {word} than dense, and are not recommended")
    if slow and not files:
        print(f"no trial was {word} than dense: take the stock model, or lower budgets and longer prompts")
    elif not files or best[0].values[0] < search.floor:
        print("no trial keeps enough: allow larger budgets, more trials, or a lower --keep-accuracy")
    if files and search.objective == "flops":
        print(f"FLOPs are counted, no time was taken: vtoken bench {search.about.get('model')} {files[0]} tells")
    print(f"wrote {search.folder / 'tune.json'} and {len(files)} pipelines")
