"""Processors for the tiny models, without downloads: `save` writes a checkpoint folder as the hub has them, pictures only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tiny_models import IMG, PINPOINTS, SIZE, TOKENS, VID, VISION_END, VISION_START, VOCAB, make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vtoken.evals.processors import pictures_only

NAMES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
}


def save(family: str, folder: Path) -> Path:
    """Model and processor of a family in a folder; `chat` templates put every picture where its message has it."""
    make(family).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def processor(family: str) -> Any:
    """The stock processor without its video half."""
    kind = pictures_only(getattr(transformers, f"{NAMES[family]}Processor"))
    qwen = family.startswith("qwen")
    image, video = ("<|image_pad|>", "<|video_pad|>") if qwen else ("<image>", "<video>")
    options: dict[str, Any] = {"chat_template": _template(image, video, qwen)}
    if qwen:
        limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        images = transformers.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=limits)
        return kind(images, _tokenizer(image, video), **options)
    if family == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=PINPOINTS
        )
        options |= {
            "num_image_tokens": TOKENS,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        }
        return kind(images, _tokenizer(image, video), **options)
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    images = (
        transformers.CLIPImageProcessorPil(**size)
        if family == "llava"
        else transformers.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS)
    )
    options |= {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return kind(images, _tokenizer(image, video), **options)


def _tokenizer(image: str, video: str) -> PreTrainedTokenizerFast:
    words = {f"w{k}": k for k in range(VOCAB)}
    special = {0: "<pad>", 1: "<bos>", 2: "<unk>", IMG: image, VID: video}
    special |= {VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
    for k, word in special.items():
        del words[f"w{k}"]
        words[word] = k
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(special.values())[3:],
    )


def _template(image: str, video: str, qwen: bool) -> str:
    before, after = ("<|vision_start|>", "<|vision_end|>") if qwen else ("", "")
    return (
        "{% for m in messages %}{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{before}{image}{after} "
        f"{{% elif c['type'] == 'video' %}}{before}{video}{after} "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
