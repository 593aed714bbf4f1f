"""What vtoken saves and costs on a GPU: `python benchmarks/gpu.py`. Markdown to stdout.

LLaVA-1.5 at 7B size with random bf16 weights (nothing is downloaded, 14 GB on the card), batches of 1 and 8. Kernels have a
script of their own, benchmarks/kernels.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.

MODEL = "llava-hf/llava-1.5-7b-hf"
PIPELINES = ("none", "fastervlm:192", "fastervlm:128", "fastervlm:64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="generated (default: %(default)s)")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="config to build (default: %(default)s)")
    args = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; torch.cuda.is_available() is false")
    from vtoken.commands.bench import markdown
    from vtoken.evals import models
    from vtoken.evals.latency import bench

    model = models.load(args.model, device="cuda", dtype="bfloat16", random_weights=True)
    for batch in (1, 8):
        print(f"\n## {args.model}, random weights, batch {batch}\n")
        found = bench(
            model, PIPELINES, batch=batch, new_tokens=args.new_tokens, repeats=args.repeats, text_tokens=64, warmup=3
        )
        print(markdown(found), flush=True)


if __name__ == "__main__":
    main()
