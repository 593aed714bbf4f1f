"""Processors for the tiny models, without downloads: `save` writes a checkpoint folder as the hub has them, pictures
only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import transformers
from tiny_models import IMG, VID, VISION_END, VISION_START, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vtoken.evals.processors import pictures_only


def save(family: str, folder: Path) -> Path:
    """Model and processor of a family in a folder; `chat` templates put every picture where its message has it."""
    tiny.make(family).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def processor(family: str) -> Any:
    """The stock processor without its video half."""
    one = tiny.family(family)
    kind = pictures_only(getattr(transformers, f"{one.classes}Processor"))
    return one.processor(
        kind, tokenizer(*one.words), chat_template=_template(one.written or one.words[0], one.words[1], *one.around)
    )


def tokenizer(image: str, video: str) -> PreTrainedTokenizerFast:
    words = {f"w{k}": k for k in range(VOCAB)}
    special = {0: "<pad>", 1: "<bos>", 2: "<unk>", IMG: image, VID: video}
    special |= {VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
    for k, word in special.items():
        del words[f"w{k}"]
        words[word] = k
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(special.values())[3:],
    )


def _template(image: str, video: str, before: str, after: str) -> str:
    return (
        "{% for m in messages %}{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{before}{image}{after} "
        f"{{% elif c['type'] == 'video' %}}{before}{video}{after} "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
