"""`vtoken show`: what a pipeline keeps of one picture, as a PNG."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from vtoken.errors import VtokenError

EXAMPLES = """examples:
  vtoken show tiny-llava fastervlm:32 picture.jpg
  vtoken show llava-hf/llava-1.5-7b-hf fastervlm:64 cat.jpg --question "What is on the table?"
  vtoken show ./my-llava my-pipeline.yaml cat.jpg --out cat-kept.png
  vtoken show tiny-llava uniform:64 picture.jpg --json | jq '.stages[0].tokens_out'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs one prefill and draws the picture as the model saw it: kept cells bordered, dropped cells grey."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="shipped model, folder or hub id")
    parser.add_argument("pipeline", metavar="PIPELINE", help="preset, method:budget or YAML file")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="picture file")
    parser.add_argument(
        "--question", default="Describe the image.", help="for methods that read the prompt (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG to write (default: IMAGE-PIPELINE.png here)")
    parser.add_argument("--json", action="store_true", help="print the trace as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the overlay.

    Raises:
        VtokenError: no such model, pipeline or picture, or a grid that cannot be drawn on the picture.
    """
    import torch
    from PIL import Image, UnidentifiedImageError

    from vtoken.config import load
    from vtoken.evals.overlay import as_seen, overlay, owners, sheet
    from vtoken.wrap import trace, wrapped

    pipeline = load(args.pipeline)
    try:
        picture = Image.open(args.image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise VtokenError(f"cannot read picture {args.image}: {error}") from error
    model, processor = _load(args.model)
    inputs = processor(images=picture, text=_prompt(processor, args.question), return_tensors="pt").to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode(), wrapped(model, pipeline):
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        seen = trace(model)

    views = as_seen(processor, inputs.get("pixel_values"), picture)
    if len(views) != len(seen.grid):
        raise VtokenError(
            f"the model saw {len(views)} pictures but the trace has {len(seen.grid)} grids; cannot draw them"
        )
    kept, total = sum(seen.tokens_out), sum(seen.visual_tokens)
    caption = f"{pipeline.name}: {kept} of {total} visual tokens. {args.question}"
    try:
        drawn = [
            overlay(view, seen.kept[k], seen.grid[k], owners(seen, k), side=720, caption=caption if k == 0 else None)
            for k, view in enumerate(views)
        ]
    except ValueError as error:
        raise VtokenError(f"cannot draw {args.image}: {error}") from error
    out = args.out or Path(f"{args.image.stem}-{re.sub(r'[^A-Za-z0-9._+]+', '-', pipeline.name).strip('-')}.png")
    (drawn[0] if len(drawn) == 1 else sheet(drawn)).save(out, "PNG")
    if args.json:
        print(json.dumps({"file": str(out), **seen.to_dict()}))
    else:
        print(f"wrote {out}: {kept} of {total} visual tokens kept")
    return 0


def _load(name: str) -> tuple[Any, Any]:
    from vtoken.evals import models, reference

    if name in reference.names():
        return reference.load(name)
    model = models.load(name)
    from transformers import AutoProcessor

    try:
        return model, AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VtokenError(f"cannot load the processor of {name!r}: {reason}") from error


def _prompt(processor: Any, question: str) -> str:
    """The question behind the image placeholder; models without a chat template get it bare."""
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '<image>')}\n{question}"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
