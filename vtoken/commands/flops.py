"""`vtoken flops`: what pipelines save on a model, from its config alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from vtoken.evals.shared.options import Workload

if TYPE_CHECKING:
    from vtoken.evals.cost.flops import Account

EPILOG = """\
examples:
  vtoken flops llava-hf/llava-1.5-7b-hf fastervlm:64
      one stage beside the dense model; nothing is downloaded, common configs are built in
  vtoken flops llava-hf/llava-1.5-13b-hf fastervlm:64 my_pipeline.yaml --text-tokens 200 --new-tokens 1
      two pipelines, a longer prompt, prefill only
  vtoken flops llava-hf/llava-v1.6-vicuna-7b-hf fastervlm:25% --image-size 672x1008
      crops and newlines of an anyres image
  vtoken flops Qwen/Qwen2.5-VL-7B-Instruct fastervlm:128 --image-size 448 --frames 16
      a video
  vtoken flops tiny-llava --json
      the dense model alone, as one JSON object
  vtoken flops ./my-llava my_pipeline.yaml --images 4
      a local folder with a config.json, four images per prompt

A multiply-add is 2 FLOPs. Percentages are shares of the dense model. KV bytes use the config's dtype, 2 bytes a number
where it names none. Qwen rounds sizes as transformers' Qwen2VLImageProcessor does by default (56x56 to about a million pixels),
frames too; checkpoints may set other limits. How many newline tokens stay where tokens were dropped is an expectation: tokens
drawn at random.
"""

ROWS = {
    "vision tower": "tower",
    "projector": "projector",
    "stage overhead": "stages",
    "prefill linear": "prefill_linear",
    "prefill attention": "prefill_attention",
    "decode": "decode",
    "total": "total",
    "KV cache after prefill": "kv_bytes_prefill",
    "KV cache at the end": "kv_bytes",
    "visual tokens at entry": "visual_entry",
    "visual tokens per layer": "visual_average",
    "newline tokens at entry": "newline_entry",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "FLOPs per part and KV-cache bytes of pipelines on a model, from its config alone: no weights are loaded."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="built-in or hub name, shipped model (tiny-llava) or local folder"
    )
    parser.add_argument("pipelines", metavar="PIPELINE", nargs="*", help="preset, method:budget or YAML file")
    Workload.add_to(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Prints the accounts side by side."""
    from vtoken.config import load
    from vtoken.evals.cost.flops import account
    from vtoken.evals.shared.configs import resolve_config

    config, work = resolve_config(args.model), Workload.of(args)
    accounts = [account(config, pipeline, **vars(work)) for pipeline in (None, *map(load, args.pipelines))]
    if args.json:
        print(json.dumps({"model": args.model, "accounts": [each.to_dict() for each in accounts]}))
        return 0
    from rich.console import Console

    Console().print(table(args.model, accounts))
    pictures = f"{work.images} image(s)" if work.frames == 1 else f"{work.images} video(s) of {work.frames} frames"
    print(
        f"{pictures} and {work.text_tokens} text tokens in, {work.new_tokens} tokens out, batch 1; "
        f"KV cache at {accounts[0].dtype_bytes} bytes a number. Percentages: share of dense."
    )
    if inexact := dict.fromkeys(name for each in accounts for name in each.inexact):
        print(f"How many tokens {', '.join(inexact)} leaves depends on the picture: figures are expected ones.")
    print("Not counted:")
    for sentence in dict.fromkeys(sentence for each in accounts for sentence in each.left_out):
        print(f"  - {sentence}")
    return 0


def table(model: str, accounts: list[Account]) -> Any:
    """One column per account, the first of which is dense; one row per part."""
    from rich.table import Table

    # Two stages of one name may differ in their options only: the number tells their columns apart.
    names = [each.pipeline for each in accounts]
    out = Table("FLOPs", title=model, title_justify="left")
    for number, name in enumerate(names):
        out.add_column(f"{name} ({number})" if names.count(name) > 1 else name, justify="right")
    for label, field in ROWS.items():
        values = [getattr(each, field) for each in accounts]
        if field == "newline_entry" and not any(values):
            continue
        cells = [_cell(field, value, values[0]) for value in values]
        out.add_row(label, *cells, end_section=field in ("decode", "total", "kv_bytes"))
    return out


def _cell(field: str, value: float, dense: float) -> str:
    from vtoken.evals.shared.tables import scaled

    if field.startswith(("visual", "newline")):
        text = f"{value:g}" if value == int(value) else f"{value:.1f}"
    else:
        text = scaled(value, "B" if field.startswith("kv") else "", "#.4g") if value else "0"
    return f"{text} {100 * value / dense:5.1f}%" if dense else text
