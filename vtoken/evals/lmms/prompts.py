"""Chat messages with pictures and videos in them -> model inputs of a left-padded batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtoken.adapters.base import Adapter
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.cost.flops import picture_size
from vtoken.evals.processors import apply, check_video
from vtoken.evals.shared import media
from vtoken.evals.shared.options import Workload
from vtoken.hooks.state.run import KINDS, pixels_of

# What lmms-eval's Qwen classes set; Hugging Face's own processors say 3,136 to 1,003,520.
LMMS_EVAL_PIXELS = (256 * 28 * 28, 1605632)


@dataclass(frozen=True)
class Clip:
    """Frames of a video, RGB.

    Attributes:
        indices: which frames of the video they are.
        fps, total: frames per second and number of frames of the video.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    fps: float
    total: int

    @property
    def metadata(self) -> dict[str, Any]:
        """As video processors take it."""
        return {
            "fps": self.fps,
            "total_num_frames": self.total,
            "frames_indices": list(self.indices),
            "duration": self.total / self.fps,
        }


@dataclass(frozen=True)
class Prompt:
    """One request: messages as chat templates read them, and the media their placeholders stand for, in order."""

    messages: tuple[dict[str, Any], ...]
    images: tuple[Image.Image, ...] = ()
    clips: tuple[Clip, ...] = ()

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures, and frames of all videos."""
        return [*self.images, *(frame for clip in self.clips for frame in clip.frames)]

    @property
    def fingerprint(self) -> str | None:
        """sha256 over all pictures and frames in order, None without any: prompts that show the same have the same."""
        if not self.pictures:
            return None
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(repr(picture.size).encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()


def from_chat(messages: Sequence[Mapping[str, Any]], frames: int, system: str | None = None) -> Prompt:
    """Reads lmms-eval's chat messages: `{"role", "content": [{"type": "text", "text"} | {"type": "image" | "video",
    "url"}]}`.

    Args:
        frames: most frames of a video.
        system: system prompt, in place of one that the messages bring.
    """
    images: list[Image.Image] = []
    clips: list[Clip] = []
    read = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for message in messages:
        if message["role"] == "system" and system is not None:
            continue
        parts: list[dict[str, str]] = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            if kind not in ("image", "video"):
                raise UnsupportedError(f"this request has {kind}, which no supported family takes; leave its task out")
            if part.get("start_time") is not None or part.get("end_time") is not None:
                raise UnsupportedError(
                    "this request shows a part of a video, from start_time to end_time, which is not cut here; leave "
                    "its task out"
                )
            parts.append({"type": kind})
            shown = part["url"]
            if kind == "video":
                clips.append(clip(shown, frames))
            else:
                images.append(media.rgb(shown) if isinstance(shown, Image.Image) else media.still(Path(shown)))
        read.append({"role": message["role"], "content": parts})
    return Prompt(tuple(read), tuple(images), tuple(clips))


def clip(given: Any, frames: int) -> Clip:
    """At most `frames` evenly spaced frames of a video: a list of pictures, a folder, an animation, or a file that PyAV
    decodes.

    Pictures without a clock are taken as one frame per second.
    """
    if isinstance(given, (list, tuple)) and given and all(isinstance(each, Image.Image) for each in given):
        places = _places(len(given), frames)
        return Clip(tuple(media.rgb(given[k]) for k in places), tuple(places), 1.0, len(given))
    if isinstance(given, (list, tuple)) and len(given) == 1:
        return clip(given[0], frames)
    if not isinstance(given, (str, Path)):
        raise UnsupportedError(f"a video is a file, a folder or a list of pictures, not {type(given).__name__}")
    path, rate, total = Path(given), 1.0, 0

    def choose(count: int) -> list[int]:
        nonlocal total
        total = count
        return _places(total, frames)

    if os.path.isdir(path) or path.suffix.lower() in (".gif", ".webp"):
        pictures = media.film(path, choose)
    else:
        pictures, rate, _ = media.decoded(path, choose)
    return Clip(pictures, tuple(_places(total, frames)[: len(pictures)]), rate, total)


def _places(total: int, frames: int) -> list[int]:
    places: list[int] = np.linspace(0, total - 1, min(frames, total)).round().astype(int).tolist()
    return places


def limit_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Sets the fewest and most pixels of a picture, of a processor that resizes by area (Qwen)."""
    if least is None and most is None:
        return
    size = dict(processor.image_processor.size)
    if "longest_edge" not in size or "merge_size" not in vars(processor.image_processor):
        raise UnsupportedError(
            f"min_pixels and max_pixels: {type(processor).__name__} does not resize pictures by their area; leave "
            "them out"
        )
    least, most = least or size["shortest_edge"], most or size["longest_edge"]
    if not 0 < least <= most:
        raise ConfigError(f"min_pixels and max_pixels must be 0 < min <= max, not {least} and {most}")
    kind = type(processor.image_processor.size)  # A dict, or a class that transformers makes of one.
    processor.image_processor.size = kind(shortest_edge=least, longest_edge=most)


def pixels(processor: Any) -> dict[str, Any]:
    """What decides how many visual tokens a picture or video has, as the processor says it."""
    images = processor.image_processor
    sizes = {name: dict(value) for name in ("size", "crop_size") if (value := getattr(images, name, None))}
    video: Any = getattr(processor, "video_processor", None)
    if getattr(video, "size", None):
        sizes["video_size"] = dict(video.size)
    others = {name: getattr(images, name, None) for name in ("image_grid_pinpoints", "patch_size", "merge_size")}
    return {**sizes, **{name: value for name, value in others.items() if value}}


def workload(adapter: Adapter, prompt: Prompt, inputs: Any) -> Workload:
    """The prefill of a prompt, encoded as `inputs`, as the account takes it: with pictures as large as the first, and
    with tokens that are neither of pictures and videos nor newlines in them as text."""
    shown = [kind for kind in KINDS if kind in adapter.placeholders and pixels_of(kind, inputs) is not None]
    visual = sum(layout.length for kind in shown for layout in adapter.layouts(kind, inputs))
    grids = {"image_grid_thw": inputs["video_grid_thw"]} if "video_grid_thw" in inputs else {}
    size = picture_size(adapter.model.config, {**inputs, **grids})
    if size is None and prompt.pictures:
        size = prompt.pictures[0].height, prompt.pictures[0].width
    return Workload(
        images=max(1, len(prompt.images) + len(prompt.clips)),
        frames=len(prompt.clips[0].frames) if prompt.clips else 1,
        image_size=size,
        text_tokens=max(1, inputs["input_ids"].shape[1] - visual),
        new_tokens=1,
    )


def encode(processor: Any, prompts: Sequence[Prompt], model: Any) -> Any:
    """Model inputs of a batch, padded on the left, on the model's device, pixels in its dtype."""
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            "the processor has no chat template, so the model's prompt format is not known; use the checkpoint's chat "
            "or instruct version"
        )
    texts = [
        processor.apply_chat_template(list(p.messages), add_generation_prompt=True, tokenize=False) for p in prompts
    ]
    for prompt, text in zip(prompts, texts, strict=True):
        first = prompt.messages[0]
        if first["role"] == "system" and first["content"][0]["text"] not in text:
            raise ConfigError("the chat template leaves the system prompt out; leave the option out too")
    given: dict[str, Any] = {}
    # One list per prompt, since OneVision must know which pictures share one; prompts without any have no placeholder
    # either.
    if images := [list(p.images) for p in prompts if p.images]:
        given["images"] = images
    if clips := [clip for p in prompts for clip in p.clips]:
        check_video(processor)
        given["videos"] = [list(clip.frames) for clip in clips]
        given["video_metadata"] = [clip.metadata for clip in clips]
        given["do_sample_frames"] = False  # They were chosen already.
    start = processor.tokenizer.bos_token
    if start and texts[0].startswith(start):
        given["add_special_tokens"] = False  # The template wrote it.
    options: dict[str, Any] = {"text": texts, "padding": True, **given}
    try:
        return apply(processor, "these pictures", model, **options)
    except UnsupportedError:
        if not images or len(images) == len(prompts):
            raise
        # LFM2-VL's counts the pictures of prompts without any, too.
        return apply(processor, "these pictures", model, **{**options, "images": [list(p.images) for p in prompts]})
