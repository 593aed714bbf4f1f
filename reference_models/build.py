"""What the reference models share: words, chat template, and the shapes of tower and decoder."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from .dialogue import VOCABULARY
from .pictures import PATCH

WIDTH = 128
DECODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 320,
    "num_attention_heads": 2,  # heads of 64: content look-ups over many positions need the width
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": VOCABULARY["<pad>"],
    "bos_token_id": VOCABULARY["<bos>"],
    "eos_token_id": VOCABULARY["<eos>"],
}


def chat_template(image: str, video: str = "") -> str:
    """The template, with what stands for a picture and, in models that take any, for a video."""
    other = "{% elif part['type'] == 'video' %}{{ '" + video + " ' }}" if video else ""
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '"
        + image
        + " ' }}"
        + other
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}{{ "
        "message['content'][0]['text'] }}{% endif %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def clip(size: int) -> CLIPVisionConfig:
    """The tower with CLS, for pictures of `size` pixels."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=size,
        patch_size=PATCH,
    )


def llama(layers: int = 4) -> LlamaConfig:
    """The decoder."""
    return LlamaConfig(
        **DECODER,
        num_hidden_layers=layers,
        vocab_size=len(VOCABULARY),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per word, punctuation on its own, <bos> in front; `extra` special tokens follow the vocabulary."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1024,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>", *extra]})
    return fast


@torch.no_grad()
def inherit(model: Any, source: Any) -> None:
    """Copy words and decoder of `source`; layers that `model` has more come first and begin as the identity."""
    own, other = model.model.language_model, source.model.language_model
    fresh = len(own.layers) - len(other.layers)
    for layer in own.layers[:fresh]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    for layer, taken in zip(own.layers[fresh:], other.layers, strict=True):
        # biases that only this decoder has stay at zero
        layer.load_state_dict(taken.state_dict(), strict=False)
    own.norm.load_state_dict(other.norm.state_dict())
    for table, words in ((own.embed_tokens, other.embed_tokens), (model.lm_head, source.lm_head)):
        table.weight[: len(words.weight)] = words.weight
