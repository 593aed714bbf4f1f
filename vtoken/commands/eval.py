"""`vtoken eval`: how good and how fast pipelines are on lmms-eval's tasks."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vtoken.errors import ConfigError

if TYPE_CHECKING:
    from vtoken.evals.quality.run import Results

EPILOG = """\
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
Needs lmms-eval: `make eval-venv` in a checkout, or pip install "vtoken[eval]".
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.description = "Scores pipelines with lmms-eval's tasks and scorers, and records what every answer cost."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="shipped model (tiny-llava), local folder or hub name"
    )
    parser.add_argument(
        "--pipelines", nargs="+", default=[], metavar="PIPELINE", help="presets, method:budget or YAML files"
    )
    parser.add_argument("--tasks", metavar="TASK,TASK", help="lmms-eval's tasks and groups, or suites")
    parser.add_argument(
        "--paper",
        metavar="METHOD",
        help="pipelines and tasks of the published tables of a method, measured beside published; without MODEL: what they say "
        "and what would be run",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of every task (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="prompts at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("vtoken-eval"), metavar="DIR", help="new folder (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--attn", metavar="NAME", help="attention implementation (default: transformers' choice)")
    parser.add_argument("--revision", metavar="NAME", help="of a hub model (default: main)")
    parser.add_argument("--min-pixels", type=int, metavar="N", help="of a picture, Qwen (default: the processor's own)")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="of a picture, Qwen (default: the processor's own)")
    parser.add_argument("--lmms-eval-pixels", action="store_true", help="both as lmms-eval's own Qwen classes set them")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="most of a video (default: %(default)s)")
    parser.add_argument(
        "--system-prompt", metavar="TEXT", help="text, or a file that holds it (default: the template's)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="in place of what the tasks say")
    parser.add_argument("--prompts", metavar="NAME", help="lmms-eval's model name whose prompts to use, as qwen_vl")
    parser.add_argument(
        "--include", type=Path, nargs="+", default=[], metavar="DIR", help="folders with tasks of yours"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="print what is in results.json and nothing else")


def run(args: argparse.Namespace) -> int:
    """Scores, writes and prints.

    Raises:
        VtokenError: lmms-eval is missing, or an argument that cannot be used.
    """
    from vtoken.evals.lmms.suites import expand, has_judge
    from vtoken.evals.quality import paper

    if args.paper is not None and args.model is None:
        print(paper.beside(args.paper))
        return 0
    if args.model is None or (args.tasks is None and args.paper is None):
        raise ConfigError("vtoken eval needs a MODEL and --tasks, or --paper METHOD; see `vtoken eval --help`")
    if args.paper is not None:
        chosen = paper.of(args.paper, args.model)
        args.pipelines = list(dict.fromkeys([*paper.pipelines(chosen), *args.pipelines]))
        args.tasks = args.tasks or ",".join(paper.tasks(chosen, judge=has_judge()))
    from vtoken.config import load
    from vtoken.evals.lmms.prepare import prepare

    prepare("vtoken eval")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"threads must be at least 1, not {args.threads}")
    pipelines = [load(each) for each in args.pipelines]  # A typing error must not cost the loading of a model.
    tasks = expand(args.tasks.split(","))
    import torch

    from vtoken.evals.lmms.harness import Harness
    from vtoken.evals.lmms.model import VtokenModel
    from vtoken.evals.quality.report import publish
    from vtoken.evals.quality.run import evaluate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    harness = Harness(tasks, [folder.resolve() for folder in args.include], args.prompts)
    model = VtokenModel(
        args.model,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn,
        revision=args.revision,
        batch_size=args.batch_size,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        lmms_eval_pixels=args.lmms_eval_pixels,
        frames=args.frames,
        system_prompt=args.system_prompt,
        max_new_tokens=args.max_new_tokens,
    )
    command = shlex.join(["vtoken", *sys.argv[1:]])
    results = evaluate(
        model, pipelines, harness, args.out, args.limit, command, lambda what: print(what, file=sys.stderr)
    )
    if args.json:
        publish(results.folder)
        print(json.dumps(results.to_dict()))
        return 0
    from vtoken.evals.shared.console import show

    show(args.model, cells(results))
    for sentence in notes(results):
        print(sentence)
    for file in publish(results.folder):
        print(f"wrote {file}")
    if args.paper is not None:
        print(paper.beside(args.paper, results.to_dict()))
    return 0


def cells(results: Results) -> list[tuple[str, ...]]:
    """Head and rows as text: every task's value, with what share of dense it is."""
    names = [
        f"{name}\n{about['metric']}" + (f" of {about['scale']:g}" if about["scale"] else "")
        for name, about in results.tasks.items()
    ]
    head = ("pipeline", *names, "answers as dense", "visual tokens", "over layers", "TTFT ms", "TTFT / dense")
    rows = [head]
    for run in results.runs:
        tasks = run["tasks"]
        docs = {name: results.tasks[name]["docs"] for name in tasks}

        def mean(key: str, tasks: dict = tasks, docs: dict = docs) -> float:
            return sum(tasks[name][key] * docs[name] for name in tasks) / sum(docs.values())

        rows.append(
            (
                run["name"],
                *(_value(tasks[name]) for name in tasks),
                f"{100 * mean('same_as_dense'):.1f} %",
                f"{mean('visual_tokens_entry'):.0f} of {mean('visual_tokens'):.0f}",
                f"{mean('visual_tokens_mean'):.0f}",
                f"{1e3 * mean('ttft_s'):.1f}",
                f"{mean('ttft_to_dense'):.2f}",
            )
        )
    return rows


def notes(results: Results) -> list[str]:
    """Conditions in words."""
    about = results.conditions
    found = [
        f"{about['device']}, {about['dtype']}, batch {about['batch_size']}, {about['versions']}, lmms-eval {about['lmms_eval']}",
        "TTFT: medians over documents, averaged over tasks; pipelines ran one after the other, so drift counts: see vtoken bench",
    ]
    if results.drift:
        found.append(
            f"drift: last dense run / first, TTFT {results.drift['ttft']:.3f}; {results.drift['answers_changed']} answers changed"
        )
    return [*found, f"wrote {results.folder / 'results.json'}"]


def _value(task: dict) -> str:
    if task["value"] is None:
        return "n/a"
    share = "" if task["of_dense"] is None else f" ({100 * task['of_dense']:.0f} %)"
    return f"{task['value']:.3f}{share}"
