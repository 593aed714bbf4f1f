"""Everything that wants a GPU, part by part: `python benchmarks/gpu.py [--only PART ...]`. Tables to stdout, JSON to
--out.

Every part is a process of its own with a time cap, and writes its rows as they come, so a part that is slow or fails
costs only itself. A part whose JSON is there is not run again, one that was cut short neither (--again runs it). The
last table compares the goals with all that was found. With --small the parts run to their end on a CPU; set
TRITON_INTERPRET=1 and the kernels run, too. Such times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from measure import CUDA, ROOT, show

# Part -> script and arguments, and seconds that it may take on an H200.
PARTS: dict[str, tuple[list[str], int]] = {
    "kernels": (["ops.py"], 300),
    "sparse": (["sparse.py"], 300),
    "cuts": (["cuts.py"], 120),
    "llava": (["end_to_end.py", "llava"], 240),
    "next": (["end_to_end.py", "next"], 240),
    "qwen-4k": (["end_to_end.py", "qwen-4k"], 240),
    "qwen-16k": (["end_to_end.py", "qwen-16k"], 240),
    "qwen-16k-8": (["end_to_end.py", "qwen-16k-8"], 300),
    "qwen-64k": (["end_to_end.py", "qwen-64k"], 300),
    "qwen-128k": (["end_to_end.py", "qwen-128k"], 480),
}
# Where no GPU is, compiling for the CPU takes minutes and tells nothing.
SMALL = {"ops.py": ["--no-compile"], "end_to_end.py": ["--small"]}


def run(name: str, out: Path, small: bool, cap: int) -> str:
    """One part; says how it ended."""
    script, file = PARTS[name][0], out / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script[0]), *script[1:], "--json", str(file)]
    if small:
        command += SMALL.get(script[0], [])
    file.unlink(missing_ok=True)  # What an earlier run found must not pass for this one's.
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = child.wait(cap)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # torch.compile has workers of its own
            child.wait()
            code = f"stopped at {cap} s"
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return f"{name}: {'ended' if code == 0 else f'failed ({code})'} after {time.perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="run parts whose JSON is there, too")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--cap", type=int, metavar="S", help="seconds per part (default: each part's own)")
    parser.add_argument(
        "--total", type=int, metavar="S", help="seconds for all; parts that would start later are left out"
    )
    parser.add_argument("--small", action="store_true", help="on a CPU, with small inputs")
    args = parser.parse_args()
    if not CUDA and not args.small:
        sys.exit("benchmarks/gpu.py needs a CUDA device; torch.cuda.is_available() is false (--small runs on a CPU)")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that `run` ends its part, too
    began, goals, failed = time.perf_counter(), [], False
    for name in args.only:
        file = args.out / f"{name}.json"
        if args.again or not file.exists():
            left = None if args.total is None else int(args.total - (time.perf_counter() - began))
            if left is not None and left < 20:
                print(f"{name}: left out, no time", flush=True)
                continue
            said = run(name, args.out, args.small, min(args.cap or PARTS[name][1], left or PARTS[name][1]))
            print(f"\n## {said}\n", flush=True)
            if "failed" in said:
                failed = True
                print("\n".join((args.out / f"{name}.log").read_text().splitlines()[-15:]), flush=True)
        if file.exists():
            found = json.loads(file.read_text())
            show(found["conditions"], found["rows"], [])
            goals += [{"part": name, **goal} for goal in found["goals"]]
    show({}, [], goals)
    sys.exit(failed)


if __name__ == "__main__":
    main()
