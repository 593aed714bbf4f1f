"""`vtoken bench`: what a pipeline saves in time and memory, and what it costs above the ideal."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from vtoken.evals.shared.options import add_pictures

if TYPE_CHECKING:
    from vtoken.config import Pipeline
    from vtoken.evals.speed.break_even import Measured, Step
    from vtoken.evals.speed.latency import Bench, Row, Spread

EPILOG = """\
examples:
  vtoken bench tiny-llava fastervlm:64
      the shipped model on this machine, dense and pruned
  vtoken bench llava-hf/llava-1.5-7b-hf fastervlm:64 uniform:64 --batch 8 --dtype bfloat16
      two pipelines on one model, eight prompts at a time
  vtoken bench llava-hf/llava-1.5-7b-hf fastervlm:64 --random-weights --device cuda --dtype bfloat16
      7B shapes without a download: latency does not depend on what the weights say
  vtoken bench Qwen/Qwen2.5-VL-3B-Instruct fastervlm:128 --random-weights --image-size 448x672 --frames 8
      a video
  vtoken bench tiny-llava my_pipeline.yaml --repeats 21 --json | jq '.rows[1].to_oracle.ttft'
      the overhead alone
  vtoken bench llava-hf/llava-1.5-7b-hf flowcut-64 fastv-64 --break-even --random-weights --device cuda --dtype bfloat16
      from how many visual tokens each is faster than dense on this machine, and the line for its file

Dense, pipelines and oracles run interleaved in one process. The oracle is the same unwrapped model on a prompt that is
short already: pipeline / oracle is what vtoken itself costs. TTFT runs from the call to the first token, vision included.
Numbers are medians, [25 % - 75 %] below; ratios are formed within a round. Visual tokens are those of the whole batch that enter the
decoder, and their mean over its layers.
"""

HEAD = (
    "pipeline",
    "visual tokens",
    "over layers",
    "vision ms",
    "stages ms",
    "TTFT ms",
    "decode ms/token",
    "end to end ms",
    "peak memory",
    "KV cache",
    "TTFT / dense",
    "TTFT / oracle",
    "end / dense",
    "end / oracle",
    "break-even tokens",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.description = "Latency and memory of dense, pipelines and their oracles, interleaved in one process."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="shipped model (tiny-llava), local folder or hub name")
    parser.add_argument("pipelines", metavar="PIPELINE", nargs="*", help="preset, method:budget or YAML file")
    for option, default, text in (
        ("--batch", 1, "prompts at a time"),
        ("--text-tokens", 32, "prompt tokens that are not visual"),
        ("--new-tokens", 16, "tokens generated, the first of them by prefill"),
        ("--repeats", 7, "rounds that count"),
        ("--warmup", 2, "rounds before them that do not"),
        ("--seed", 0, "of texts, pictures and random weights"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add_pictures(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's choice)")
    parser.add_argument(
        "--random-weights", action="store_true", help="build the model from its config; nothing is downloaded"
    )
    parser.add_argument(
        "--break-even",
        action="store_true",
        help="longer and longer prompts instead: from how many visual tokens on each pipeline is faster than dense, end to end",
    )
    parser.add_argument(
        "--up-to",
        type=int,
        default=4608,
        metavar="N",
        help="visual tokens of the longest prompt of --break-even (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        ConfigError: a model, pipeline, device, dtype or count that cannot be used.
        UnsupportedError: a family, pipeline or stage that cannot be measured.
    """
    import torch

    from vtoken.config import load
    from vtoken.errors import ConfigError
    from vtoken.evals.shared import models
    from vtoken.evals.speed.latency import bench

    # A typing error must not cost the loading of a model.
    for name in ("threads", "batch", "text_tokens", "new_tokens", "repeats", "images", "frames", "up_to"):
        count = getattr(args, name)
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    if args.break_even and (args.images > 1 or not args.pipelines):
        raise ConfigError(
            "--break-even compares pipelines over more and more images: name some, and leave --images out"
        )
    pipelines = [load(each) for each in args.pipelines]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = models.load(
        args.model, device=args.device, dtype=args.dtype, random_weights=args.random_weights, seed=args.seed
    )
    if args.break_even:
        return _break_even(args, model, pipelines)
    measured = bench(
        model,
        pipelines,
        batch=args.batch,
        images=args.images,
        image_size=args.image_size,
        frames=args.frames,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        warmup=args.warmup,
        seed=args.seed,
    )
    weights = "random" if args.random_weights else "as loaded"
    if args.json:
        print(json.dumps({"model": args.model, "weights": weights, **measured.to_dict()}))
        return 0
    from rich.console import Console
    from rich.table import Table

    columns, *lines = cells(measured)
    table = Table(*columns, title=args.model, title_justify="left", show_lines=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    # A file has no width of its own; folded cells would be hard to read there.
    Console(width=None if console.is_terminal else 280).print(table)
    for sentence in (f"weights: {weights}", *notes(measured)):
        print(sentence)
    return 0


def _break_even(args: argparse.Namespace, model: Any, pipelines: list[Pipeline]) -> int:
    from tqdm import tqdm

    from vtoken.evals.speed.break_even import lengths, measure

    tried = lengths(model.config, args.up_to, args.image_size, args.frames)
    options = {
        name: getattr(args, name)
        for name in ("batch", "frames", "text_tokens", "new_tokens", "repeats", "warmup", "seed")
    }
    with tqdm(total=len(tried), desc="lengths", disable=None) as bar:

        def progress(visual_tokens: int) -> None:
            bar.set_postfix_str(f"{visual_tokens} visual tokens")
            bar.update()

        found = measure(model, pipelines, tried, progress=progress, **options)
    weights = "random" if args.random_weights else "as loaded"
    if args.json:
        print(json.dumps({"model": args.model, "weights": weights, **found.to_dict()}))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("visual tokens", *found.steps, title=f"{args.model}: end to end / dense", title_justify="left")
    for row in zip(*found.steps.values(), strict=True):
        table.add_row(str(row[0].visual_tokens), *(_against_dense(step) for step in row))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    for name in found.steps:
        print(_advice(name, found))
    if found.stopped:
        print(found.stopped)
    for sentence in (
        f"weights: {weights}",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in found.conditions.items()),
    ):
        print(sentence)
    return 0


def _against_dense(step: Step) -> str:
    if step.aside is not None:
        return "did nothing"
    return _spread(step.end_to_end, 3).replace("\n", " ") + (" faster" if step.faster else "")


def _advice(name: str, found: Measured) -> str:
    """What the numbers say, and the line of YAML that follows from it."""
    steps, least = found.steps[name], found.least(name)
    if not steps:
        return f"{name}: nothing was measured"
    longest = f"{steps[-1].visual_tokens} visual tokens, the longest measured"
    if all(step.aside is not None for step in steps):
        return f"{name}: did nothing at any length measured, up to {longest}: {steps[-1].aside}"
    if least is None and any(step.faster for step in steps):
        return f"{name}: faster than dense at some lengths, but not at {longest}"
    if least is None:
        return f"{name}: not faster than dense at any length measured, up to {longest}"
    shorter = [step.visual_tokens for step in steps if step.visual_tokens < least]
    below = f"not at {shorter[-1]}" if shorter else "the shortest measured"
    return (
        f"{name}: faster than dense from {least} visual tokens on ({below}); for its file:\nmin_visual_tokens: {least}"
    )


def cells(measured: Bench) -> list[tuple[str, ...]]:
    """Head and rows as text; columns that are empty throughout are left out."""
    rows = [HEAD, *(_line(row) for row in measured.rows)]
    used = [any(row[column] for row in rows[1:]) for column in range(len(HEAD))]
    return [tuple(cell for cell, use in zip(row, used, strict=True) if use) for row in rows]


def markdown(measured: Bench) -> str:
    """The table in Markdown, notes below."""
    head, *rows = ([cell.replace("\n", " ") for cell in row] for row in cells(measured))
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *(f"- {n}" for n in notes(measured))])


def notes(measured: Bench) -> list[str]:
    """Conditions, and what is not in the table and why."""
    found = [f"{name.replace('_', ' ')}: {value}" for name, value in measured.conditions.items()]
    if measured.drift is not None:
        found.append(f"drift: dense end to end, second half of the rounds / first: {measured.drift:.3f}")
    if all(row.peak_bytes is None for row in measured.rows):
        found.append("peak memory: not measured on a CPU, where one process has no figure per pipeline")
    found += [
        f"{row.name}: {name} stood aside, {why}" for row in measured.rows for name, why in row.stood_aside.items()
    ]
    found += [
        f"{row.name}: {name} computed {share:.1%} of its layers' attention at prefill"
        for row in measured.rows
        for name, share in row.density.items()
    ]
    found += [f"{row.name}: no oracle, {row.no_oracle}" for row in measured.rows if row.no_oracle]
    return found


def _line(row: Row) -> tuple[str, ...]:
    times, dense, oracle = row.milliseconds, row.to_dense or {}, row.to_oracle or {}
    return (
        row.name,
        str(row.visual_entry),
        f"{row.visual_average:.1f}".removesuffix(".0"),
        *(_spread(times[part], 2) for part in ("vision", "stages", "ttft", "decode", "end_to_end")),
        "" if row.peak_bytes is None else _bytes(row.peak_bytes),
        _bytes(row.kv_bytes),
        *(_spread(ratio.get(part), 3) for part in ("ttft", "end_to_end") for ratio in (dense, oracle)),
        "" if row.break_even is None else str(row.break_even),
    )


def _spread(value: Spread | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value.median:.{digits}f}\n[{value.low:.{digits}f} - {value.high:.{digits}f}]"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
