"""Sparse prefill, one layer at a time: `python benchmarks/sparse.py [--json FILE]`. A table to stdout.

First `block_sparse_attention` over random blocks of given density against dense causal flash SDPA. Then every method of
site attention with its defaults: what choosing costs, what it chose, what it takes in all, as shares of dense
attention, and the most memory that choosing takes. Dense attention is measured anew beside every row, in turns; ratios
are medians over the rounds, quartiles beside them. Queries and keys are drawn with neighbours alike and a heavy start,
as real ones are, gates of seerattention at random; which density a method comes to on them says nothing about a model.
Without a GPU all runs on a short prompt, and times mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import (
    CUDA,
    DEVICE,
    KERNELS,
    ROUNDS,
    Record,
    against,
    draw,
    flash,
    interleaved,
    peak_bytes,
    ratio,
    said,
)
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtoken import kernels, registry
from vtoken.compressors.attention._seer import save
from vtoken.kernels import block_sparse_attention
from vtoken.stages.attention import PrefillQK, Rope, SparseAttention, SparseMask, causal

HEADS, KEY_HEADS, WIDTH = (28, 4, 128) if CUDA else (4, 2, 32)  # Qwen2.5-VL-7B
LENGTHS = (32768, 65536, 131072) if CUDA else (600,)
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0) if CUDA else (0.5,)
RASTER = (32, 32) if CUDA else (4, 4)  # of a frame
SIZE, TEXT, SLACK, SELECTION = 128, 64, 1.15, 0.10
CHECKED = 2  # query blocks that are checked against the definition, at the end and in the middle


def prompt(n: int) -> tuple[PrefillQK, Tensor]:
    """A video between two texts, and values."""
    near = draw(KEY_HEADS, -(-n // 64), WIDTH).repeat_interleave(64, 1)[:, :n] * 0.7
    start, groups = draw(KEY_HEADS, 1, WIDTH) * 0.5, HEADS // KEY_HEADS
    k = near + draw(KEY_HEADS, n, WIDTH)
    k[:, :16] += start
    q = (near + start).repeat_interleave(groups, 0) + draw(HEADS, n, WIDTH)
    cells = RASTER[0] * RASTER[1]
    frames = (n - 2 * TEXT) // cells
    place = torch.full((n,), -1, device=DEVICE)
    place[TEXT : TEXT + frames * cells] = torch.arange(frames * cells, device=DEVICE)
    image = torch.where(place >= 0, 0, -1)
    angles = torch.arange(n, device=DEVICE)[:, None] * 1e6 ** -torch.arange(0, 1, 2 / WIDTH, device=DEVICE)
    rope = Rope(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), apply_rotary_pos_emb)
    given = PrefillQK(q, k, WIDTH**-0.5, 0, image, place, (((frames, *RASTER),),), rope=rope)
    return given, draw(KEY_HEADS, n, WIDTH)


def dense(given: PrefillQK, v: Tensor) -> Callable[[], Tensor]:
    return flash(given.q[None], given.k[None], v[None], causal=True)


def random_gates(folder: str) -> str:
    """A file of SeerAttention gates of one layer: what choosing costs does not depend on what they learnt."""
    file = Path(folder) / "gates.safetensors"
    save(file, [draw(HEADS, 3 * WIDTH, WIDTH).cpu() * WIDTH**-0.5], KEY_HEADS, 64, {})
    return str(file)


def random_blocks(n: int, density: float) -> Tensor:
    """[H, T, T] this share of the causal blocks, the diagonal always."""
    t = -(-n // SIZE)
    read = torch.rand(HEADS, t, t, device=DEVICE) < density
    read |= torch.eye(t, dtype=torch.bool, device=DEVICE)
    return read & causal(read)


def agree(given: PrefillQK, v: Tensor, read: Tensor) -> None:
    """AssertionError where the kernel, as it is measured, differs from its definition in some query blocks; all are
    more than that can take."""
    if not KERNELS:
        return
    op: Any = kernels.ops()["block_sparse_attention"]
    low, high = op.tolerance(given.q.dtype)
    found, tiles = op.launch(given.q, given.k, v, read, given.scale, SIZE), read.shape[1]
    for last in {tiles, -(-tiles // 2)}:
        first, end = max(0, last - CHECKED), min(last * SIZE, given.length)
        rows = slice(first * SIZE, end)
        want = op.definition(
            given.q[:, rows], given.k[:, :end], v[:, :end], read[:, first:last, :last], given.scale, SIZE
        )
        for whole, part in zip(found, want, strict=True):
            torch.testing.assert_close(whole[:, rows], part, rtol=low, atol=high, equal_nan=True)


def blocks(record: Record, n: int) -> None:
    """Random blocks."""
    given, v = prompt(n)
    flops, whole = 4 * WIDTH * HEADS * n * n / 2, dense(given, v)
    for wanted in DENSITIES:
        read = random_blocks(n, wanted)
        agree(given, v, read)
        share = float(SparseMask(SIZE, read).density())
        own, all_of = interleaved(
            lambda read=read: block_sparse_attention(given.q, given.k, v, read, given.scale, SIZE), whole
        )
        of_dense, quartiles = against(own, all_of)
        over = of_dense / share
        record.add(
            what="random blocks", tokens=n, density=share, ms=median(own), dense_ms=median(all_of),
            tflops=share * flops / median(own) / 1e9, dense_tflops=flops / median(all_of) / 1e9,
            of_dense=of_dense, quartiles=quartiles, over_density=over,
        )  # fmt: skip
        record.goal(f"block-sparse at {n}, density {share:.2f}", f"<= {SLACK} x density x dense", over, over <= SLACK)


def method(record: Record, name: str, own: dict[str, Any], given: PrefillQK, v: Tensor) -> None:
    """One method with its defaults, and what has none; what it cannot do is said in its row."""
    n = given.length
    row = record.add(what=name, tokens=n)
    try:
        stage: Any = registry.stage(name)(min_len=0, **own)
        with torch.inference_mode():
            chosen = stage.reads(given)
            row["density"] = float(chosen.density())
            row["choosing_peak_mb"] = ratio(peak_bytes(lambda: stage.reads(given)), 1e6)
            record.save()
            choosing, reading, all_of = interleaved(
                lambda: stage.reads(given), lambda: chosen.apply(given.q, given.k, v, given.scale), dense(given, v)
            )
    except Exception as error:  # One method that needs more memory than there is must not end the others.
        row["failed"] = said(error)
        record.save()
        return
    total, quartiles = against([a + b for a, b in zip(choosing, reading, strict=True)], all_of)
    share, around = against(choosing, all_of)
    row |= {
        "ms": median(reading), "dense_ms": median(all_of), "of_dense": total, "quartiles": quartiles,
        "over_density": against(reading, all_of)[0] / row["density"],
        "choosing_ms": median(choosing), "choosing_of_dense": share, "choosing_quartiles": around,
    }  # fmt: skip
    wanted = f"<= {SELECTION:.0%} of dense attention"
    record.goal(f"choosing, {name} at {n}", wanted, share, share <= SELECTION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=list(LENGTHS), metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--methods", nargs="*", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions, rows and goals here, as they come")
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record(args.json, heads=f"{HEADS} / {KEY_HEADS} x {WIDTH}", block=SIZE, rounds=ROUNDS)
    for n in args.tokens:
        blocks(record, n)
    names = [name for name in registry.stages() if issubclass(registry.stage(name), SparseAttention)]
    with TemporaryDirectory() as folder:
        own = {"seerattention": {"gates": random_gates(folder)}}
        for n in args.tokens:
            given, v = prompt(n)
            for name in names:
                if not args.methods or name in args.methods:
                    method(record, name, own.get(name, {}), given, v)
    record.show()


if __name__ == "__main__":
    main()
