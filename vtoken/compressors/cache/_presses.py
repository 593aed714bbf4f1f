"""Runs kvpress on one layer of one row: its presses by name, and an attention module in the form that they expect."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vtoken.stages.cache import CachedLayer, Native, norm_of

HELP = "pip install 'cachetools<6' datasets 'fire<0.7' requests, then pip install --no-deps kvpress==0.5.5"
MASKING = ("AdaKVPress", "CriticalAdaKVPress", "DMSPress", "DuoAttentionPress", "LUKVPress")
MASKS = "keeps different numbers of tokens in every head, which kvpress only masks: nothing would be saved"
REASONS = dict.fromkeys(MASKING, MASKS) | {
    "KeyRerotationPress": "renumbers the kept tokens, while generation goes on from their original positions",
    "ObservedAttentionPress": "reads attention maps, which are not computed here; SnapKVPress and TOVAPress compute "
    "what they need",
}


def package() -> Any:
    """The kvpress package.

    Raises:
        ImportError: it is not installed, or cannot be imported; says what to do.
    """
    try:
        return import_module("kvpress")
    except ImportError as error:
        raise ImportError(f"stage kvpress needs the kvpress package ({error}): {HELP}") from error


def press(name: str, options: Mapping[str, Any]) -> Any:
    """A press by the name of its class. Options of the form {SomePress: {...}} are presses themselves, also inside
    lists.

    Raises:
        ValueError: there is no such press, or it does not take these options.
    """
    cls = getattr(package(), name, None)
    if not (isinstance(cls, type) and issubclass(cls, package().BasePress)):
        known = sorted(n for n in package().__all__ if n.endswith("Press"))
        raise ValueError(f"kvpress has no press {name!r}; it has {', '.join(known)}")
    try:
        return cls(**{key: _nested(value) for key, value in options.items()})
    except (AssertionError, TypeError) as error:
        raise ValueError(f"{name} does not take the options {dict(options)}: {error}") from error


def _nested(value: Any) -> Any:
    if isinstance(value, list):
        return [_nested(each) for each in value]
    if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), dict):
        return press(next(iter(value)), inner)
    return value


def check(built: Any, text: bool) -> None:
    """Refuses presses that cannot run at the end of a prefill, or cannot be restricted to visual tokens.

    Raises:
        ValueError: says which and why.
    """
    kvpress = package()
    for each in _within(built):
        name, cls = type(each).__name__, type(each)
        reason = next((REASONS[c.__name__] for c in cls.__mro__ if c.__name__ in REASONS), None)
        own_hook = cls.forward_hook is not kvpress.BasePress.forward_hook
        if cls.__call__ is not kvpress.BasePress.__call__:
            reason = "acts while decoding or needs several passes over the prompt"
        elif own_hook and not isinstance(each, (kvpress.ComposedPress, kvpress.PerLayerCompressionPress)):
            reason = reason or "hooks into the model in a way of its own"
        if reason is not None:
            raise ValueError(f"{name} {reason}; take another press")
    if not text and getattr(type(built), "compress", None) is not kvpress.ScorerPress.compress:
        raise ValueError(
            f"{type(built).__name__} does more than score tokens, so that text cannot be kept out of it; set text: true"
        )


def _within(built: Any) -> Iterator[Any]:
    """The press and all presses nested in it."""
    yield built
    for field in fields(built) if is_dataclass(built) else ():
        value = getattr(built, field.name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, package().BasePress):
                yield from _within(each)


class _Attention:
    """The attention module of a layer as kvpress expects it: with the model's RoPE, and with q and k norms applied
    inside the projections."""

    def __init__(self, native: Native) -> None:
        vars(self).update(native=native)

    def __getattr__(self, name: str) -> Any:
        module = self.native.module
        if name == "rotary_emb":
            return self._rotary()
        projection = getattr(module, name)
        if name == "q_proj" and projection.out_features != module.config.num_attention_heads * module.head_dim:
            raise ValueError(
                f"this press computes queries itself, and q_proj of {type(module).__name__} gives a gate with them; "
                "take a press that reads keys alone, such as KnormPress or KeyDiffPress"
            )
        if name == "q_proj" and not (self.native.rope[0].shape[-1] == module.head_dim and _by_halves(module)):
            raise ValueError(
                f"this press turns queries itself, by halves of a whole head, and {type(module).__name__} turns its "
                "own in another way; take a press that reads keys alone, such as KnormPress or KeyDiffPress"
            )
        norm = norm_of(module, name[0]) if name in ("q_proj", "k_proj") else None
        if norm is None:
            return projection
        return lambda x: norm(projection(x).unflatten(-1, (-1, module.head_dim))).flatten(-2)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "masked_key_indices" and value is not None:
            raise ValueError(f"this press {MASKS}; take another press")
        vars(self)[name] = value

    def _rotary(self) -> Any:
        """The model's RoPE, for presses that number tokens themselves."""
        cos, rotary = self.native.rope[0], self.native.rotary
        ids = torch.arange(cos.shape[-2], device=cos.device)[None]
        if rotary is None or not torch.equal(rotary(self.native.hidden, ids)[0], cos):
            raise ValueError(
                "this press numbers tokens from 0 on, but the positions of this prompt are others (M-RoPE, dropped "
                "tokens, or an earlier turn); take a press that reads positions off the keys, such as SnapKVPress or "
                "KnormPress"
            )
        return rotary


def _by_halves(module: Any) -> bool:
    """Whether RoPE of an attention module pairs channels of the two halves of a head."""
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    return rotate is None or rotate(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]


def seen(layer: CachedLayer) -> tuple[Any, dict[str, Any]]:
    """Module and keyword arguments as in a forward of this layer on this row only; its cache holds only this row."""
    native = layer.native
    assert native is not None
    cached = SimpleNamespace(keys=layer.keys[None], values=layer.values[None])
    return _Attention(native), {
        "hidden_states": native.hidden,
        "position_embeddings": native.rope,
        "past_key_values": SimpleNamespace(layers={layer.layer: cached}),
        "cache_position": torch.arange(layer.keys.shape[1], device=layer.keys.device),
    }


def scores(built: Any, layer: CachedLayer) -> Tensor:
    """[Hk, N] scores of a ScorerPress."""
    module, kwargs = seen(layer)
    found = built.score(module, kwargs["hidden_states"], layer.keys[None], layer.values[None], None, kwargs)
    return found[0]


def compressed(built: Any, layer: CachedLayer) -> tuple[Tensor, Tensor]:
    """Keys and values [Hk, C, d] that the press leaves."""
    module, kwargs = seen(layer)
    built.forward_hook(module, [], kwargs, [None, None])
    cached = kwargs["past_key_values"].layers[layer.layer]
    return cached.keys[0], cached.values[0]
