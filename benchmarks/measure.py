"""What the GPU benchmarks share: times, rows and goals written as they come, one printer."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import quantiles
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import vtoken  # noqa: E402
from vtoken.kernels import _dispatch  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
KERNELS = CUDA or _dispatch.INTERPRETED  # whether they run at all
ROUNDS = 15 if CUDA else 2
Row = dict[str, Any]


class Record:
    """Rows and goals of one script, on disk after each, so that whatever ends the script does not end them.

    Args:
        file: JSON {"conditions", "rows", "goals"}; None keeps nothing.
    """

    def __init__(self, file: Path | None, **conditions: Any) -> None:
        import transformers

        self.file, self.rows, self.goals = file, list[Row](), list[Row]()
        self.conditions = {
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
            "kernels": "on the device" if CUDA else "interpreted" if _dispatch.INTERPRETED else "not run",
            "dtype": str(DTYPE).removeprefix("torch."),
            "versions": f"vtoken {vtoken.__version__}, torch {torch.__version__}, triton "
            f"{_dispatch.triton.__version__ if _dispatch.INSTALLED else None}, transformers {transformers.__version__}",
            **conditions,
        }

    def add(self, **row: Any) -> Row:
        """Another row, which may be filled further; `save` then writes it."""
        self.rows.append(row)
        self.save()
        return row

    def goal(self, name: str, wanted: str, value: float | None, met: bool | None) -> None:
        """A goal, and what was measured of it; on a CPU nothing counts as met or missed."""
        said = "not measured" if value is None or not CUDA else "met" if met else "missed"
        self.goals.append({"goal": name, "wanted": wanted, "measured": value, "result": said})
        self.save()

    def save(self) -> None:
        if self.file is not None:
            report = {"conditions": self.conditions, "rows": self.rows, "goals": self.goals}
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(self.file)

    def show(self) -> None:
        show(self.conditions, self.rows, self.goals)


def show(conditions: Row, rows: Sequence[Row], goals: Sequence[Row]) -> None:
    """One table of the rows, one of the goals, and the conditions."""
    console = Console(width=None if sys.stdout.isatty() else 260)
    for lines in (rows, goals):
        if lines:
            heads = list(dict.fromkeys(name for line in lines for name in line))
            table = Table(*heads)
            for line in lines:
                table.add_row(*(shown(line.get(head)) for head in heads))
            console.print(table)
    console.print("; ".join(f"{name}: {value}" for name, value in conditions.items()), markup=False)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def milliseconds(run: Callable[[], Any]) -> float:
    """Median on a GPU, by triton's do_bench (L2 flushed); elsewhere of one run, by the host's clock, which says nothing
    about a GPU."""
    if CUDA:
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def interleaved(*runs: Callable[[], Any], rounds: int = ROUNDS) -> list[list[float]]:
    """Milliseconds of each in every round. They take turns at going first, so that what drifts (clocks, heat,
    neighbours) weighs on all alike. By the device's clock, L2 flushed; on a CPU by the host's."""
    for run in runs:
        run()  # compiles
    times: list[list[Any]] = [[] for _ in runs]
    flushed = torch.empty(1 << 28 if CUDA else 0, dtype=torch.int8, device=DEVICE)
    for turn in range(rounds):
        for each in range(turn, turn + len(runs)):
            run, at = runs[each % len(runs)], times[each % len(runs)]
            if CUDA:
                flushed.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                at.append((start, end))
            else:
                at.append(milliseconds(run))
    if CUDA:
        torch.cuda.synchronize()
        times = [[start.elapsed_time(end) for start, end in pairs] for pairs in times]
    return times


def against(own: Sequence[float], other: Sequence[float]) -> tuple[float, str]:
    """Median and quartiles of the ratio round by round."""
    low, middle, high = quantiles([a / b for a, b in zip(own, other, strict=True)], n=4, method="inclusive")
    return middle, f"{low:.3f} - {high:.3f}"


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Most that was allocated at a time above what was allocated before, the result included; None on a CPU."""
    if not CUDA:
        return None
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def said(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or not b or math.isnan(a) else a / b


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Callable[[], torch.Tensor]:
    """torch's attention [1, H, N, d] of grouped heads; on a GPU by its flash kernel alone, keys repeated beforehand,
    outside of the time, where that takes no groups."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    def run(grouped: bool = True) -> torch.Tensor:
        if not CUDA:
            return attend(q, k, v, is_causal=causal, enable_gqa=True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(q, k, v, is_causal=causal, enable_gqa=grouped)

    try:
        run()
    except RuntimeError:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return lambda: run(False)
    return run
