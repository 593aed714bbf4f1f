"""`vtoken calibrate attention_exit`: the attention below which images may leave, for a share of unchanged answers or a mean layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from vtoken.compressors.decoder.attention_exit import AttentionExit
from vtoken.errors import ConfigError
from vtoken.evals.calibrate._attention import Point, search, see
from vtoken.evals.calibrate._report import add_json, add_out, check_out, tell_pipeline
from vtoken.evals.pictures.report import wilson
from vtoken.evals.shared.options import number
from vtoken.evals.shared.samples import ABOUT, load, read

SUMMARY = "the share of attention below which images leave (attention_exit)"
SHOWN = 8  # thresholds in the table
EXAMPLES = """examples:
  vtoken calibrate attention_exit tiny-llava -o exit.yaml                  # 99 % of the answers stay what they were
  vtoken calibrate attention_exit llava-hf/llava-1.5-7b-hf --data mine.jsonl --limit 500 --accuracy 0.98 -o exit.yaml
  vtoken calibrate attention_exit tiny-llava --mean-layer 3 --json | jq .threshold
  vtoken bench tiny-llava exit.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the method's options."""
    parser.description = (
        "Notes how much attention images get in every layer, and what the model would answer if they left there: one dense run per\n"
        "question and the deeper layers on text alone. Takes the largest threshold such that it and all smaller ones meet the target.\n"
        "Questions that images must answer late count as any other: give questions of every kind the model will get."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="shipped model, folder or hub id")
    parser.add_argument("--data", metavar="DATA", help=f"{ABOUT} (default: the last of the shipped)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="so many questions (default: %(default)s)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--agreement", type=number, metavar="SHARE", help="of answers that stay word for word (default: 0.99)"
    )
    target.add_argument(
        "--accuracy", type=number, metavar="SHARE", help="of the dense model's right answers; DATA must hold answers"
    )
    target.add_argument("--mean-layer", type=number, metavar="K", help="images leave before this layer on average")
    parser.add_argument(
        "--first",
        type=int,
        metavar="K",
        help="first layer that may do without (default: the best from half of the depth on)",
    )
    parser.add_argument(
        "--window", type=int, default=1, metavar="N", help="text tokens that are asked (default: %(default)s)"
    )
    parser.add_argument("--patience", type=int, default=1, metavar="N", help="layers in a row (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=0, metavar="P", help="percent left out (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: that of the weights)")
    add_out(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Finds the threshold and writes the pipeline.

    Raises:
        VtokenError: a target that no threshold meets, or a model, data or option that cannot be used.
    """
    targets = {name: getattr(args, name) for name in ("agreement", "accuracy", "mean_layer")}
    (kind, target), *_ = [pair for pair in targets.items() if pair[1] is not None] or [("agreement", 0.99)]
    if kind != "mean_layer" and not 0 < target <= 1:
        raise ConfigError(f"--{kind} is a share, above 0 and at most 1, not {target:g}")
    if args.limit < 1:
        raise ConfigError(f"--limit must be at least 1 question, not {args.limit}")
    check_out(args.out)
    samples = read(args.data, args.limit) if args.data else read("reference")[-args.limit :]
    if kind == "accuracy" and any(sample.answer is None for sample in samples):
        raise ConfigError(f"--accuracy needs an answer to every question; {args.data} lacks some, or use --agreement")
    model, processor = load(args.model, args.device, args.dtype)
    depth = model.config.get_text_config().num_hidden_layers
    tried = range(max(1, depth // 2), depth) if args.first is None else range(args.first, args.first + 1)
    if not 1 <= tried[0] < depth:
        raise ConfigError(
            f"--first must lie between 1 and {depth - 1}, the last layer of {args.model}; not {args.first}"
        )
    if not 1 <= args.patience <= depth - tried[0]:
        raise ConfigError(
            f"--patience must lie between 1 and {depth - tried[0]}, the layers from {tried[0]} on; not {args.patience}"
        )
    options = {"window": args.window, "patience": args.patience, "sinks": args.sinks}
    seen = see(model, processor, samples, AttentionExit(first=tried[0], **options))
    first, best, points = search(seen, tried, kind, target, depth)
    options = {"first": first, **options}
    low, high = wilson(round(best.agreement * len(samples)), len(samples))
    told = {"questions": len(samples), "target": {kind: target}, "depth": depth, **options, **asdict(best)}
    told |= {"agreement_interval": [low, high], "curve": [asdict(each) for each in points]}
    about = (
        f"attention_exit for {args.model}: of {len(samples)} questions {best.agreement:.1%} are answered as before (95 % interval {low:.0%} to "
        f"{high:.0%}, of other questions of their kind), with {best.mean_layer / depth:.1%} of the visual tokens on average over layers."
    )
    stage = {"attention_exit": {"threshold": best.threshold, **options}}
    tell_pipeline(args, told, table(points, best, depth), about, stage)
    return 0


def table(points: Sequence[Point], best: Point, depth: int) -> list[tuple[str, ...]]:
    """Head and rows: some thresholds, the chosen one among them."""
    step = max(1, -(-len(points) // SHOWN))
    shown = [point for k, point in enumerate(points) if k % step == 0 or point == best or k == len(points) - 1]
    head = (
        "threshold",
        "answers as dense",
        "right / dense",
        "leave before layer",
        "visual tokens, mean over layers",
        "",
    )
    rows = [
        (
            f"{point.threshold:g}",
            f"{point.agreement:.1%}",
            "n/a" if point.accuracy is None else f"{point.accuracy:.1%}",
            f"{point.mean_layer:.2f}",
            f"{point.mean_layer / depth:.1%}",
            "chosen" if point == best else "",
        )
        for point in shown
    ]
    return [head, *rows]
