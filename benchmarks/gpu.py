"""What vtoken saves and costs on a GPU: `python benchmarks/gpu.py`. Markdown to stdout.

LLaVA-1.5 at 7B size with random bf16 weights (nothing is downloaded, 14 GB on the card), batches of 1 and 8, and the
kernels at the sizes that occur there: time on the device from triton's do_bench (L2 flushed), bytes as each kernel's file
counts them, held against the definition in torch. No figure of an op is printed before the two agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.

MODEL = "llava-hf/llava-1.5-7b-hf"
PIPELINES = ("none", "fastervlm:192", "fastervlm:128", "fastervlm:64")
TOKENS, WIDTH, HEADS, HEAD, KEPT = 576, 4096, 16, 64, 64


def cases(images: int) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """(op, shapes, arguments on the device, bytes it has to move) for so many LLaVA-1.5 images."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    def bounds(step: int) -> torch.Tensor:
        return torch.arange(images + 1, device="cuda", dtype=torch.int32) * step

    every = TOKENS // KEPT
    index = torch.arange(0, images * TOKENS, every, device="cuda")
    moved = len(index) * (2 * WIDTH * 2 + 8)
    yield (
        "gather_tokens",
        f"{images * TOKENS} x {WIDTH} bf16, keep 1 of {every}",
        {
            "tensors": draw(images * TOKENS, WIDTH),
            "index": index,
        },
        moved,
    )
    yield (
        "topk_tokens",
        f"{images} x {TOKENS} fp32, keep {KEPT}",
        {
            "scores": draw(images * TOKENS, dtype=torch.float32),
            "offsets": bounds(TOKENS),
            "counts": [KEPT] * images,
        },
        images * (4 * TOKENS + 8 * KEPT + 24),
    )
    # One CLS query per image: K is read twice, the sums per head are written and read once.
    keys = images * (TOKENS + 1)
    yield (
        "query_attention",
        f"CLS of {images} x {TOKENS + 1} x {HEADS} x {HEAD} bf16",
        {
            "q": draw(images, HEADS, HEAD),
            "k": draw(keys, HEADS, HEAD),
            "q_offsets": bounds(1),
            "k_offsets": bounds(TOKENS + 1),
            "scale": HEAD**-0.5,
        },
        keys * HEADS * (2 * HEAD * 2 + 2 * 4) + 4 * keys,
    )


def kernels() -> None:
    """One line per op and size."""
    import torch
    from triton.testing import do_bench

    from vtoken.kernels import ops

    print("| op | shapes | MB | kernel us | GB/s | definition us | speed-up |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for images in (1, 8, 64):
        for name, shapes, given, moved in cases(images):
            op = ops()[name]
            result = op.launch(**given)
            relative, absolute = op.tolerance(result.dtype)
            torch.testing.assert_close(result, op.definition(**given), rtol=relative, atol=absolute)
            ours, plain = (
                do_bench(lambda run=run, given=given: run(**given), return_mode="median")
                for run in (op.launch, op.definition)
            )
            print(
                f"| {name} | {shapes} | {moved / 1e6:.3f} | {1e3 * ours:.1f} | {moved / ours / 1e6:.0f} | "
                f"{1e3 * plain:.1f} | {plain / ours:.2f} |",
                flush=True,
            )


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

    print("## Kernels\n")
    kernels()
    model = models.load(args.model, device="cuda", dtype="bfloat16", random_weights=True)
    for batch in (1, 8):
        print(f"\n## {args.model}, random weights, batch {batch}\n")
        found = bench(
            model, PIPELINES, batch=batch, new_tokens=args.new_tokens, repeats=args.repeats, text_tokens=64, warmup=3
        )
        print(markdown(found), flush=True)


if __name__ == "__main__":
    main()
