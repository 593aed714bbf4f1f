"""Trained weights of a draft: where they are, whether they fit a target, and the module that they make.

Names and shapes are those of the state dict of the authors' module, which their code saves and loads unchanged. They
were compared once with that module on random weights, and never with the published files.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters.base import Adapter
from vtoken.compressors._files import existing, expect, opened
from vtoken.config.beside import is_repository
from vtoken.drafters.vispec import Sizes, ViSpec
from vtoken.errors import ConfigError, UnsupportedError, shown, warn
from vtoken.hooks.call.pairing import check_states
from vtoken.hooks.call.vocabularies import words

FILE = "model.safetensors"
EVERY = 61  # one row of the embeddings in so many is compared


def found(weights: str | os.PathLike[str]) -> Path:
    """The file that `weights` names: a file, a folder with one, or a repository on the Hub, downloaded once.

    Raises:
        ConfigError: there is none, it may not be read, or the Hub does not give it.
    """
    text = os.fspath(weights)
    if os.path.isdir(text):
        path = Path(text, FILE)
    elif is_repository(text) and not os.path.isfile(text):
        path = on_hub(text)
    else:
        path = Path(text)
    try:
        return existing(path, str(path), f"name a safetensors file, a folder with a {FILE}, or a repository of the Hub")
    except ValueError as error:
        raise ConfigError(f"weights of a draft: {error}") from None


def on_hub(text: str) -> Path:
    """The file of the repository owner/name or owner/name@revision."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = text.partition("@")
    try:
        return Path(hf_hub_download(repository, FILE, revision=revision or None))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"cannot read {FILE} of {shown(text)} from the Hub: {type(error).__name__}: {reason}; check its name, "
            "`hf auth login` and the network (weights in other formats are not read)"
        ) from error


@torch.inference_mode(False)
def load(weights: str | os.PathLike[str], adapter: Adapter) -> ViSpec:
    """The module that drafts for a model, on the device of the model's head and in the model's dtype.

    Raises:
        ConfigError: the file does not read; a tensor is missing, unknown, of another shape or not of finite floats.
        UnsupportedError: no such draft can serve this target, or the weights are for a target of another size.
    """
    check_target(adapter)
    path = found(weights)
    try:
        # `expect` refuses mixed dtypes; a file may have them, as all become the model's.
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in opened(path)[1].items()}
        sizes = sizes_of(path, tensors, adapter)
        expect(path, tensors, sizes.shapes())
    except ValueError as error:
        raise ConfigError(f"weights of a draft: {error}") from None
    model, config = adapter.model, adapter.lm.config
    _compare(path, tensors.pop("embed_tokens.weight"), model.get_input_embeddings())
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    with torch.device("meta"):
        module = ViSpec(sizes, model, eps=config.rms_norm_eps, theta=theta)
    module.load_state_dict(tensors, assign=True)
    head = model.get_output_embeddings().weight
    return module.to(head.device, model.dtype).eval().requires_grad_(False)


def check_target(adapter: Adapter) -> None:
    """Refuses targets that cannot give a draft what it was trained to read, or whose embeddings or head are offloaded.

    Raises:
        UnsupportedError: says why.
    """
    check_states(adapter)
    if "deepstack_visual_embeds" in inspect.signature(adapter.lm.forward).parameters:
        raise UnsupportedError(
            f"{adapter.model_type} adds features of pictures inside its decoder (DeepStack), so the embeddings that "
            "enter it are not all that it sees, and a draft that reads these alone is not made for it; take "
            "vtoken.draft(model, small) or vtoken.draft(model)"
        )
    ends = (adapter.model.get_input_embeddings(), adapter.model.get_output_embeddings())
    if any(module.weight.device.type == "meta" for module in ends):
        raise UnsupportedError(
            "a draft uses the embeddings and the head of its target, and this one's are offloaded; load the model on a "
            "device"
        )


def sizes_of(path: Path, tensors: dict[str, Tensor], adapter: Adapter) -> Sizes:
    """The sizes that the tensors must have. Channels of the MLP, number of queries and bias are read off the tensors;
    the rest is the target's.

    Raises:
        UnsupportedError: the tensors are for a target of another size.
    """
    config = adapter.lm.config
    width, heads, size = config.hidden_size, config.num_attention_heads, words(adapter.model)
    q, embed = tensors.get("imadpt.q"), tensors.get("embed_tokens.weight")
    if q is not None and embed is not None and q.ndim == 3 and embed.ndim == 2:
        theirs = (embed.shape[1], q.shape[1], embed.shape[0])
        if theirs != (width, heads, size):
            has = "{} channels, {} heads and {} words".format
            raise UnsupportedError(
                f"{path} was trained for a model of {has(*theirs)}, and this {adapter.model_type} has "
                f"{has(width, heads, size)}; take the weights that were published for its checkpoint"
            )
    gate = tensors.get("layers.0.mlp.gate_proj.weight")
    return Sizes(
        width,
        heads,
        size,
        inner=config.intermediate_size if gate is None else len(gate),
        queries=2 if q is None else len(q),
        bias="layers.0.self_attn.q_proj.bias" in tensors,
    )


def _compare(path: Path, theirs: Tensor, embedding: Any) -> None:
    """Warns of weights that were trained for another checkpoint of the same size."""
    mine = embedding.weight[::EVERY].detach().float().cpu()
    if not torch.allclose(mine, theirs[::EVERY].float(), rtol=1e-2, atol=1e-6):
        warn(
            f"the embeddings in {path} are not this model's: it was trained for another checkpoint, or the model was "
            "trained further. Answers are the model's all the same, but fewer drafts will be right"
        )
