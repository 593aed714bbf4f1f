"""`vtoken flops`: what pipelines save on a model, from its config alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vtoken.evals.shared.options import Workload, argument, as_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vtoken.evals.cost.flops import Account

DESCRIPTION = "FLOPs per part and KV-cache bytes of pipelines on a model, from its config alone: no weights are loaded."
EXAMPLES = """\
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
where it names none. "KV read per token" is what a decode step reads of one row's cache, the mean over the answer; every
step reads the weights besides. Qwen rounds sizes as transformers' Qwen2VLImageProcessor does by default (56x56 to about
a million pixels), frames too; checkpoints may set other limits. How many newline tokens stay where tokens were dropped
is an expectation: tokens drawn at random.
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
    "KV read per token": "kv_bytes_read",
    "visual tokens at entry": "visual_entry",
    "visual tokens per layer": "visual_average",
    "newline tokens at entry": "newline_entry",
}


class Settings(Workload):
    """What is counted, on which shapes."""

    model: str = argument("MODEL", "built-in or hub name, shipped model (tiny-llava) or local folder")
    pipelines: tuple[str, ...] = argument("PIPELINE", "preset, method:budget or YAML file", ())
    in_json: bool = as_json()


def run(asked: Settings) -> None:
    """Prints the accounts side by side."""
    from vtoken.config import load
    from vtoken.evals.cost.flops import account
    from vtoken.evals.cost.support_matrix import attempt, without_weights
    from vtoken.evals.shared.configs import resolve_config

    pipelines, model = [load(each) for each in asked.pipelines], None
    config, work = resolve_config(asked.model), asked.model_dump(include={*Workload.model_fields})
    for pipeline in pipelines:
        # Costs of what cannot run would be a lie.
        model = without_weights(config) if model is None else model
        attempt(model, pipeline)
    accounts = [account(config, pipeline, **work) for pipeline in (None, *pipelines)]
    if asked.in_json:
        print(json.dumps({"model": asked.model, "accounts": [each.to_dict() for each in accounts]}))
        return
    from rich.console import Console

    console = Console()
    for part in tables(asked.model, accounts, console):
        console.print(part)
    pictures = f"{asked.images} image(s)" if asked.frames == 1 else f"{asked.images} video(s) of {asked.frames} frames"
    print(
        f"{pictures} and {asked.text_tokens} text tokens in, {asked.new_tokens} tokens out, batch 1; "
        f"KV cache at {accounts[0].dtype_bytes} bytes a number. Percentages: share of dense."
    )
    if inexact := dict.fromkeys(name for each in accounts for name in each.inexact):
        print(f"How many tokens {', '.join(inexact)} leaves depends on the picture: figures are expected ones.")
    print("Not counted:")
    for sentence in dict.fromkeys(sentence for each in accounts for sentence in each.left_out):
        print(f"  - {sentence}")


def tables(model: str, accounts: list[Account], console: Console) -> Iterator[Table]:
    """As few tables as show every account without a broken word; the first account, dense, is in all of them."""
    # Two stages of one name may differ in their options only: the number tells their columns apart.
    names = [each.pipeline for each in accounts]
    headers = [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names)]
    wide = console.options.update(max_width=10**6)
    found = _table(model, accounts, headers, range(len(accounts)))
    if console.measure(found, options=wide).maximum <= console.width:
        yield found
        return
    rest = list(range(1, len(accounts)))
    while True:
        count = len(rest)
        found = _table(model, accounts, headers, [0, *rest], narrow=True)
        while count > 1 and console.measure(found, options=wide).maximum > console.width:
            count -= 1
            found = _table(model, accounts, headers, [0, *rest[:count]], narrow=True)
        yield found
        rest = rest[count:]
        if not rest:
            return


def _table(
    model: str, accounts: list[Account], headers: list[str], columns: Sequence[int], narrow: bool = False
) -> Table:
    """One column per account, one row per part. A narrow one puts shares below figures."""
    from rich.table import Table

    longest = max(len(word) for label in ROWS for word in label.split())
    out = Table(title=model, title_justify="left")
    out.add_column("FLOPs", width=longest if narrow else None)
    for column in columns:
        width = max(len(headers[column]), len("335.5 MB"))
        out.add_column(headers[column], justify="right", width=width if narrow else None)
    for label, field in ROWS.items():
        values = [getattr(accounts[column], field) for column in columns]
        if field in ("newline_entry", "kv_bytes_read") and not any(values):
            continue
        cells = [_cell(field, value, values[0], "\n" if narrow else " ") for value in values]
        out.add_row(label, *cells, end_section=field in ("decode", "total", "kv_bytes_read"))
    return out


def _cell(field: str, value: float, dense: float, between: str) -> str:
    from vtoken.evals.shared.tables import scaled

    if field.startswith(("visual", "newline")):
        text = f"{value:g}" if value == int(value) else f"{value:.1f}"
    else:
        text = scaled(value, "B" if field.startswith("kv") else "", "#.4g") if value else "0"
    return f"{text}{between}{100 * value / dense:5.1f}%" if dense else text
