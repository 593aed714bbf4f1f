"""Similarity thresholds of dtome (LLaVA families) and dtome_post (Qwen), by forward passes of the vision tower alone."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError
from vtoken.evals.calibrate._report import add_json, check_out, tell

if TYPE_CHECKING:
    from torch import Tensor

    from vtoken.evals.calibrate._batches import Learned

SUMMARY = "thresholds of dtome, or of dtome_post on Qwen models, from a folder of pictures"
BUDGETS, SCHEDULES = ("low", "mid", "high"), ("constant", "linear", "reverse_linear")
EXAMPLES = """examples:
  vtoken calibrate dtome llava-hf/llava-1.5-7b-hf --images coco/ --budget mid -o mid.safetensors
  vtoken show llava-hf/llava-1.5-7b-hf dtome:thresholds=mid.safetensors picture.jpg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Merges the most similar pairs of a whole batch, layer by layer, and takes the mean over batches of the similarity at which it\n"
        "stopped. Run again after an interruption it goes on where it was. The authors used 250 000 pictures of LLaVA's tuning data in\n"
        "batches of 64; thresholds depend on the pictures."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("model", help="shipped model, folder or hub name")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="pictures, also in sub-folders")
    parser.add_argument(
        "--budget",
        choices=BUDGETS,
        default="mid",
        help="share of tokens that merges over all layers: low 7/8, mid 2/3, high 1/3 (default: %(default)s)",
    )
    parser.add_argument("--schedule", choices=SCHEDULES, default="constant", help="over layers (default: %(default)s)")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="safetensors file")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="pictures per batch (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N pictures only")
    parser.add_argument(
        "--rounds", type=int, default=8, metavar="N", help="rounds of dtome_post (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrates, with a progress bar.

    Raises:
        VtokenError: no such model or pictures, or a file of another calibration.
    """
    from rich.console import Console
    from rich.progress import Progress

    from vtoken import registry
    from vtoken.evals import processors, reference
    from vtoken.evals.shared import models

    check_out(args.out)
    files = pictures(args.images, args.limit)
    model = models.load(args.model, device=args.device, dtype=args.dtype)
    shipped = args.model in reference.names()
    processor = processors.load(reference.path(args.model) if shipped else args.model, pillow=shipped)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=len(files))
        found = calibrate(
            model,
            processor.image_processor,
            files,
            args.out,
            budget=args.budget,
            schedule=args.schedule,
            batch_size=args.batch_size,
            rounds=args.rounds,
            name=args.model,
            progress=lambda done: bar.update(task, completed=done),
        )
    thresholds, left = (found[name].tolist() for name in ("thresholds", "left"))
    told = {"file": str(args.out), "pictures": len(files), "budget": args.budget, "schedule": args.schedule}
    rows = [("layer or round", "threshold", "tokens left")]
    rows += [
        (str(k), "nothing merges" if t > 1 else f"{t:.4f}", f"{share:.1%}")
        for k, (t, share) in enumerate(zip(thresholds, left, strict=True))
    ]
    about = f"wrote {args.out}: {len(files)} pictures, {left[-1]:.1%} of the tokens left on average"
    stage = "dtome_post" if packed(registry.adapter(model.config.model_type)(model)) else "dtome"
    tell(args, {**told, "thresholds": thresholds, "left": left}, rows, about, f"{stage}:thresholds={args.out}")
    return 0


def pictures(folder: Path, limit: int | None = None) -> list[Path]:
    """The picture files below a folder, sorted.

    Raises:
        ConfigError: there are none, or a limit below 1.
    """
    from vtoken.evals.shared.media import suffixes

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    known = suffixes()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known)[:limit]
    if not files:
        raise ConfigError(f"--images {folder}: no pictures there; give a folder of jpg, png or other files")
    return files


def calibrate(
    model: Any,
    image_processor: Any,
    files: list[Path],
    out: Path,
    *,
    budget: str = "mid",
    schedule: str = "constant",
    batch_size: int = 64,
    rounds: int = 8,
    name: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Runs the tower over all pictures, writing `out` after every batch; goes on from `out` where that is the same calibration.

    Returns:
        what the file holds: thresholds and left, [layers or rounds] float64.

    Raises:
        ConfigError: `out` is of another calibration, a picture that cannot be read, or a batch size or rounds below 1.
    """
    import torch

    from vtoken import registry
    from vtoken.evals.calibrate import _batches
    from vtoken.evals.processors import apply

    if batch_size < 1 or rounds < 1:
        raise ConfigError(f"batch size and rounds must be at least 1, not {batch_size} and {rounds}")
    adapter = registry.adapter(model.config.model_type)(model)
    behind = packed(adapter)
    depth = rounds if behind else len(adapter.encoder.layers)
    nominal = 1000 if behind else adapter.patches
    each = round(_batches.SHARES[budget] * nominal / depth)
    learned = _batches.Learned(_batches.schedule(schedule, each * depth, depth), nominal)
    about = {
        "method": "dtome_post" if behind else "dtome",
        "model": name,
        "budget": budget,
        "schedule": schedule,
        "batch_size": str(batch_size),
        "pictures": digest(files),
        "dtype": str(model.dtype),
        **({} if behind else {"order": "anew"}),  # not so in files of before
    }
    resume(out, about, learned, depth if behind else 1 + min(adapter.encoder.feature_layers))
    stage = _batches.learner(registry.stage(about["method"]), learned)
    with torch.inference_mode():
        encode = _packed(adapter, stage) if behind else _padded(adapter, stage)
        for start in range(learned.batches * batch_size, len(files), batch_size):
            progress(start)
            batch = files[start : start + batch_size]
            encode(apply(image_processor, f"{batch[0]} to {batch[-1]}", images=[_open(f) for f in batch]))
            learned.batches += 1
            save(out, about, learned)
    progress(len(files))
    return learned.tensors()


def packed(adapter: Any) -> bool:
    """Whether the model's encoder cannot merge inside, so that dtome_post merges what leaves it."""
    joined: bool = adapter.encoder.unit > 1
    return joined


def _padded(adapter: Any, stage: Any) -> Callable[[Any], None]:
    """Runs the tower of a LLaVA on what the image processor returns; the stage merges inside it."""
    import torch

    from vtoken.hooks.state.context import Context
    from vtoken.hooks.vision.padded_tower import PaddedTower

    def encode(inputs: Any) -> None:
        pixels, context = inputs["pixel_values"], Context(adapter, stages=(stage,))
        if pixels.ndim == 5:
            crops = adapter.crops({"image_sizes": inputs["image_sizes"]})
            pixels = torch.cat([image[:n] for image, n in zip(pixels, crops, strict=True)])
        try:
            PaddedTower(context)
            adapter.tower(pixels.to(adapter.model.device, adapter.model.dtype))
        finally:
            context.handle.release()

    return encode


def _packed(adapter: Any, stage: Any) -> Callable[[Any], None]:
    """Runs the tower of a Qwen model; the stage merges the keys that it leaves."""
    from vtoken.hooks.state.context import Context
    from vtoken.hooks.state.run import segments
    from vtoken.hooks.vision.varlen_tower import VarlenTower
    from vtoken.stages import Fact, VisualTokens

    def encode(inputs: Any) -> None:
        grid = inputs["image_grid_thw"].to(adapter.model.device)
        keys = Fact("mean_key", adapter.encoder.attention_layer)
        context = Context(adapter, read=frozenset({keys}))
        try:
            VarlenTower(context)
            adapter.tower(inputs["pixel_values"].to(adapter.model.device, adapter.model.dtype), grid_thw=grid)
        finally:
            context.handle.release()
        tower = context.run.tower
        value = tower.facts[keys]
        parts = [layout.parts for layout in tower.layouts]
        lengths = [layout.tokens for layout in tower.layouts]
        segment = segments(tower.layouts)
        stage.select(
            VisualTokens.pack(
                value,
                lengths,
                parts,
                range(len(parts)),
                tower.history.raster_index,
                segment=segment,
                facts={Fact("mean_key"): value},
            )
        )

    return encode


def _open(file: Path) -> Any:
    from vtoken.evals.shared.media import still

    try:
        return still(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; move it away and start anew") from error


def digest(files: list[Path]) -> str:
    """Of names and sizes, in order."""
    told = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    return f"{len(files)} {hashlib.sha256(told.encode()).hexdigest()[:16]}"


def save(out: Path, about: dict[str, str], learned: Learned) -> None:
    """Writes the file anew, whole or not at all."""
    from safetensors.torch import save_file

    part = out.with_name(f"{out.name}.part")
    save_file(learned.tensors(), part, {**about, "batches": str(learned.batches)})
    os.replace(part, out)


def resume(out: Path, about: dict[str, str], learned: Learned, asked: int) -> None:
    """Takes over what `out` holds, if it is there; `asked`: layers that merge, those behind them were filled up.

    Raises:
        ConfigError: it is of another calibration.
    """
    from vtoken.compressors._files import count, expect, opened
    from vtoken.evals.calibrate._batches import NEVER

    if not out.exists():
        return
    try:
        found, learned_before = opened(out)
    except ValueError as error:
        raise ConfigError(f"{out} is not a file of thresholds ({error}); write to another one") from error
    different = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in about.items() if found.get(key) != value]
    rounds = learned_before["left"].numel() if "left" in learned_before else len(learned.merges)
    if different or rounds != len(learned.merges):
        raise ConfigError(
            f"{out} is of another calibration ({'; '.join(different) or 'other rounds'}); delete it or write to another file"
        )
    try:
        expect(out, learned_before, ((name, (rounds,)) for name in ("thresholds", "left")))
        learned.batches = count(out, found, "batches")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    thresholds = learned_before["thresholds"]
    learned.thresholds = thresholds.masked_fill(thresholds == NEVER, float("nan"))
    learned.left = learned_before["left"]
    learned.left[asked:] = float("nan")
