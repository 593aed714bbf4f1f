"""`vtoken calibrate fitprune`: the table of FitPrune for a model and a budget."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from vtoken.errors import ConfigError
from vtoken.evals.calibrate._report import add_json, add_out, check_out, tell_pipeline
from vtoken.evals.shared.options import number
from vtoken.evals.shared.samples import ABOUT

SUMMARY = "table of visual tokens that leave behind each decoder layer"
EPILOG = """\
examples:
  vtoken calibrate fitprune tiny-llava --reduction 60 -o table.yaml     # shipped questions
  vtoken calibrate fitprune llava-hf/llava-1.5-7b-hf --reduction 60 --data questions.jsonl --limit 128
  vtoken bench tiny-llava table.yaml

Runs every prompt once dense and some seven times pruned, one at a time. The pictures must have equally many visual tokens.
Lines of --data: {"image": "cat.jpg", "question": "What is it?"}. The table depends on the model, the size and the questions.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the method's options."""
    parser.description = "Finds how little attention has to be lost to spare a share of the visual tokens' FLOPs in the decoder; writes a pipeline."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="shipped model (tiny-llava), local folder or hub name")
    parser.add_argument(
        "--reduction", type=number, required=True, metavar="PERCENT", help="FLOPs of visual tokens to spare, in percent"
    )
    parser.add_argument("--data", metavar="DATA", help=f"{ABOUT} (default: the last of the shipped)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="so many questions (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's)")
    add_out(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fits the table and writes the pipeline.

    Raises:
        ConfigError: no such model, questions that do not read, or a reduction that cannot be reached.
    """
    if not 0 < args.reduction < 100:
        raise ConfigError(f"--reduction is in percent, above 0 and below 100, not {args.reduction:g}")
    if args.limit < 1:
        raise ConfigError(f"--limit must be at least 1 question, not {args.limit}")
    check_out(args.out)
    from vtoken.evals.calibrate._fitprune import fit
    from vtoken.evals.shared import samples

    # The first shipped questions stay fresh for a test.
    asked = samples.read(args.data, args.limit) if args.data else samples.read("reference")[-args.limit :]
    model, processor = samples.load(args.model, device=args.device, dtype=args.dtype)
    found = fit(
        model,
        (samples.prepare(model, processor, sample) for sample in asked),
        args.reduction / 100,
        lambda: print(f"a pass over {len(asked)} prompts", file=sys.stderr),
    )
    told = {"questions": len(asked), "reduction": args.reduction / 100, **asdict(found)}
    rows = [("behind layer", "tokens that leave", "left")]
    rows += [(str(k), str(n), str(found.tokens - sum(found.table[: k + 1]))) for k, n in enumerate(found.table)]
    about = (
        f"FitPrune (https://arxiv.org/abs/2409.10197) for {args.model}: spares {found.spared:.1%} of the FLOPs that {found.tokens} visual "
        f"tokens cost in the decoder; fitted to {len(asked)} prompts, at each layer at most {found.alpha:.1%} of the attention is lost."
    )
    tell_pipeline(args, told, rows, about, {"fitprune": {"table": list(found.table), "tokens": found.tokens}})
    return 0
