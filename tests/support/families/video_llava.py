"""Video-LLaVA: CLIP over one crop per picture, and a second CLIP over frames, whose CLS tokens stand in the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from family import Draw, Family, Picture
from tiny_models import CLIP, IMG, SIZE, TOKENS, TOWERS, VID
from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaImageProcessor

# Up to 5.22 it has another name.
PIXELS = (
    "pixel_values"
    if "pixel_values" in inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
    else "pixel_values_images"
)


class Tiny(Family):
    classes = "VideoLlava"
    pixels = PIXELS
    image = other = odd = (SIZE, SIZE)
    video, other_video = (3,), (4,)
    pictures = ((56, 56, 1), (56, 56, 2), (56, 56, 5))
    equal_videos = frames_led = True
    shipped_picture = 16
    # As LLaVA-1.5 7B, whose decoder it has, and one tower more.
    checkpoints = {"LanguageBind/Video-LLaVA-7B-hf": 7366}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        more = {"image_seq_length": TOKENS, "image_token_index": IMG, "video_token_index": VID}
        return {"text_config": {"model_type": "llama", **text}, **TOWERS["clip"], **more}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        images = VideoLlavaImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        return kind(images, None, tokenizer, **CLIP, **options)  # its video half comes second

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return "img" if frames == 1 else ("video", frames)

    def sized(self, kind: str, given: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if kind == "img" and given else super().sized(kind, given)

    def tokens(self, picture: Picture) -> int:
        return TOKENS if picture.kind == "image" else picture.spec[0] * (TOKENS + 1)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        frames = [p.spec[0] for p in pictures if p.kind == "video"]
        if len(set(frames)) > 1:
            raise ValueError(
                f"videos of {sorted(set(frames))} frames in one batch: {self.name} takes videos of equal length only"
            )
        images, inputs = len(pictures) - len(frames), {}
        if images:
            inputs[self.pixels] = draw(images, 3, SIZE, SIZE)
        if frames:
            inputs["pixel_values_videos"] = draw(len(frames), frames[0], 3, SIZE, SIZE)
        return inputs

    def leads(self, ids: Tensor) -> Tensor:
        video = ids == VID
        return video & ((video.cumsum(1) - 1) % (TOKENS + 1) == 0)

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        images = [Picture("image", self.image)] * len(batch.get(self.pixels, ()))
        return images, [Picture("video", (len(v),)) for v in batch.get("pixel_values_videos", ())]
