"""Sparse prefill, one layer at a time: `python benchmarks/sparse.py [--json FILE]`. A table to stdout.

First `block_sparse_attention` over random blocks of given density against dense causal flash SDPA. Then every method of site attention with
its defaults: what choosing costs, what it chose, what it takes in all, as shares of the same dense attention, and the most memory that
choosing holds. Queries and keys are drawn with neighbours alike and a heavy start, as real ones are, gates of seerattention at random; which
density a method comes to on them says nothing about a model. Without a GPU all runs on a short prompt, and times mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import CUDA, DEVICE, KERNELS, Record, draw, flash, milliseconds, peak_bytes, ratio, said
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtoken import kernels, registry
from vtoken.compressors._seer import save
from vtoken.kernels import block_sparse_attention
from vtoken.reading import Prompt, Reads, Rope, SparseAttention, causal

HEADS, KEY_HEADS, WIDTH = (28, 4, 128) if CUDA else (4, 2, 32)  # Qwen2.5-VL-7B
LENGTHS = (32768, 65536, 131072) if CUDA else (600,)
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0) if CUDA else (0.5,)
RASTER = (32, 32) if CUDA else (4, 4)  # of a frame
SIZE, TEXT, SLACK, SELECTION = 128, 64, 1.15, 0.10
CUTS = (
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
)  # fmt: skip


def prompt(n: int) -> tuple[Prompt, Tensor]:
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
    given = Prompt(q, k, WIDTH**-0.5, 0, image, place, (((frames, *RASTER),),), rope=rope)
    return given, draw(KEY_HEADS, n, WIDTH)


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


def agree(record: Record) -> None:
    """AssertionError where the kernel differs from its definition, on a prompt that the definition can hold."""
    if not KERNELS:
        return
    op: Any = kernels.ops()["block_sparse_attention"]
    n = 2048 if CUDA else 300
    given, v = prompt(n)
    args = (given.q, given.k, v, random_blocks(n, 0.4), given.scale, SIZE)
    low, high = op.tolerance(given.q.dtype)
    for got, want in zip(op.launch(*args), op.definition(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=low, atol=high, equal_nan=True)
    record.conditions["agrees"] = f"kernel and definition, {n} tokens"


def blocks(record: Record, n: int) -> float:
    """Random blocks; returns the milliseconds of dense attention."""
    given, v = prompt(n)
    q, k = given.q, given.k
    dense = milliseconds(flash(q[None], k[None], v[None], causal=True))
    flops = 4 * WIDTH * HEADS * n * n / 2
    record.add(what="flash SDPA", tokens=n, density=1.0, ms=dense, tflops=flops / dense / 1e9)
    for wanted in DENSITIES:
        read = random_blocks(n, wanted)
        share = float(Reads(SIZE, read).density())
        ms = milliseconds(lambda read=read: block_sparse_attention(q, k, v, read, given.scale, SIZE))
        over = ms / (share * dense)
        record.add(
            what="random blocks", tokens=n, density=share, ms=ms, tflops=share * flops / ms / 1e9,
            of_dense=ms / dense, over_density=over,
        )  # fmt: skip
        record.goal(f"block-sparse at {n}, density {share:.2f}", f"<= {SLACK} x density x dense", over, over <= SLACK)
    return dense


def cuts(record: Record, n: int) -> None:
    """Other tiles, warps and stages of the kernel, which only a device can tell apart."""
    op: Any = kernels.ops()["block_sparse_attention"]
    given, v = prompt(n)
    args = (given.q, given.k, v, random_blocks(n, 0.25), given.scale, SIZE)
    low, high = op.tolerance(given.q.dtype)
    want, chosen = op.launch(*args)[0], op.tiles_of
    for rows, keys, warps, stages in CUTS:
        cut = {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
        row = record.add(what=f"blocks, {cut}", tokens=n)
        op.tiles_of = lambda *_, cut=cut: cut
        try:
            torch.testing.assert_close(op.launch(*args)[0], want, rtol=low, atol=high)
            row["ms"] = milliseconds(lambda: op.launch(*args))
        except Exception as error:  # More shared memory or registers than there are.
            row["failed"] = said(error)
        finally:
            op.tiles_of = chosen
        record.save()


def method(record: Record, name: str, own: dict[str, Any], given: Prompt, v: Tensor, dense: float) -> None:
    """One method with its defaults, and what has none; what it cannot do is said in its row."""
    n = given.length
    row = record.add(what=name, tokens=n)
    try:
        stage: Any = registry.stage(name)(min_len=0, **own)
        with torch.inference_mode():
            chosen = stage.reads(given)
            row["density"] = float(chosen.density())
            row["choosing_ms"] = milliseconds(lambda: stage.reads(given))
            row["choosing_of_dense"] = row["choosing_ms"] / dense
            row["choosing_peak_mb"] = ratio(peak_bytes(lambda: stage.reads(given)), 1e6)
            record.save()
            row["ms"] = milliseconds(lambda: chosen.apply(given.q, given.k, v, given.scale))
            row["of_dense"] = (row["choosing_ms"] + row["ms"]) / dense
            row["over_density"] = row["ms"] / (row["density"] * dense)
    except Exception as error:  # One method that needs more memory than there is must not end the others.
        row["failed"] = said(error)
        record.save()
        return
    share = row["choosing_of_dense"]
    record.goal(f"choosing, {name} at {n}", f"<= {SELECTION:.0%} of dense attention", share, share <= SELECTION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=list(LENGTHS), metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--methods", nargs="*", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions, rows and goals here, as they come")
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record(args.json, heads=f"{HEADS} / {KEY_HEADS} x {WIDTH}", block=SIZE)
    agree(record)
    dense = {n: blocks(record, n) for n in args.tokens}
    names = [name for name in registry.stages() if issubclass(registry.stage(name), SparseAttention)]
    with TemporaryDirectory() as folder:
        own = {"seerattention": {"gates": random_gates(folder)}}
        for n in args.tokens:
            given, v = prompt(n)
            for name in names:
                if not args.methods or name in args.methods:
                    method(record, name, own.get(name, {}), given, v, dense[n])
    if CUDA:
        cuts(record, args.tokens[0])
    record.show()


if __name__ == "__main__":
    main()
