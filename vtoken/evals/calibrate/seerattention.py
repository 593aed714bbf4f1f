"""`vtoken calibrate seerattention`: train the gates of the stage seerattention for a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vtoken.compressors.attention._seer import SIZES, save
from vtoken.errors import ConfigError
from vtoken.evals.calibrate._report import add_json, check_out, tell
from vtoken.evals.shared.options import number
from vtoken.evals.shared.samples import ABOUT, load, read

SUMMARY = "train SeerAttention's gates on the model's own attention"
EXAMPLES = """\
examples:
  vtoken calibrate seerattention Qwen/Qwen2.5-VL-7B-Instruct --data long.jsonl --dtype bfloat16 -o gates.safetensors
      the authors' settings; then: vtoken bench Qwen/Qwen2.5-VL-7B-Instruct seerattention:gates=gates.safetensors
  vtoken calibrate seerattention tiny-llava --data reference --limit 120 --size 16 --steps 200 -o tiny.safetensors
      the shipped model, whose prompts are some 40 blocks of 16
  vtoken calibrate seerattention tiny-llava --data reference --limit 30 --size 16 --steps 20 -o tiny.safetensors --json

Gates learn on prompts like those that they will be used on: with pictures as large, and as long. The authors train text models on 8,000
documents of 64k tokens. Every prompt runs once; what is kept of it takes, per layer, 8 H T^2 + 4 (H + 3 Hk) T d bytes for T blocks, H and Hk heads
of width d: 62 MB for 28 layers of a Qwen2.5-VL-7B and 4,096 tokens in blocks of 64. One picture in five is kept back to measure on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains one matrix per decoder layer and query head that tells from pooled queries and keys which blocks of keys get\n"
        "attention. The model is frozen: a gate learns the largest attention between every two blocks (KL divergence)."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="shipped model, folder or hub id")
    parser.add_argument("--data", required=True, metavar="DATA", help=ABOUT)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions (default: all)")
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        choices=SIZES,
        help="tokens of a block (default: %(default)s, the authors')",
    )
    parser.add_argument(
        "--steps", type=int, default=500, metavar="N", help="batches to learn from (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="prompts per step (default: %(default)s)")
    parser.add_argument("--rate", type=number, default=1e-3, metavar="R", help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=number, metavar="X", help="to measure density and recall at (default: the stage's)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: that of the weights)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, writes the file and says how the gates do on pictures that were kept back.

    Raises:
        VtokenError: model, data or a setting that cannot be used.
    """
    from rich.console import Console
    from rich.progress import Progress

    from vtoken.compressors.attention.seerattention import SeerAttention
    from vtoken.evals.calibrate import _train_block_gates as seer
    from vtoken.evals.calibrate import _train_exit_gates as exits

    for name in ("steps", "batch", "rate"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name} must be above 0, not {getattr(args, name)}")
    check_out(args.out)
    given = read(args.data, args.limit)
    back = exits.kept_back(given).tolist()
    if not any(back):
        raise ConfigError(f"{args.data}: gates need questions about at least 5 pictures, one of which is kept back")
    settings = seer.Settings(args.steps, args.batch, args.rate, args.seed)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=len(given))
        model, processor = load(args.model, args.device, args.dtype)
        bar.update(task, description="prompts")
        seen = seer.watch(model, processor, given, args.size, lambda done: bar.update(task, completed=done))
        known, kept = ([s for s, b in zip(seen, back, strict=True) if b == which] for which in (False, True))
        task = bar.add_task("gates", total=settings.steps * len(known[0]))
        gates = seer.train(known, settings, model.device, lambda done: bar.update(task, completed=done))
    defaults: Any = {name: field.default for name, field in SeerAttention.model_fields.items()}
    threshold = defaults["threshold"] if args.threshold is None else args.threshold
    found = seer.judge(gates, kept, args.seed, args.size, threshold, defaults["last"])
    numbers = {"prompts": len(known), "kept_back": len(kept), "size": args.size, **vars(settings)}
    about = {"model": args.model, "data": args.data, **{key: str(value) for key, value in numbers.items()}}
    save(args.out, [gate.to(model.dtype) for gate in gates], len(seen[0][0].keys), args.size, about)
    _tell(args, {**numbers, "blocks": max(len(layers[0].starts.cos) for layers in seen), "threshold": threshold}, found)
    return 0


def _tell(args: argparse.Namespace, numbers: dict[str, Any], found: dict[str, list[float]]) -> None:
    rows: list[tuple[str, ...]] = [
        ("layer", "KL untrained, nats", "KL, nats", "blocks read", "attention there", "at best")
    ]
    for layer, (before, after, *shares) in enumerate(zip(*found.values(), strict=True)):
        rows.append((str(layer), f"{before:.3f}", f"{after:.3f}", *(f"{share:.1%}" for share in shares)))
    density, recall = (sum(found[key]) / len(found[key]) for key in ("density", "recall"))
    about = (
        f"wrote {args.out}: {recall:.1%} of the attention in {density:.1%} of the blocks at threshold {numbers['threshold']:g}, on "
        f"{numbers['kept_back']} prompts kept back"
    )
    told = {"file": str(args.out), "data": args.data, **numbers, **found}
    tell(args, told, rows, about, f"seerattention:gates={args.out}")
