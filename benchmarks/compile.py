"""Compiles the Triton kernels for a GPU that is not here: `python benchmarks/compile.py [--ops OP ...] [--json FILE]`.

Every op is launched on its own examples, where it has heads also on heads of 64, 80, 128 and 256 (with the largest
blocks there are), and on tokens 4096 wide; the launches are compiled with an explicit target and never run. Per
compiled kernel: registers of a thread, bytes of its stack (what spilled, and what calls need), shared memory of a
program, which limits how many run side by side. Exits with 1 where something does not compile or asks for more shared
memory than the target has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.

import torch  # noqa: E402
import triton  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vtoken import kernels  # noqa: E402
from vtoken.kernels import _tiles  # noqa: E402

SHARED = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
}  # bytes a program may take, by compute capability
HEADS = (64, 80, 128, 256)
WIDTH = 4096
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled. Bytes are per thread (stack) and per program (shared); None where no tool tells."""

    op: str
    kernel: str
    dtype: str
    constants: str
    warps: int
    stages: int
    registers: int | None
    stack: int | None
    shared: int
    seconds: float


class NoDevice:
    """What triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Recorder:
    """Stands in for `JITFunction.run`: compiles, and keeps what came out once per binary."""

    def __init__(self) -> None:
        self.op, self.dtype, self.found, self.run = "", "", dict[str, Compiled](), JITFunction.run

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        start = time.perf_counter()
        binary = self.run(function, *args, grid=grid, warmup=True, **kwargs)
        if binary.hash not in self.found:
            constants = " ".join(f"{name}={kwargs[name]}" for name in kwargs if name.isupper())
            meta, registers, stack = binary.metadata, *resources(binary.asm["cubin"])
            self.found[binary.hash] = Compiled(
                self.op, function.__name__, self.dtype, constants, meta.num_warps, meta.num_stages, registers, stack,
                meta.shared, round(time.perf_counter() - start, 1),
            )  # fmt: skip
        return binary


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack of a thread."""
    if not TOOL.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def cases(op: Any, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The examples, and one of them with other heads or wide tokens."""

    def cast(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(cast(item) for item in value)
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    examples = [{name: cast(value) for name, value in example.items()} for example in op.examples()]
    yield from examples
    wide = [name for name in ("q", "k", "v") if name in examples[0]]
    big = max(examples, key=lambda example: (example.get("size", 0), example[wide[0]].numel())) if wide else {}
    for d in HEADS if wide else ():
        yield {**big, **{name: torch.zeros(*big[name].shape[:-1], d, dtype=dtype) for name in wide}}
    tokens = [name for name in ("x", "y") if name in examples[0]]
    for example in examples[-2:] if tokens else ():
        made = {name: torch.zeros(len(example[name]), WIDTH, dtype=dtype) for name in tokens}
        yield {**example, **made, **({"y": made["x"]} if example.get("y") is example["x"] else {})}
    if "columns" in signature(op.launch).parameters:
        yield from listed(dtype)


def listed(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """`block_sparse_attention` as stages ask for it: blocks of 128, and besides single keys, or queries of a list."""
    heads, n, size = 4, 260, 128
    blocks = -(-n // size)
    singles = {"columns": torch.zeros(heads, blocks, 40, dtype=torch.int32)}
    queries = {"rows": torch.arange(n, dtype=torch.int32).expand(heads, -1)}
    read = torch.ones(heads, blocks, blocks, dtype=torch.bool)
    for d in HEADS:
        k = torch.zeros(2, n, d, dtype=dtype)
        for more in (singles, queries):
            yield {
                "q": torch.zeros(heads, n, d, dtype=dtype),
                "k": k,
                "v": k,
                "read": read,
                "scale": 1.0,
                "size": size,
                **more,
            }


def table(found: list[Compiled]) -> Table:
    out = Table("op", "kernel", "dtype", "constants", "warps", "stages", "registers", "stack B", "shared B", "s")
    for c in found:
        numbers = (c.warps, c.stages, c.registers, c.stack, c.shared, c.seconds)
        out.add_row(c.op, c.kernel, c.dtype, c.constants, *("-" if n is None else str(n) for n in numbers))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP", help="only these (default: all)")
    parser.add_argument(
        "--arch", type=int, default=90, choices=sorted(SHARED), help="default: %(default)s, H100 and H200"
    )
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32", "float16"], metavar="DTYPE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was compiled here")
    args = parser.parse_args()
    if unknown := sorted(set(args.ops) - set(kernels.ops())):
        parser.error(f"no op {', '.join(unknown)}; there are {', '.join(kernels.ops())}")
    driver.set_active(NoDevice(args.arch))
    torch.cuda.device_of = contextlib.nullcontext  # type: ignore[assignment, misc]
    recorder, wrong = Recorder(), list[str]()
    JITFunction.run = lambda function, *given, **options: recorder(function, *given, **options)
    many = _tiles.MANY
    for name in args.ops or kernels.ops():
        op = kernels.ops()[name]
        for dtype in args.dtypes:
            recorder.op, recorder.dtype = name, dtype
            for number, given in enumerate(cases(op, getattr(torch, dtype))):
                # The examples are small; tiles for many tokens are compiled on every other one.
                _tiles.MANY = 0 if number % 2 else many
                before = len(recorder.found)
                try:
                    op.launch(**given)
                except Exception as error:  # Whatever the compiler says is what this script is for.
                    wrong.append(f"{name}, {dtype}, case {number}: {type(error).__name__}: {str(error).strip()[-600:]}")
                    print(wrong[-1], file=sys.stderr, flush=True)
                for c in list(recorder.found.values())[before:]:
                    print(*asdict(c).values(), file=sys.stderr, flush=True)
    found = list(recorder.found.values())
    wrong += [
        f"{c.op}, {c.dtype}: {c.kernel} takes {c.shared} bytes of shared memory"
        for c in found
        if c.shared > SHARED[args.arch]
    ]
    Console(width=None if sys.stdout.isatty() else 200).print(table(found))
    spilled = [c for c in found if c.stack]
    print(
        f"sm_{args.arch}, triton {triton.__version__}: {len(found)} compiled, {len(spilled)} with a stack, "
        f"{len(wrong)} failed"
    )
    if args.json:
        conditions = {"arch": args.arch, "triton": triton.__version__, "torch": torch.__version__}
        report = {"conditions": conditions, "compiled": [asdict(c) for c in found], "failed": wrong}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
