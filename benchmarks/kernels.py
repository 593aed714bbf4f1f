"""What the kernels reach: `python benchmarks/kernels.py [--json FILE]`. A table to stdout.

On a CUDA device: time on the device from triton's do_bench (L2 flushed, median), bytes and FLOPs as each op's file counts
them, as shares of a copy and a matmul measured in the same run, and against the definition eager and under torch.compile,
and for attention ops against flash SDPA, which computes more (the values too) and gives no sums. Without one the script
runs to its end on small inputs, by the host's clock: with TRITON_INTERPRET=1 kernels are interpreted, else only
definitions run. Such times say nothing about a GPU. No figure is printed before kernel and definition
agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vtoken import kernels  # noqa: E402
from vtoken.kernels import _dispatch  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
GREEDY = ("diverse_tokens", "farthest_tokens")  # torch.compile would unroll every choice, so it is not tried


@dataclass(frozen=True)
class Case:
    """bytes: what has to be moved at least, as the op's file counts it; flops: of the kernel, not of the definition."""

    op: str
    shapes: str
    given: dict[str, Any]
    bytes: float
    flops: float = 0.0


@dataclass
class Row:
    """Milliseconds; None where it was not run. Shares are of the measured ceilings."""

    op: str
    shapes: str
    kernel: float | None
    eager: float
    compiled: float | None
    sdpa: float | None
    gbps: float | None = None
    tflops: float | None = None
    of_copy: float | None = None
    of_matmul: float | None = None


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def cases(small: bool) -> Iterator[Case]:
    """LLaVA-1.5 (576 tokens), LLaVA-NeXT (2880 -> 320), a 4k encoder and a 32k prompt; `small` is for the interpreter."""
    e = DTYPE.itemsize
    images, n, width, k = (2, 40, 64, 8) if small else (8, 576, 4096, 64)
    x, index = draw(images * n, width), torch.arange(0, images * n, n // k, device=DEVICE)
    yield Case(
        "gather_tokens", f"{images * n} x {width}", {"tensors": x, "index": index}, len(index) * (2 * width * e + 8)
    )
    given = {"scores": draw(images * n, dtype=torch.float32), "offsets": bounds(*[n] * images), "counts": [k] * images}
    yield Case("topk_tokens", f"{images} x {n}, {k}", given, images * (4 * n + 8 * k))
    into = torch.randint(images * k, (images * n,), device=DEVICE)
    into[: images * k] = torch.arange(images * k, device=DEVICE)
    given = {"x": x, "into": into, "slots": images * k, "weight": None}
    yield Case("merge_tokens", f"{images * n} x {width} into {images * k}", given, images * (n + k) * width * e)
    attention = draw(images * n, dtype=torch.float32).abs()
    given = {"attention": attention, "relevance": attention, "value": draw(images * n, 64, dtype=torch.float32)}
    shape, moved = f"{images} x {n} x 64", images * n * (64 + 3) * 4
    yield Case("flow_scores", shape, {**given, "offsets": bounds(*[n] * images)}, moved)

    n, width, k = (48, 64, 6) if small else (2880, 4096, 320)
    x = draw(n, width)
    cosines = 2 * n * n * width
    given = {"x": x, "y": x, "x_offsets": bounds(n), "y_offsets": bounds(n), "among": "others"}
    yield Case("nearest_tokens", f"{n} x {width}", given, n * width * e + 12 * n, cosines)
    greedy = {"x": x, "lengths": [n], "counts": [k]}
    given = {**greedy, "first": torch.zeros(1, dtype=torch.int64, device=DEVICE), "strategy": "max_min"}
    moved = n * width * e + 4 * n * n + 4 * n * k
    yield Case("farthest_tokens", f"{n} -> {k}, {width}", given, moved, cosines)
    given = {**greedy, "relevance": torch.rand(n, device=DEVICE)}
    yield Case("diverse_tokens", f"{n} -> {k}, {width}", given, moved + 2 * n * k * k, cosines + n * k * k)

    n, heads, d = (70, 2, 64) if small else (4096, 16, 64)
    q = draw(n, heads, d)
    given = {"q": q, "k": q, "q_offsets": bounds(n), "k_offsets": bounds(n), "scale": d**-0.5}
    moved = 2 * n * heads * d * e + 4 * n * heads
    yield Case("received_attention", f"{n} x {heads} x {d}", given, moved, 4 * n * n * heads * d)
    given = {**given, "q": q[:1], "q_offsets": bounds(1)}
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


def milliseconds(run: Callable[[], Any]) -> float:
    if CUDA:
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(small: bool) -> dict[str, float]:
    """GB/s of a copy (read and written) and TFLOP/s of a matmul, measured."""
    size, side = (1 << 16, 128) if small else (1 << 28, 8192)
    source, target, a = draw(size), draw(size), draw(side, side)
    copy = milliseconds(lambda: target.copy_(source))
    return {
        "copy": 2 * size * DTYPE.itemsize / copy / 1e6,
        "matmul": 2 * side**3 / milliseconds(lambda: a @ a) / 1e9,
    }


def sdpa(case: Case) -> float | None:
    """Flash SDPA on the same queries and keys, keys for values."""
    if not CUDA or case.op not in ("received_attention", "probe_sums"):
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k = (case.given[name] for name in ("q", "k"))
    if q.ndim == 3:
        q, k = (t.transpose(0, 1)[None] for t in (q, k))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return milliseconds(lambda: scaled_dot_product_attention(q, k, k, enable_gqa=True))


def agree(case: Case) -> None:
    """AssertionError where kernel and definition differ. A greedy choice among many tokens turns on the last bit of a sum,
    and so does the partner among many; these are held against the definition on the op's own examples, in fp32."""
    op = kernels.ops()[case.op]
    greedy = case.op in GREEDY
    examples = [on_device(example) for example in op.examples()] if greedy else [case.given]
    relative, absolute = op.tolerance(torch.float32 if greedy else DTYPE)
    for given in examples:
        want, got = op.definition(**given), op.launch(**given)
        if case.op == "nearest_tokens":
            want, got = want[0], got[0]
        torch.testing.assert_close(got, want, rtol=relative, atol=absolute, equal_nan=True)


def on_device(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def measured(case: Case, compile_too: bool, ceiling: dict[str, float]) -> Row:
    op = kernels.ops()[case.op]
    runs = CUDA or _dispatch.INTERPRETED
    if runs:
        agree(case)
    compiled = None
    if compile_too and case.op not in GREEDY:
        traced = torch.compile(op.definition)
        compiled = milliseconds(lambda: traced(**case.given))
    kernel = milliseconds(lambda: op.launch(**case.given)) if runs else None
    row = Row(case.op, case.shapes, kernel, milliseconds(lambda: op.definition(**case.given)), compiled, sdpa(case))
    if kernel is not None:
        row.gbps, row.tflops = case.bytes / kernel / 1e6, case.flops / kernel / 1e9
        row.of_copy, row.of_matmul = row.gbps / ceiling["copy"], row.tflops / ceiling["matmul"]
    return row


def table(rows: list[Row]) -> Table:
    def shown(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    heads = (
        "op",
        "shapes",
        "kernel ms",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "of matmul",
        "eager ms",
        "compiled ms",
        "flash SDPA ms",
    )
    out = Table(*heads, "eager / kernel")
    for r in rows:
        ratio = None if r.kernel is None else r.eager / r.kernel
        cells = [shown(r.kernel), shown(r.gbps, ".1f"), shown(r.of_copy, ".0%"), shown(r.tflops, ".2f")]
        cells += [shown(r.of_matmul, ".0%"), shown(r.eager), shown(r.compiled), shown(r.sdpa), shown(ratio, ".2f")]
        out.add_row(r.op, r.shapes, *cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP", help="only these (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows here")
    args = parser.parse_args()
    if unknown := sorted(set(args.ops) - set(kernels.ops())):
        parser.error(f"no op {', '.join(unknown)}; there are {', '.join(kernels.ops())}")
    torch.manual_seed(0)
    ceiling = ceilings(small=not CUDA)
    given = [case for case in cases(small=not CUDA) if not args.ops or case.op in args.ops]
    rows = [measured(case, not args.no_compile, ceiling) for case in given]
    conditions = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "kernels": "on the device" if CUDA else "interpreted" if _dispatch.INTERPRETED else "not run",
        "dtype": str(DTYPE).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": getattr(_dispatch.triton, "__version__", None),
        "copy_gbps": round(ceiling["copy"], 2),
        "matmul_tflops": round(ceiling["matmul"], 3),
    }
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(rows))
    console.print("; ".join(f"{name}: {value}" for name, value in conditions.items()))
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
