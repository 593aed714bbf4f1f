"""What vtoken costs on this machine's CPU: `python benchmarks/cpu.py`. Markdown to stdout, a few minutes.

The shipped tiny-llava, where everything is small and overhead shows most, and a LLaVA of the 0.5B class with random
weights (CLIP ViT-B/16 at 336 px, 441 visual tokens; a decoder shaped like Qwen2-0.5B).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.

HALF_BILLION = {
    "model_type": "llava",
    "image_token_index": 151646,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 336,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tie_word_embeddings": True,
}


def half_billion() -> Any:
    """The random-weight model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**HALF_BILLION)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).train(False)


def import_seconds(statement: str, times: int = 7) -> float:
    """Median wall time of a fresh Python that runs the statement, less that of one that runs nothing."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        return time.perf_counter() - start

    return statistics.median(run(statement) - run("pass") for _ in range(times))


def wrap_seconds(model: Any, pipeline: str, times: int = 21) -> tuple[float, float]:
    """Median seconds of `wrap` and of `unwrap`."""
    import vtoken

    marks = []
    for _ in range(times):
        start = time.perf_counter()
        vtoken.wrap(model, pipeline)
        middle = time.perf_counter()
        vtoken.unwrap(model)
        marks.append((middle - start, time.perf_counter() - middle))
    on, off = zip(*marks, strict=True)
    return statistics.median(on), statistics.median(off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's choice)")
    parser.add_argument(
        "--repeats", type=int, default=21, metavar="N", help="rounds of tiny-llava (default: %(default)s)"
    )
    parser.add_argument(
        "--big-repeats", type=int, default=5, metavar="N", help="of the 0.5B (default: %(default)s, 0 skips it)"
    )
    parser.add_argument("--model", default="tiny-llava", metavar="NAME", help="instead of tiny-llava")
    args = parser.parse_args()

    import torch

    from vtoken.commands.bench import markdown
    from vtoken.evals.shared import models
    from vtoken.evals.speed.latency import bench

    if args.threads:
        torch.set_num_threads(args.threads)
    model = models.load(args.model, device="cpu", dtype="float32")
    print(f"## {args.model}\n")
    print(markdown(bench(model, ["none", "fastervlm:128", "fastervlm:64", "uniform:64"], repeats=args.repeats)))
    print("\n## Fixed costs\n\n| what | ms |\n| --- | ---: |")
    for statement in ("import vtoken", "import torch", "import torch; from vtoken import wrap"):
        print(f"| `{statement}` | {1e3 * import_seconds(statement):.1f} |")
    on, off = wrap_seconds(model, "fastervlm:64")
    print(f"| `wrap(model, 'fastervlm:64')` | {1e3 * on:.2f} |\n| `unwrap(model)` | {1e3 * off:.2f} |")
    if args.big_repeats:
        print("\n## LLaVA of the 0.5B class, random weights\n", flush=True)
        print(markdown(bench(half_billion(), ["fastervlm:64"], new_tokens=8, repeats=args.big_repeats, warmup=1)))


if __name__ == "__main__":
    main()
