"""Other tiles, warps and stages of `block_sparse_attention`, which only a device can tell apart: `python
benchmarks/cuts.py [--json FILE]`.

Each against the tiles that the kernel takes by itself, in turns, on the same random blocks; ratios are medians over the
rounds, quartiles beside them. Under the interpreter all run on a short prompt, and times mean nothing; where no kernel
runs, nothing does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import CUDA, KERNELS, ROUNDS, Record, against, interleaved, said
from sparse import HEADS, KEY_HEADS, LENGTHS, SIZE, WIDTH, agree, prompt, random_blocks

from vtoken import kernels

DENSITY = 0.25
CUTS = (
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2),
    (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
)  # fmt: skip


def cuts(record: Record, n: int) -> None:
    op: Any = kernels.ops()["block_sparse_attention"]
    given, v = prompt(n)
    args = (given.q, given.k, v, random_blocks(n, DENSITY), given.scale, SIZE)
    agree(given, v, args[3])
    low, high = op.tolerance(given.q.dtype)
    want, chosen = op.launch(*args)[0], op.tiles_of
    record.conditions["chosen"] = chosen(WIDTH, given.q.element_size(), SIZE)

    def launched(tiles: Callable[..., dict[str, int]]) -> Callable[[], Any]:
        def run() -> Any:
            op.tiles_of = tiles
            try:
                return op.launch(*args)
            finally:
                op.tiles_of = chosen

        return run

    for rows, keys, warps, stages in CUTS:
        cut = {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
        row, run = record.add(what="blocks", tokens=n, **cut), launched(lambda *_, cut=cut: cut)
        try:
            torch.testing.assert_close(run()[0], want, rtol=low, atol=high)
            own, usual = interleaved(run, launched(chosen))
        except Exception as error:  # More shared memory or registers than there are.
            row["failed"] = said(error)
        else:
            row["ms"] = median(own)
            row["of_chosen"], row["quartiles"] = against(own, usual)
        record.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=LENGTHS[0] if CUDA else 150, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows here, as they come")
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record(args.json, heads=f"{HEADS} / {KEY_HEADS} x {WIDTH}", block=SIZE, density=DENSITY, rounds=ROUNDS)
    if KERNELS:
        cuts(record, args.tokens)
    record.show()


if __name__ == "__main__":
    main()
