"""`vtoken show`: what a pipeline keeps of pictures or a video, as one PNG."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from vtoken.errors import VtokenError
from vtoken.evals.shared.options import FRAMES, VIDEO

EXAMPLES = """examples:
  vtoken show tiny-llava fastervlm:32 picture.jpg
  vtoken show llava-hf/llava-1.5-7b-hf fastervlm:64 cat.jpg --question "What is on the table?"
  vtoken show llava-hf/llava-v1.6-vicuna-7b-hf fastervlm:640 cat.jpg     # two rasters: the whole, and the crops
  vtoken show Qwen/Qwen2.5-VL-3B-Instruct my-pipeline.yaml cat.jpg dog.jpg --out both.png
  vtoken show Qwen/Qwen2.5-VL-3B-Instruct 'uniform:{per_frame: 16}' clip.mp4 --frames 8   # needs PyAV
  vtoken show tiny-llava uniform:64 picture.jpg --json | jq '.stages[0].tokens_out'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs one prefill and draws pictures, or the frames of a video, as the model saw them: kept cells bordered,\n"
        "dropped cells grey, merged cells tinted. One PNG per call."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="shipped model, folder or hub id")
    parser.add_argument("pipeline", metavar="PIPELINE", help="preset, method:budget or YAML file")
    media = f"picture files of one prompt, or one video: {VIDEO}"
    parser.add_argument("media", type=Path, nargs="+", metavar="IMAGE", help=media)
    question = "for methods that read the prompt (default: %(default)s)"
    parser.add_argument("--question", default="Describe the image.", help=question)
    frames = "evenly spaced frames of a video (default: %(default)s)"
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=frames)
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG to write (default: IMAGE-PIPELINE.png here)")
    parser.add_argument("--json", action="store_true", help="print the trace as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the overlay."""
    import torch

    from vtoken.config import load
    from vtoken.evals.pictures.asked import prepare
    from vtoken.evals.pictures.traced import picture
    from vtoken.evals.shared.media import read
    from vtoken.evals.shared.models import load_pair
    from vtoken.session import match_processor, trace, watched

    pipeline = load(args.pipeline)
    if args.out and not args.out.absolute().parent.is_dir():
        raise VtokenError(f"no folder {str(args.out.parent)!r} to write {args.out.name} into")
    media = read(args.media, args.frames)
    model, processor = load_pair(args.model)
    with torch.inference_mode(), watched(model, pipeline):
        if pipeline.anyres != "model":
            match_processor(processor, model)
        inputs = prepare(processor, media, args.question, model)
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        seen = trace(model)

    kept, total = sum(seen.tokens_out), sum(seen.visual_tokens)
    caption = f"{pipeline.name}: {kept} of {total} visual tokens. {args.question}"
    name = re.sub(r"[^A-Za-z0-9._+]+", "-", pipeline.name).strip("-")
    out = args.out or Path(f"{args.media[0].stem}-{name}.png")
    try:
        picture(processor, inputs.get("pixel_values"), media, seen, caption).save(out, "PNG")
    except ValueError as error:
        raise VtokenError(f"cannot draw {args.media[0]}: {error}") from error
    if args.json:
        print(json.dumps({"file": str(out), **seen.to_dict()}))
        return 0
    print(f"wrote {out}: {kept} of {total} visual tokens kept")
    for name, why in seen.aside.items():
        print(f"{name} stood aside: {why}")
    if any(stage.site == "cache" and stage.stood_aside is None for stage in seen.stages):
        held = sorted({count for (count,) in seen.cached})
        many = " to ".join(map(str, {held[0]: 0, held[-1]: 0}))
        print(
            f"the KV cache holds {many} of {seen.prompt_tokens[0]} prompt tokens per layer and head; that is not drawn"
        )
    return 0
