"""`vtoken show`: what a pipeline keeps of pictures or a video, as one PNG."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vtoken.errors import VtokenError
from vtoken.evals.shared.options import FRAMES, VIDEO, Options, argument, as_json, option

DESCRIPTION = """\
Runs one prefill and draws pictures, or the frames of a video, as the model saw them: kept cells bordered,
dropped cells grey, merged cells tinted. One PNG per call."""
EXAMPLES = """examples:
  vtoken show tiny-llava fastervlm:32 picture.jpg
  vtoken show llava-hf/llava-1.5-7b-hf fastervlm:64 cat.jpg --question "What is on the table?"
  vtoken show llava-hf/llava-v1.6-vicuna-7b-hf fastervlm:640 cat.jpg     # two rasters: the whole, and the crops
  vtoken show Qwen/Qwen2.5-VL-3B-Instruct my-pipeline.yaml cat.jpg dog.jpg --out both.png
  vtoken show Qwen/Qwen2.5-VL-3B-Instruct 'uniform:{per_frame: 16}' clip.mp4 --frames 8   # needs PyAV and torchvision
  vtoken show tiny-llava uniform:64 picture.jpg --json | jq '.stages[0].tokens_out'
"""


class Settings(Options):
    """What is drawn, and where to."""

    model: str = argument("MODEL", "shipped model, folder or hub id")
    pipeline: str = argument("PIPELINE", "preset, method:budget or YAML file")
    media: tuple[Path, ...] = argument("IMAGE", f"picture files of one prompt, or one video: {VIDEO}")
    question: str = option("Describe the image.", "for methods that read the prompt", "QUESTION")
    frames: int = option(FRAMES, "evenly spaced frames of a video", ge=1)
    out: Path | None = option(None, "PNG to write (default: IMAGE-PIPELINE.png here)")
    in_json: bool = as_json("print the trace as one JSON object")


def run(asked: Settings) -> None:
    """Writes the overlay."""
    import torch

    from vtoken.config import load
    from vtoken.evals.pictures.asked import prepare
    from vtoken.evals.pictures.traced import picture
    from vtoken.evals.shared.media import read
    from vtoken.evals.shared.models import load_pair
    from vtoken.evals.shared.whole import check_folder
    from vtoken.hooks.state.run import pixels_of
    from vtoken.session import match_processor, trace, watched

    pipeline = load(asked.pipeline)
    check_folder(asked.out)
    media = read(asked.media, asked.frames)
    model, processor = load_pair(asked.model)
    with torch.inference_mode(), watched(model, pipeline):
        if pipeline.anyres != "model":
            match_processor(processor, model)
        inputs = prepare(processor, media, asked.question, model)
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        seen = trace(model)

    kept, total = sum(seen.tokens_out), sum(seen.visual_tokens)
    caption = f"{pipeline.name}: {kept} of {total} visual tokens. {asked.question}"
    name = re.sub(r"[^A-Za-z0-9._+]+", "-", pipeline.name).strip("-")
    out = asked.out or Path(f"{asked.media[0].stem}-{name}.png")
    try:
        picture(processor, pixels_of("image", inputs), media, seen, caption).save(out, "PNG")
    except ValueError as error:
        raise VtokenError(f"cannot draw {asked.media[0]}: {error}") from error
    if asked.in_json:
        print(json.dumps({"file": str(out), **seen.to_dict()}))
        return
    print(f"wrote {out}: {kept} of {total} visual tokens kept")
    for name, why in seen.aside.items():
        print(f"{name} stood aside: {why}")
    if any(stage.site == "cache" and stage.stood_aside is None for stage in seen.stages):
        counts = sorted({count for (count,) in seen.cached})
        many = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        print(
            f"the KV cache holds {many} of {seen.prompt_tokens[0]} prompt tokens per layer and head; that is not drawn"
        )
