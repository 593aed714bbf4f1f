"""Random weights of a trained draft, named as the published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def random(model: Any, *, queries: int = 2, bias: bool = False, seed: int = 0, inner: int = 24) -> dict[str, Tensor]:
    """Tensors that fit a model."""
    config = model.config.get_text_config()
    d, heads = config.hidden_size, config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        "layers.0.self_attn.q_proj.weight": (d, d),
        "layers.0.self_attn.k_proj.weight": (d, d),
        "layers.0.self_attn.v_proj.weight": (d, d),
        "layers.0.self_attn.o_proj.weight": (d, d),
        "layers.0.mlp.gate_proj.weight": (inner, d),
        "layers.0.mlp.up_proj.weight": (inner, d),
        "layers.0.mlp.down_proj.weight": (d, inner),
        "layers.0.post_attention_layernorm.weight": (d,),
        "fc.weight": (d, 2 * d),
        "fc.bias": (d,),
        "imadpt.q": (queries, heads, d // heads),
        "imadpt.k_proj.weight": (d, d),
        "imadpt.v_proj.weight": (d, d),
        "imadpt.o_proj.weight": (d, d),
        "img_fc.weight": (d, 2 * d),
        "img_fc.bias": (d,),
    }
    if bias:
        for name in ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"):
            shapes[f"{name}.bias"] = (d,)
        shapes |= {"imadpt.k_proj.bias": (d,), "imadpt.v_proj.bias": (d,)}
    draw = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=draw) * 0.12 for name, shape in shapes.items()}
    return {"embed_tokens.weight": model.get_input_embeddings().weight.detach().clone(), **made}


def copying(model: Any) -> dict[str, Tensor]:
    """Those of a draft that repeats the target: its layer adds nothing to the hidden state that it is given."""
    made = {name: torch.zeros_like(value) for name, value in random(model).items()}
    d = made["fc.bias"].shape[0]
    made["fc.weight"][:, d:] = torch.eye(d)
    made["img_fc.weight"][:, :d] = torch.eye(d)
    made["embed_tokens.weight"] = model.get_input_embeddings().weight.detach().clone()
    return made


def written(tensors: dict[str, Tensor], folder: Path) -> Path:
    """A folder as published."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder
