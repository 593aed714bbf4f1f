"""`vtoken train-exit`: train the gates of the stage dyvte for a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError
from vtoken.evals.shared.options import number

EPILOG = """\
examples:
  vtoken train-exit llava-hf/llava-1.5-7b-hf --data mine.jsonl --dtype bfloat16 -o gates.safetensors
      the authors' settings; then: vtoken bench llava-hf/llava-1.5-7b-hf dyvte:gates=gates.safetensors
  vtoken train-exit tiny-llava --data reference --hidden 64 --epochs 40 --batch 32 --rate 1e-3 -o tiny.safetensors
      the shipped model, on the shipped questions; the gates that are shipped were trained on other pictures
  vtoken train-exit tiny-llava --data reference --limit 60 -o tiny.safetensors --json
      what was found, as one JSON object

Data: 1% of LLaVA-1.5's instruction data (some 6,650 questions with answers, each about one picture) in the paper. Without an
answer the model's own is taken. One picture in five is kept back to measure the gates on.

Cost for LLaVA-1.5-7B, counted, not measured: a question with 576 visual and 100 text tokens takes 30.4 TFLOPs (tower 0.4, dense 9.0,
text alone from every layer on 20.2, output embeddings 0.8), 6,650 of them 202 PFLOPs: 34 minutes at 100 TFLOP/s. Questions run one at
a time, in 496 short layer calls each; a GPU may spend more time on starting those than on computing them. What gates see of them takes
6.8 GB of memory. A gate has 16.8 million weights: one pass over the data takes 0.02 PFLOPs for all 31, the file 1.0 GB in bfloat16.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains one gate per decoder layer that tells from the question's hidden states whether all visual tokens may leave.\n"
        "The model is frozen. An exit may happen where more than 99% of the answer's tokens keep their prediction and the\n"
        "answer's loss stays below 1.03 times the full model's; every layer of every question gives one such label."
    )
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="shipped model, folder or hub id")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="`reference`, a folder with questions.jsonl, or a .jsonl file: image, question, answer",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions (default: all)")
    parser.add_argument("--hidden", type=int, default=2048, metavar="N", help="width of a gate (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=1, metavar="N", help="passes over the data (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="questions per step (default: %(default)s)")
    parser.add_argument("--rate", type=number, default=6e-5, metavar="R", help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: that of the weights)")
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains, writes the file and says how the gates do on pictures that were kept back.

    Raises:
        VtokenError: model, data or a setting that cannot be used.
    """
    from rich.console import Console
    from rich.progress import Progress

    from vtoken.compressors.decoder._gates import save
    from vtoken.evals.calibrate import _train_exit_gates as exits
    from vtoken.evals.shared import samples

    for name in ("hidden", "epochs", "batch", "rate"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name} must be above 0, not {getattr(args, name)}")
    if not args.out.parent.is_dir():
        raise ConfigError(f"no folder {str(args.out.parent)!r} to write {args.out.name} into")
    given = samples.read(args.data, args.limit)
    back = exits.kept_back(given)
    if not back.any():
        raise ConfigError(f"{args.data}: gates need questions about at least 5 pictures, one of which is kept back")
    settings = exits.Settings(args.hidden, args.epochs, args.batch, args.rate, args.seed)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=len(given))
        model, processor = samples.load(args.model, args.device, args.dtype)
        bar.update(task, description="questions")
        seen = exits.table(model, processor, given, lambda done: bar.update(task, completed=done))
        known, kept = seen.rows(~back), seen.rows(back)
        task = bar.add_task("gates", total=len(exits.layers_of(seen)))
        gates = exits.train(known, settings, lambda done: bar.update(task, completed=done))
    found = exits.judge(gates, kept)
    numbers = {"questions": len(known.leave), "kept_back": len(kept.leave), **vars(settings)}
    about = {"model": args.model, "data": args.data, **{key: str(value) for key, value in numbers.items()}}
    save(args.out, {k: _cast(pair, model) for k, pair in gates.items()}, found["stay"], about)
    if args.json:
        print(json.dumps({"file": str(args.out), "model": args.model, "data": args.data, **numbers, **found}))
        return 0
    print("layer  may leave  gate right  harmful exits  images still there")
    for k in exits.layers_of(seen):
        row = [found[key][k - 1] for key in ("may_leave", "accuracy", "harmful")]
        print(f"{k:>5}  {row[0]:>9.1%}  {row[1]:>10.1%}  {row[2]:>13.1%}  {found['stay'][k]:>18.1%}")
    share = sum(found["stay"]) / len(found["stay"])
    print(
        f"wrote {args.out}: {share:.1%} of visual tokens on average over layers, on {len(kept.leave)} questions kept back"
    )
    return 0


def _cast(pair: tuple[Any, Any], model: Any) -> tuple[Any, Any]:
    return pair[0].to(model.dtype), pair[1].to(model.dtype)
