"""The GPU benchmarks run to their end without a GPU, keep what they found, and say that no goal was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtoken.kernels import _dispatch

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.skipif(not _dispatch.INSTALLED, reason="triton is not installed")
def test_parts_end_in_the_interpreter(tmp_path: Path) -> None:
    parts = ("kernels", "sparse", "cuts", "llava")
    child = run("gpu.py", "--small", "--only", *parts, "--out", str(tmp_path))
    assert child.returncode == 0, child.stdout + child.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert not [row for part in found.values() for row in part["rows"] if "failed" in row]
    for name, said in (("kernels", "farthest_tokens"), ("sparse", "block-sparse"), ("llava", "fastervlm")):
        assert any(said in goal["goal"] for goal in found[name]["goals"]), name
    goals = [goal for part in found.values() for goal in part["goals"]]
    assert {goal["result"] for goal in goals} == {"not measured"} and "not measured" in child.stdout
    again = run("gpu.py", "--small", "--only", "llava", "--out", str(tmp_path))
    assert again.returncode == 0 and "## llava" not in again.stdout and "fastervlm" in again.stdout


@pytest.mark.skipif(not _dispatch.INSTALLED, reason="triton is not installed")
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """One op, in seconds; `python benchmarks/compile.py` takes all."""
    file = tmp_path / "compiled.json"
    child = run("compile.py", "--ops", "gather_tokens", "--dtypes", "bfloat16", "--json", str(file), interpret=False)
    assert child.returncode == 0, child.stdout + child.stderr
    report = json.loads(file.read_text())
    assert report["failed"] == [] and report["conditions"]["arch"] == 90
    assert {c["kernel"] for c in report["compiled"]} == {"_copy_rows"}
    assert all(c["registers"] is None or 0 < c["registers"] <= 255 for c in report["compiled"])


@pytest.mark.skipif(not _dispatch.INSTALLED, reason="triton is not installed")
def test_a_new_length_compiles_nothing_new() -> None:
    """Sparse attention, what chooses for it, and cuts of the cache, on prompts of lengths that triton would tell apart:
    1, multiples of 16, and others."""
    code = """
import contextlib, compile, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vtoken.kernels import ops

driver.set_active(compile.NoDevice(90))
torch.cuda.device_of = contextlib.nullcontext
recorder = compile.Recorder()
JITFunction.run = lambda function, *given, **options: recorder(function, *given, **options)
counts = []
for n in (160, 1, 100, 33):
    q, tiles = torch.zeros(2, n, 16), -(-n // 16)
    read = torch.ones(2, tiles, tiles, dtype=torch.bool)
    ops()["row_maxima"].launch(q, q, read, 1.0, 16)
    ops()["block_sparse_attention"].launch(q, q, q, read, 1.0, 16, torch.zeros(2, tiles, n, dtype=torch.int32))
    ops()["probe_sums"].launch(q[None, :, -max(1, n // 2) :], q[None], 1.0, recent=max(1, n // 4))
    ops()["pooled_scores"].launch(q[None], q[None], 16, 1.0)
    ops()["gather_cache"].launch(q[None], torch.zeros(1, 2, max(1, n // 2), dtype=torch.int64))
    counts.append(len(recorder.found))
print(counts)
"""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.stdout == "[10, 10, 10, 10]\n", child.stdout + child.stderr


def test_a_part_that_is_slow_costs_only_itself(tmp_path: Path) -> None:
    """Stopped at its cap, it leaves the parts behind it their turn; what it had written would be shown."""
    (tmp_path / "kernels.json").write_text(json.dumps({"conditions": {}, "rows": [{"op": "kept"}], "goals": []}))
    child = run("gpu.py", "--small", "--only", "llava", "kernels", "--cap", "1", "--out", str(tmp_path))
    assert child.returncode == 1 and "llava: failed (stopped at 1 s)" in child.stdout and "kept" in child.stdout


def test_without_a_gpu_it_says_so() -> None:
    child = run("gpu.py", interpret=False)
    assert child.returncode == 1 and "--small" in child.stderr
