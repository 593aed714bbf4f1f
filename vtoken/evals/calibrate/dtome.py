"""`vtoken calibrate dtome`: similarity thresholds of dtome and, where patches are joined after the tower, dtome_post,
by forward passes of the tower alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vtoken import registry
from vtoken.compressors._files import count, expect, opened
from vtoken.errors import ConfigError
from vtoken.evals.calibrate._batches import NEVER, SCHEDULES, SHARES, Learned, learner, schedule
from vtoken.evals.calibrate._report import tell, weights_file
from vtoken.evals.processors import apply
from vtoken.evals.shared import models, whole
from vtoken.evals.shared.bars import progress, say
from vtoken.evals.shared.media import still, suffixes
from vtoken.evals.shared.options import ModelCommand, option
from vtoken.evals.shared.whole import check_folder
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.run import pixels_of, segments
from vtoken.hooks.vision.towers import tower_of
from vtoken.stages import Fact, VisualTokens

# What an image processor returns beside pixels -> the tower's name for it.
SIZES = {
    "image_grid_thw": "grid_thw",
    "image_sizes": "image_sizes",
    "spatial_shapes": "spatial_shapes",
    "pixel_attention_mask": "pixel_attention_mask",
}
SUMMARY = "thresholds of dtome, or of dtome_post on Qwen models and InternVL, from a folder of pictures"
DESCRIPTION = """\
Merges the most similar pairs of a whole batch, layer by layer, and takes the mean over batches of the similarity at
which it stopped. Run again after an interruption it goes on where it was. The authors used 250 000 pictures of LLaVA's
tuning data in batches of 64; thresholds depend on the pictures."""
EXAMPLES = """examples:
  vtoken calibrate dtome llava-hf/llava-1.5-7b-hf --images coco/ --budget mid -o mid.safetensors
  vtoken show llava-hf/llava-1.5-7b-hf dtome:thresholds=mid.safetensors picture.jpg
"""


class Settings(ModelCommand):
    images: Path = option(..., "pictures, also in sub-folders", "FOLDER")
    budget: str = option(
        "mid", "share of tokens that merges over all layers: low 7/8, mid 2/3, high 1/3", None, [*SHARES]
    )
    schedule: str = option("constant", "over layers", None, SCHEDULES)
    batch_size: int = option(64, "pictures per batch", ge=1)
    limit: int | None = option(None, "first N pictures only", ge=1)
    rounds: int = option(8, "rounds of dtome_post", ge=1)
    out: Path = weights_file()


def run(asked: Settings) -> None:
    """Calibrates, with a progress bar."""
    check_folder(asked.out)
    files = pictures(asked.images, asked.limit)
    model, processor = models.load_pair(asked.model, asked.device, asked.dtype)
    with progress():
        found = calibrate(model, processor.image_processor, files, asked)
    thresholds, left = (found[name].tolist() for name in ("thresholds", "left"))
    rows = [("layer or round", "threshold", "tokens left")]
    rows += [
        (str(k), "nothing merges" if t > 1 else f"{t:.4f}", f"{share:.1%}")
        for k, (t, share) in enumerate(zip(thresholds, left, strict=True))
    ]
    about = f"wrote {asked.out}: {len(files)} pictures, {left[-1]:.1%} of the tokens left on average"
    stage = "dtome_post" if merges_behind(registry.adapter(model.config.model_type)(model)) else "dtome"
    figures = {"file": str(asked.out), "pictures": len(files), "budget": asked.budget, "schedule": asked.schedule}
    tell(asked, {**figures, "thresholds": thresholds, "left": left}, rows, about, f"{stage}:thresholds={asked.out}")


def pictures(folder: Path, limit: int | None = None) -> list[Path]:
    """The picture files below a folder, sorted."""
    known = suffixes()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known)[:limit]
    if not files:
        raise ConfigError(f"--images {folder}: no pictures there; give a folder of jpg, png or other files")
    return files


def calibrate(model: Any, image_processor: Any, files: list[Path], asked: Settings) -> dict[str, Tensor]:
    """Runs the tower over all pictures, writing `asked.out` after every batch; goes on from it where it is of the same
    calibration.

    Returns:
        what the file holds: thresholds and left, [layers or rounds] float64.
    """
    adapter = registry.adapter(model.config.model_type)(model)
    behind = merges_behind(adapter)
    depth = asked.rounds if behind else len(adapter.encoder.layers)
    nominal = 1000 if behind else adapter.patches
    each = round(SHARES[asked.budget] * nominal / depth)
    learned = Learned(schedule(asked.schedule, each * depth, depth), nominal)
    about = {
        "method": "dtome_post" if behind else "dtome",
        "model": asked.model,
        "budget": asked.budget,
        "schedule": asked.schedule,
        "batch_size": str(asked.batch_size),
        "pictures": digest(files),
        "dtype": str(model.dtype),
        **({} if behind else {"order": "anew"}),  # not so in files of before
    }
    resume(asked.out, about, learned, depth if behind else 1 + min(adapter.encoder.feature_layers))
    stage = learner(registry.stage(about["method"]), learned)
    with torch.inference_mode():
        for start in range(learned.batches * asked.batch_size, len(files), asked.batch_size):
            say("calibrating", start / len(files))
            batch = files[start : start + asked.batch_size]
            inputs = apply(image_processor, f"{batch[0]} to {batch[-1]}", images=[_open(f) for f in batch])
            encode(adapter, stage, inputs, behind)
            learned.batches += 1
            whole.write(asked.out, save(learned.tensors(), {**about, "batches": str(learned.batches)}))
    return learned.tensors()


def merges_behind(adapter: Any) -> bool:
    """Whether the model's encoder cannot merge inside, so that dtome_post merges what leaves it."""
    found: bool = adapter.encoder.packed or adapter.encoder.unit > 1
    return found


def encode(adapter: Any, stage: Any, inputs: Any, behind: bool) -> None:
    """Runs the tower on what the image processor returns. The stage merges inside it, or behind it (where the tower
    joins its patches) by the keys that the tower leaves."""
    encoder, device, pixels = adapter.encoder, adapter.model.device, pixels_of("image", inputs)
    keys = Fact("mean_key", encoder.attention_layer)
    context = Context(adapter, read=frozenset({keys})) if behind else Context(adapter, stages=(stage,))
    sizes = {name: inputs[given].to(device) for given, name in SIZES.items() if behind and given in inputs}
    if pixels.ndim == 5 and behind:  # rows of crops; those that are all zero are padding
        pixels = pixels.flatten(0, 1)
        pixels = pixels[(pixels != 0).flatten(1).any(1)]
    elif pixels.ndim == 5:
        crops = adapter.crops({"image_sizes": inputs["image_sizes"]})
        pixels = torch.cat([image[:n] for image, n in zip(pixels, crops, strict=True)])
    pixels = pixels.to(device, adapter.model.dtype)
    try:
        tower_of(encoder)(context)
        adapter.tower(pixels[None] if encoder.by_grids else pixels, **sizes)
    finally:
        context.handle.release()
    if not behind:
        return
    tower, layouts = context.run.tower, adapter.layouts("image", inputs)
    value = tower.facts[keys]
    value = value if encoder.packed or encoder.sized else value.flatten(0, 1)
    parts, lengths = [layout.parts for layout in layouts], [layout.tokens for layout in layouts]
    segment, facts = segments(layouts), {Fact("mean_key"): value}
    rows, index = range(len(parts)), tower.history.raster_index
    stage.select(VisualTokens.pack(value, lengths, parts, rows, index, segment=segment, facts=facts))


def _open(file: Path) -> Any:
    try:
        return still(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; move it away and start anew") from error


def digest(files: list[Path]) -> str:
    """Of names and sizes, in order."""
    listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    return f"{len(files)} {hashlib.sha256(listing.encode()).hexdigest()[:16]}"


def resume(out: Path, about: dict[str, str], learned: Learned, asked: int) -> None:
    """Takes over what the file `out` says, if there is one.

    Args:
        asked: layers that merge; in the file `left` of the layers after them repeats that of the last.

    Raises:
        ConfigError: the file is of another calibration, or not one of thresholds.
    """
    if not out.exists():
        return
    try:
        found, before = opened(out)
    except ValueError as error:
        raise ConfigError(f"{out} is not a file of thresholds ({error}); write to another one") from error
    different = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in about.items() if found.get(key) != value]
    rounds = before["left"].numel() if "left" in before else len(learned.merges)
    if different or rounds != len(learned.merges):
        raise ConfigError(
            f"{out} is of another calibration ({'; '.join(different) or 'other rounds'}); delete it or write to "
            "another file"
        )
    try:
        expect(out, before, ((name, (rounds,)) for name in ("thresholds", "left")))
        learned.batches = count(out, found, "batches")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    learned.thresholds = before["thresholds"].masked_fill(before["thresholds"] == NEVER, torch.nan)
    learned.left = before["left"]
    learned.left[asked:] = torch.nan
