"""What the kernels reach: `python benchmarks/ops.py [--ops OP ...] [--json FILE]`. A table to stdout.

On a CUDA device: time on the device from triton's do_bench (L2 flushed, median), bytes and FLOPs as each op's file
counts them, as shares of a copy and a matmul measured in the same run, and of a copy of as many bytes, and against the
definition eager and under torch.compile, and for attention ops against flash SDPA, which computes more (the values too)
and gives no sums, and against the map of all attention; the most memory that kernel and definition take. torch.compile
takes minutes and comes last. Without a GPU the script runs to its end on small inputs, by the host's clock: with
TRITON_INTERPRET=1 kernels are interpreted, else only definitions run. Such times say nothing about a GPU. No figure is
given before kernel and definition agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from agreement import GREEDY, agree
from measure import (
    CUDA,
    DEVICE,
    DTYPE,
    KERNELS,
    Record,
    Row,
    draw,
    flash,
    milliseconds,
    offsets,
    peak_bytes,
    ratio,
    said,
)

from vtoken import kernels
from vtoken.kernels import _gram

MAPPED = ("query_attention", "received_attention")  # what a tower switched to eager attention would take instead
GATHER, RECEIVED, LINEAR, FARTHEST = 0.85, 5.0, 2.2, 20.0  # the goals


@dataclass(frozen=True)
class Case:
    """bytes: what has to be moved at least, as the op's file counts it; flops: of the kernel, not of the definition."""

    op: str
    shapes: str
    given: dict[str, Any]
    bytes: float
    flops: float = 0.0


def cases(small: bool) -> Iterator[Case]:
    """LLaVA-1.5 (576 tokens), LLaVA-NeXT (2880 -> 320), a 4k encoder and a 32k prompt; `small` is for the
    interpreter."""
    e = DTYPE.itemsize
    images, n, width, k = (2, 40, 64, 8) if small else (8, 576, 4096, 64)
    x, index = draw(images * n, width), torch.arange(0, images * n, n // k, device=DEVICE)
    yield Case(
        "gather_tokens", f"{images * n} x {width}", {"tensors": x, "index": index}, len(index) * (2 * width * e + 8)
    )
    large = 64 if small else 1 << 17
    index = torch.rand(large, device=DEVICE).topk(large // 4).indices.sort().values
    given = {"tensors": draw(large, width), "index": index}
    yield Case("gather_tokens", f"{large} -> {large // 4} x {width}", given, len(index) * (2 * width * e + 8))
    given = {"scores": draw(images * n, dtype=torch.float32), "offsets": offsets(*[n] * images), "counts": [k] * images}
    yield Case("topk_tokens", f"{images} x {n}, {k}", given, images * (4 * n + 8 * k))
    into = torch.randint(images * k, (images * n,), device=DEVICE)
    into[: images * k] = torch.arange(images * k, device=DEVICE)
    given = {"x": x, "into": into, "slots": images * k, "weight": None}
    yield Case("merge_tokens", f"{images * n} x {width} into {images * k}", given, images * (n + k) * width * e)
    attention = draw(images * n, dtype=torch.float32).abs()
    given = {"attention": attention, "relevance": attention, "value": draw(images * n, 64, dtype=torch.float32)}
    shape, moved = f"{images} x {n} x 64", images * n * (64 + 3) * 4
    yield Case("flow_scores", shape, {**given, "offsets": offsets(*[n] * images)}, moved)

    n, width, k = (48, 64, 6) if small else (2880, 4096, 320)
    x = draw(n, width)
    cosines = 2 * n * n * width
    given = {"x": x, "y": x, "x_offsets": offsets(n), "y_offsets": offsets(n), "among": "others"}
    yield Case("nearest_tokens", f"{n} x {width}", given, n * width * e + 12 * n, cosines)
    greedy = {"x": x, "lengths": [n], "counts": [k]}
    given = {**greedy, "first": torch.zeros(1, dtype=torch.int64, device=DEVICE), "strategy": "max_min"}
    moved = n * width * e + 4 * n * n + 4 * n * k
    yield Case("farthest_tokens", f"{n} -> {k}, {width}", given, moved, cosines)
    given = {**greedy, "relevance": torch.rand(n, device=DEVICE)}
    yield Case("diverse_tokens", f"{n} -> {k}, {width}", given, moved + 2 * n * k * k, cosines + n * k * k)

    for n in (70, 140) if small else (4096, 8192):
        heads, d = (2, 64) if small else (16, 64)
        q = draw(n, heads, d)
        given = {"q": q, "k": q, "q_offsets": offsets(n), "k_offsets": offsets(n), "scale": d**-0.5}
        moved = 2 * n * heads * d * e + 4 * n * heads
        yield Case("received_attention", f"{n} x {heads} x {d}", given, moved, 4 * n * n * heads * d)
    given = {**given, "q": q[:1], "q_offsets": offsets(1)}
    yield Case("query_attention", f"1 of {n} x {heads} x {d}", given, 2 * n * heads * d * e, 4 * n * heads * d)

    n, last, heads, kv, d, block = (130, 20, 2, 1, 64, 16) if small else (32768, 128, 28, 4, 128, 128)
    q, key = draw(1, heads, n, d), draw(1, kv, n, d)
    given = {"q": q[:, :, -last:], "k": key, "scale": d**-0.5}
    yield Case("probe_sums", f"{last} of {n}, {heads}/{kv} x {d}", given, 8 * heads * n, 4 * last * n * heads * d)
    given = {"q": q, "k": key, "block": block, "scale": d**-0.5}
    moved = (heads + kv) * n * d * e + 4 * heads * (n // block) ** 2
    yield Case("pooled_scores", f"{n} / {block}, {heads}/{kv} x {d}", given, moved)
    kept = n // 16
    where = torch.rand(1, kv, n, device=DEVICE).topk(kept).indices
    moved = 2 * 2 * kv * kept * d * e + 2 * 8 * kv * kept
    yield Case("gather_cache", f"{n} -> {kept}, {kv} x {d}", {"caches": (key, key), "index": where}, moved)


def ceilings(small: bool) -> dict[str, float]:
    """GB/s of a copy (read and written) and TFLOP/s of a matmul, measured."""
    size, side = (1 << 16, 128) if small else (1 << 29, 8192)
    a = draw(side, side)
    return {
        "copy_gbps": 2 * size * DTYPE.itemsize / copy_ms(2 * size * DTYPE.itemsize) / 1e6,
        "matmul_tflops": 2 * side**3 / milliseconds(lambda: a @ a) / 1e9,
    }


def copy_ms(moved: float) -> float:
    """A copy that reads and writes this many bytes in all."""
    source = draw(max(1, int(moved) // (2 * DTYPE.itemsize)))
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def sdpa(case: Case) -> float | None:
    """Flash SDPA on the same queries and keys, keys for values."""
    if not CUDA or case.op not in ("received_attention", "probe_sums"):
        return None
    q, k = (case.given[name] for name in ("q", "k"))
    if q.ndim == 3:
        q, k = (t.transpose(0, 1)[None] for t in (q, k))
    return milliseconds(flash(q, k, k, causal=False))


def attention_map(q: torch.Tensor, k: torch.Tensor, q_offsets: Any, k_offsets: Any, scale: float) -> torch.Tensor:
    """Column sums as a tower with eager attention would give them: one map [H, Q, N], softmax in fp32, cast back."""
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    return (q @ k.transpose(1, 2) * scale).softmax(-1, dtype=torch.float32).to(q.dtype).sum(1)


def measured(record: Record, case: Case) -> Row:
    """The row of a case; where kernel and definition differ, or something fails, it says so and nothing else."""
    row = record.add(op=case.op, shapes=case.shapes)
    try:
        row |= figures(record, case)
    except Exception as error:  # One op that fails must not end the others.
        row["failed"] = said(error)
    record.save()
    return row


def figures(record: Record, case: Case) -> Row:
    op: Any = kernels.ops()[case.op]
    row: Row = {}
    if KERNELS:
        agree(case.op, case.given)
        row["kernel_ms"] = kernel = milliseconds(lambda: op.launch(**case.given))
        row["gbps"], row["tflops"] = case.bytes / kernel / 1e6, case.flops / kernel / 1e9
        row["of_copy"] = row["gbps"] / record.conditions["copy_gbps"]
        row["of_like_copy"] = copy_ms(case.bytes) / kernel
        row["of_matmul"] = row["tflops"] / record.conditions["matmul_tflops"]
        row["kernel_mb"] = ratio(peak_bytes(lambda: op.launch(**case.given)), 1e6)
    row["eager_ms"] = milliseconds(lambda: op.definition(**case.given))
    row["eager_mb"] = ratio(peak_bytes(lambda: op.definition(**case.given)), 1e6)
    row["compiled_ms"], row["sdpa_ms"] = None, sdpa(case)
    row["map_ms"] = milliseconds(lambda: attention_map(**case.given)) if case.op in MAPPED else None
    row["eager_by_kernel"] = ratio(row["eager_ms"], row.get("kernel_ms"))
    return row


def compiled(record: Record, case: Case, row: Row) -> None:
    """The definition under torch.compile; what it cannot take is said in the row."""
    op: Any = kernels.ops()[case.op]
    torch.compiler.reset()
    traced = torch.compile(op.definition)
    try:
        traced(**case.given)  # compiles
        row["compiled_ms"] = milliseconds(lambda: traced(**case.given))
    except Exception as error:  # One definition that torch.compile cannot take must not end the others.
        row["compiled_ms"] = said(error)
    record.save()


def warps(record: Record, case: Case) -> None:
    """The greedy walk with other numbers of warps: a matter of latency, which only a device tells."""
    op: Any = kernels.ops()[case.op]
    chosen = _gram.warps
    for count in (4, 8, 16):
        _gram.warps = lambda block, count=count: count
        ms = milliseconds(lambda: op.launch(**case.given))
        record.add(op=case.op, shapes=f"{case.shapes}; {count} warps", kernel_ms=ms)
    _gram.warps = chosen


def goals(record: Record, rows: list[Row]) -> None:
    def of(op: str) -> list[Row]:
        return [row for row in rows if row["op"] == op]

    for row in of("gather_tokens")[-1:]:
        share = row.get("of_copy")
        record.goal(
            f"gather_tokens, {row['shapes']}", f">= {GATHER:.0%} of copy bandwidth", share, (share or 0) >= GATHER
        )
    received = of("received_attention")
    for row in received[:1]:
        for name, against in (("definition", row.get("eager_ms")), ("attention map", row.get("map_ms"))):
            times = ratio(against, row.get("kernel_ms"))
            wanted = f">= {RECEIVED:g} x {name}, eager"
            record.goal(f"received_attention, {row['shapes']}", wanted, times, (times or 0) >= RECEIVED)
    if len(received) > 1:
        growth = ratio(received[1].get("kernel_mb"), received[0].get("kernel_mb"))
        wanted = f"memory <= {LINEAR:g} x at twice the tokens"
        record.goal("received_attention, O(N)", wanted, growth, (growth or 9) <= LINEAR)
    for row in of("farthest_tokens")[:1]:
        times = row.get("eager_by_kernel")
        record.goal(
            f"farthest_tokens, {row['shapes']}", f">= {FARTHEST:g} x Python loop", times, (times or 0) >= FARTHEST
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP", help="only these (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions, rows and goals here, as they come")
    args = parser.parse_args()
    if unknown := sorted(set(args.ops) - set(kernels.ops())):
        parser.error(f"no op {', '.join(unknown)}; there are {', '.join(kernels.ops())}")
    torch.manual_seed(0)
    record = Record(args.json, **ceilings(small=not CUDA))
    taken = [case for case in cases(small=not CUDA) if not args.ops or case.op in args.ops]
    rows = [measured(record, case) for case in taken]
    goals(record, rows)
    for case in taken if CUDA else ():
        if case.op in GREEDY:
            warps(record, case)
    for case, row in zip(taken, rows, strict=True):
        # It would unroll every choice of a greedy walk.
        if case.op not in GREEDY and "failed" not in row and not args.no_compile:
            compiled(record, case, row)
    record.show()
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
