"""Models end to end: `python benchmarks/end_to_end.py CASE [--json FILE]`. A table to stdout.

Dense, pipelines and oracles interleaved (vtoken/evals/speed/latency.py says how), bf16, random weights of 7B models
made on the GPU, nothing downloaded. Without a GPU, or with --small, the shipped models take their place on the CPU.

`density` is the share of the causal blocks that a sparse stage computed. Random weights attend everywhere, and a stage
that goes by attention (flexprefill) then computes nearly all: its ratio is that of this density and says nothing about
a trained model, nor whether the method pays. A fixed pattern (static_sparse) comes to the same density with any
weights.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import CUDA, Record

from vtoken.config import load
from vtoken.evals.shared import models
from vtoken.evals.speed.latency import Bench, bench
from vtoken.evals.speed.latency import Row as Measured

OVERHEAD = 1.02  # of the oracle's time to the first token
# The preset fastervlm-next-160, on pictures that the model cuts into 2 x 2 crops by itself.
NEXT_160 = {"positions": "compact", "newline": "drop", "stages": [{"fastervlm": {"keep": {"per_crop": 32}}}]}
NEXT = "llava-hf/llava-v1.6-vicuna-7b-hf"
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


@dataclass(frozen=True)
class Case:
    """A model, its pictures and what runs on them.

    Attributes:
        small: the shipped model that takes its place without a GPU.
        frames: 896 x 896 pixels of Qwen give 1024 visual tokens per two of them. Eight prompts of 64k would be 512k
            tokens: left out.
        repeats: rounds that count; half as many for several prompts, and one before them where there are three at
            least.
    """

    model: str
    small: str
    pipelines: tuple[Any, ...]
    batches: tuple[int, ...] = (1, 8)
    image_size: int | None = None
    frames: int = 1
    repeats: int = 11
    new_tokens: int = 16


SPARSE = ("flexprefill-95", "static_sparse-4096")
CASES = {
    "llava": Case(
        "llava-hf/llava-1.5-7b-hf", "tiny-llava",
        ("none", "fastervlm:192", "fastervlm:64", "visionzip:64", "divprune:64", "fastv:64"),
    ),
    "next": Case(
        NEXT, "tiny-llava-next",
        (replace(load(NEXT_160), name="fastervlm-next-160"), "fastervlm:160", "fastervlm:320"),
        image_size=672, repeats=7,
    ),
    "qwen-4k": Case(QWEN, "tiny-qwen2.5-vl", ("fastervlm:10%", "divprune:10%"), (1, 8), 896, 8, 5),
    "qwen-16k": Case(QWEN, "tiny-qwen2.5-vl", ("fastervlm:10%", *SPARSE), (1,), 896, 32, 3, 4),
    "qwen-16k-8": Case(QWEN, "tiny-qwen2.5-vl", ("fastervlm:10%", "static_sparse-4096"), (8,), 896, 32, 2, 4),
    "qwen-64k": Case(QWEN, "tiny-qwen2.5-vl", ("fastervlm:10%", *SPARSE), (1,), 896, 128, 2, 4),
    "qwen-128k": Case(QWEN, "tiny-qwen2.5-vl", ("fastervlm:10%", *SPARSE), (1,), 896, 256, 2, 4),
}  # fmt: skip


def always(pipeline: Any) -> Any:
    """The pipeline with stages that do not stand aside on a short prompt."""
    whole = load(pipeline)
    stages = (s.model_copy(update={"min_len": 0}) if s.site == "attention" else s for s in whole.stages)
    return replace(whole, stages=tuple(stages))


def rows(record: Record, found: Bench, name: str, batch: int, small: bool) -> None:
    """What a reader asks first; all of it is in the JSON of `vtoken bench`."""

    def median(parts: Any, part: str) -> float | None:
        spread = (parts or {}).get(part)
        return None if spread is None else spread.median

    def one(row: Measured) -> None:
        overhead = (row.to_oracle or {}).get("ttft")
        record.add(
            case=name, batch=batch, pipeline=row.name, density=next(iter(row.density.values()), None),
            stood_aside=", ".join(row.stood_aside) or None, visual_tokens=row.visual_tokens,
            ttft_ms=median(row.milliseconds, "ttft"), vision_ms=median(row.milliseconds, "vision"),
            stages_ms=median(row.milliseconds, "stages"), decode_ms=median(row.milliseconds, "decode"),
            ttft_of_dense=median(row.to_dense, "ttft"), ttft_of_oracle=median(row.to_oracle, "ttft"),
            oracle_quartiles=None if overhead is None else f"{overhead.low:.3f} - {overhead.high:.3f}",
            end_of_dense=median(row.to_dense, "end_to_end"), break_even=row.break_even,
            peak_gb=None if row.peak_bytes is None else row.peak_bytes / 1e9, kv_gb=row.kv_bytes / 1e9,
        )  # fmt: skip
        if overhead is not None:
            goal = f"{name}, batch {batch}, {row.name}: time to the first token"
            record.goal(goal, f"<= {OVERHEAD} x oracle", overhead.median, overhead.median <= OVERHEAD)

    for row in found.rows:
        one(row)
    if not small and any(row.density for row in found.rows):
        record.conditions["density"] = (
            "with random weights; of a trained model that of flexprefill is another, and so is its ratio"
        )
    record.conditions[f"batch {batch}"] = f"{found.conditions['prompt']}, drift {found.drift}"
    record.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--small", action="store_true", help="the shipped model of the family, one round, whatever there is"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions, rows and goals here, as they come")
    args = parser.parse_args()
    case, small = CASES[args.case], args.small or not CUDA
    record = Record(args.json, case=args.case, model=case.small if small else f"{case.model}, random weights")
    if small:
        model: Any = models.load(case.small, device="cpu", dtype="float32")
    else:
        model = models.load(case.model, device="cuda", dtype="bfloat16", random_weights=True)
    for batch in (1,) if small else case.batches:
        repeats = 1 if small else case.repeats if batch == 1 else max(1, case.repeats // 2)
        # What comes one batch after another stays when the next one does not fit.
        try:
            found = bench(
                model, [always(p) for p in case.pipelines] if small else case.pipelines,
                batch=batch, text_tokens=64, warmup=int(repeats > 2),
                new_tokens=2 if small else case.new_tokens, repeats=repeats,
                image_size=None if small else case.image_size, frames=1 if small else case.frames,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            record.add(case=args.case, batch=batch, failed=str(error).splitlines()[0][:160])
            torch.cuda.empty_cache()
            continue
        rows(record, found, args.case, batch, small)
    record.show()


if __name__ == "__main__":
    main()
