"""`vtoken tune`: the cheapest pipeline that keeps a model's answers."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.shared.options import number

EPILOG = """\
a space file:
  alternatives:                                # each a list of stages, as in a pipeline file
    before: [fastervlm: {keep: {low: 16, high: 192, log: true}}]
    inside: [fastv: {layer: {values: [1, 2]}, keep: {low: 16, high: 192, log: true}}]
  positions: {values: [original, compact]}     # left out: original; newline, anyres and min_visual_tokens likewise
a range is {values: [..]} or {low:, high:}, with step: or log: true; whole bounds give whole numbers.

examples:
  vtoken tune tiny-llava --data reference --limit 48 --space space.yaml --trials 12
      the shipped model on its own held-out questions: as many answers as possible like dense's, as few FLOPs as possible
  vtoken tune llava-hf/llava-1.5-7b-hf --data mine.jsonl --quality accuracy --keep-accuracy 98% --objective ttft --space space.yaml
      lines {"image": FILE, "question": TEXT, "answer": TEXT}; cost is measured, dense and pruned interleaved
  vtoken tune Qwen/Qwen2.5-VL-3B-Instruct --data textvqa_val,gqa --limit 100 --keep-accuracy 98% --space space.yaml
      lmms-eval's tasks, scored by their own scorers
  vtoken tune Qwen/Qwen2.5-VL-3B-Instruct --data textvqa_val --limit 30 --quality cosine --space space.yaml --trials 50
      their prompts alone, and VFlowOpt's objective; no labels needed

agreement: share of answers that are dense's; accuracy: that are the right ones, of tasks: mean over tasks of the metric vtoken eval
reports, as a share of dense's; cosine: of the last prompt token's final hidden state with dense's. A trial is stopped when it cannot
reach the floor any more, or is below it and below the median of the trials before after the first samples; a metric that is no mean
over documents (F1, sums) is known only after all of them, so nothing is stopped.

Run it again with more --trials to go on. DIR holds best-1.yaml, best-2.yaml, ... (the Pareto front; the cheapest that keeps enough comes
first; none that cost as much as dense or more), tune.json (all trials) and study.db (Optuna's). The samples that choose a pipeline flatter it: score the best with vtoken eval
on others.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.description = "Searches stages, budgets and options: quality against cost."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="shipped model (tiny-llava), local folder or hub name")
    parser.add_argument("--space", type=Path, required=True, metavar="FILE", help="what may vary")
    parser.add_argument(
        "--data", default="reference", metavar="DATA", help="reference, FILE.jsonl or lmms-eval's tasks"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N samples (of each task)")
    parser.add_argument(
        "--include",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders with tasks of yours (lmms-eval's YAML)",
    )
    parser.add_argument(
        "--quality",
        choices=("agreement", "accuracy", "cosine"),
        help="what is kept (default: accuracy of lmms-eval's tasks, else agreement)",
    )
    parser.add_argument("--objective", choices=("flops", "ttft"), default="flops", help="cost (default: %(default)s)")
    parser.add_argument(
        "--keep-accuracy", type=_share, default=0.98, metavar="SHARE", help="of dense's quality (default: 98%%)"
    )
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="earlier ones count (default: %(default)s)")
    parser.add_argument(
        "--first",
        type=int,
        default=8,
        metavar="N",
        help="samples after which a trial may be stopped (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("vtoken-tune"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--revision", metavar="NAME", help="of a hub model (default: main)")
    parser.add_argument("--json", action="store_true", help="print what is in tune.json and nothing else")


def run(args: argparse.Namespace) -> int:
    """Searches, writes and prints.

    Raises:
        VtokenError: Optuna is missing, or a file or argument that cannot be used.
    """
    from vtoken.evals.shared.yaml_options import read
    from vtoken.evals.tune.space import Space

    space = read(Space, args.space)
    space.check()
    if find_spec("optuna") is None:
        raise VtokenError('vtoken tune needs Optuna: pip install "vtoken[tune]"')
    if args.batch_size < 1:
        raise ConfigError(f"batch-size must be at least 1, not {args.batch_size}")
    from vtoken.evals.tune import samples
    from vtoken.evals.tune.cost import shape
    from vtoken.evals.tune.quality import Judge, Measure
    from vtoken.evals.tune.search import Search

    tasks = samples.tasks(args.data, args.limit, folders=[folder.resolve() for folder in args.include])
    asked = samples.load(args.data, args.limit) if tasks is None else tasks.samples
    quality: Measure = args.quality or ("agreement" if tasks is None else "accuracy")
    generator = _generator(args)
    judge = Judge(generator, asked, quality, args.batch_size, tasks, args.first)
    about = {
        "model": args.model,
        "revision": args.revision,
        "dtype": str(generator.model.dtype),
        "batch_size": args.batch_size,
        "samples": samples.fingerprint(asked),
    }
    if judge.relative is not None:
        about |= {"scorers": judge.relative.tasks.names, "lmms_eval": version("lmms-eval")}
    like = shape(generator, asked[0])
    search = Search(judge, space, args.out, like, args.objective, args.keep_accuracy, args.first, args.seed, about)
    from tqdm import tqdm

    with tqdm(desc="trials", total=args.trials) as bar:

        def progress(done: int, what: str) -> None:
            bar.n = done
            bar.set_postfix_str(what)

        search.run(args.trials, progress)
        bar.update(args.trials - bar.n)
    files = search.write()
    if args.json:
        print(json.dumps(search.to_dict()))
        return 0
    _print(search, files)
    return 0


def _generator(args: argparse.Namespace) -> Any:
    from vtoken.evals import processors, reference
    from vtoken.evals.lmms.generation import TextGenerator
    from vtoken.evals.shared import models

    model = models.load(args.model, device=args.device, dtype=args.dtype, revision=args.revision)
    shipped = args.model in reference.names()
    source = reference.path(args.model) if shipped else args.model
    return TextGenerator(model, processors.load(source, pillow=shipped, revision=args.revision))


def _print(search: Any, files: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    found = search.to_dict()
    table = Table("file", search.judge.measure, f"{search.objective} / dense", "pipeline")
    for file, trial in zip(files, search.best(), strict=True):
        stages = trial.user_attrs["pipeline"].partition("stages:")[2].strip()
        table.add_row(file.name, f"{trial.values[0]:.4f}", f"{trial.values[1]:.4f}", stages)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    stopped = sum(bool(trial["stopped"]) for trial in found["trials"])
    refused = sum(bool(trial["refused"]) for trial in found["trials"])
    print(
        f"{len(found['trials'])} trials, {stopped} stopped early, {refused} refused by the model; dense {search.judge.dense:.4f}, "
        f"floor {search.floor:.4f}, {len(search.judge.samples)} samples, cost of a prompt of {search.like.to_dict()}"
    )
    if found["dense"] is not None:
        print("dense: " + ", ".join(f"{name} {value:.6g}" for name, value in found["dense"].items()))
    word, slow = "faster" if search.objective == "ttft" else "cheaper", len(search.no_gain())
    if slow:
        print(f"{slow} trials were not {word} than dense, and are not recommended")
    if slow and not files:
        print(f"no trial was {word} than dense: take the stock model, or lower budgets and longer prompts")
    elif not files or search.best()[0].values[0] < search.floor:
        print("no trial keeps enough: allow larger budgets, more trials, or a lower --keep-accuracy")
    if files and search.objective == "flops":
        print(f"FLOPs are counted, no time was taken: vtoken bench {search.about.get('model')} {files[0]} tells")
    print(f"wrote {search.folder / 'tune.json'} and {len(files)} pipelines")


def _share(text: str) -> float:
    try:
        return number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 98% or 0.98") from None
