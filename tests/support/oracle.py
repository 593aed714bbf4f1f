"""The definition that wrapped models are held against: per row, no cache, no hooks, everything recomputed over the kept
tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tiny
import torch
from torch import Tensor

Newlines = Literal["keep_if_row_has_token", "keep", "drop"]


@dataclass
class PrefillQK:
    """What the unwrapped model feeds its language model.

    Attributes:
        embeds: [B, L, D].
        positions: [B, L], or [3, B, L] with M-RoPE.
        mask: [B, L] bool, False for padding.
        visual: [B, L] bool, tokens of images and videos; newline tokens are not among them.
        newline: [B, L] bool, CLS tokens of frames among them.
        images: images and videos in reading order, with the columns of all their tokens, newline tokens included.
        deep: what DeepStack adds after decoder layer i, [B, L, D] each, 0 at text.
        blocks: [B, L] number of the image whose tokens see each other both ways, -1 elsewhere; None: none do.
        crop: tokens of one crop, for families with newline tokens, else 0.
        led: newlines stand in front of what they close.
    """

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    visual: Tensor
    newline: Tensor
    images: list[tiny.Segment]
    deep: list[Tensor]
    crop: int
    led: bool = False
    blocks: Tensor | None = None


@torch.no_grad()
def prompt(model: Any, batch: dict[str, Tensor]) -> PrefillQK:
    """Runs the prefill of the unwrapped model on a batch from `tiny.build` and records what enters the language
    model."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs if not seen else {})

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    model.generate(**{k: v.clone() for k, v in batch.items()}, max_new_tokens=1, do_sample=False)
    hook.remove()
    ids, embeds, positions = batch["input_ids"], seen["inputs_embeds"], seen["position_ids"]
    if positions.ndim == 3:
        positions = positions[-3:]  # a fourth axis in front numbers the tokens for the mask
    deep = []
    for features in seen.get("deepstack_visual_embeds") or []:
        deep.append(torch.zeros_like(embeds))
        deep[-1][seen["visual_pos_masks"]] = features
    visual = (ids == model.config.image_token_id) | (ids == getattr(model.config, "video_token_id", -1))
    newline, crop = tiny.family(model).breaks(ids) | tiny.family(model).leads(ids), 0
    visual |= newline
    if hasattr(model.model, "image_newline"):
        newline = visual & (embeds == model.model.image_newline).all(-1)
        vision = model.config.vision_config
        crop = (vision.image_size // vision.patch_size) ** 2
    images, blocks = tiny.segments(model, batch), None
    if tiny.family(model).both_ways:
        blocks = torch.full_like(ids, -1)
        for number, image in enumerate(images):
            blocks[image.row, image.columns] = number
    return PrefillQK(
        embeds=embeds,
        positions=positions.expand(*positions.shape[:-2], *ids.shape),
        mask=batch.get("attention_mask", torch.ones_like(ids)).bool(),
        visual=visual & ~newline,
        newline=newline,
        images=images,
        deep=deep,
        crop=crop,
        led=tiny.family(model).frames_led,
        blocks=blocks,
    )


def keep_mask(
    p: PrefillQK, kept: Sequence[Tensor], tokens: int | None = None, newlines: Newlines = "keep_if_row_has_token"
) -> Tensor:
    """[B, L] bool: text, and what stays of each image.

    Args:
        kept: per image in reading order, indices of the kept ones among its visual tokens, newline tokens not counted.
        tokens: visual tokens that every image must have, if they are to be equal.
        newlines: which newline tokens stay: those that close a row with a kept token, all, or none. The base crop of an
            anyres image has no newline; the only newline of a single crop or of a video closes all of it. A CLS token
            belongs to the frame behind it.
    """
    keep = p.mask.clone()
    for image, index in zip(p.images, kept, strict=True):
        newline = p.newline[image.row, image.columns]
        inside, ends = (~newline).nonzero()[:, 0], newline.nonzero()[:, 0].tolist()
        assert tokens in (None, len(inside)), f"an image of {len(inside)} tokens, not {tokens}"
        stay = torch.zeros_like(newline)
        stay[inside[index]] = True
        begin = p.crop if image.kind == "image" and ends and ends[0] > p.crop else 0
        for end, following in zip(ends, [*ends[1:], len(stay)], strict=False):
            row = stay[end + 1 : following] if p.led else stay[begin:end]
            stay[end] = newlines == "keep" or (newlines != "drop" and bool(row.any()))
            begin = end + 1
        keep[image.row, image.columns] = stay
    return keep


@torch.no_grad()
def logits(
    model: Any,
    x: Tensor,
    positions: Tensor,
    cuts: dict[int, Tensor] | None = None,
    compact: bool = False,
    deep: Sequence[Tensor] = (),
    mix: dict[int, Tensor] | None = None,
    blocks: Tensor | None = None,
    unseen: Tensor | None = None,
) -> Tensor:
    """One row [1, N, D] through the decoder, all layers causal over all that is left, or over a window of it.

    Args:
        positions: [1, N] or [3, 1, N].
        cuts: cuts[k] [N_k] bool drops tokens before layer k.
        compact: renumber the positions behind dropped tokens.
        deep: deep[k] [1, N, D] is added after layer k, less the tokens that were dropped.
        mix: mix[k] [N, N] is multiplied to what enters layer k, before the cut, and to what is to be added later.
        blocks: [N] tokens of the same number see each other both ways, -1 at others.
        unseen: [N, N] what attention does not see, before the last cut.
    """
    lm = model.get_decoder()
    of_layer: Tensor | None
    rope = ropes(lm, x, positions)
    for k, layer in enumerate(lm.layers):
        if mix and k in mix:
            x, deep = mix[k] @ x, [mix[k] @ d for d in deep]
        if cuts and k in cuts:
            stay = cuts[k]
            if compact:
                positions = positions - (~stay).cumsum(0)
            x, positions, deep = x[:, stay], positions[..., stay], [d[:, stay] for d in deep]
            blocks, rope = None if blocks is None else blocks[stay], ropes(lm, x, positions)
            unseen = None if unseen is None else unseen[stay][:, stay]
        # A layer that keeps a state sees what comes in, one token after the other: of one row nothing is masked.
        of_layer = seen(layer, x.shape[1], blocks)[None, None] if hasattr(layer, "self_attn") else None
        if of_layer is not None and unseen is not None:
            of_layer = of_layer & ~unseen
        if of_layer is not None and lm.config._attn_implementation == "eager":
            of_layer = torch.where(of_layer, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        x = layer(x, attention_mask=of_layer, position_embeddings=rope[k], position_ids=None, past_key_values=None)
        if k < len(deep):
            x = x + deep[k]
    return model.lm_head(tiny.normed(model, x))


def ropes(lm: Any, x: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """cos and sin for every layer; a family may turn layers of each kind in its own way."""
    if "layer_type" not in inspect.signature(lm.rotary_emb.forward).parameters:
        return [lm.rotary_emb(x, positions)] * len(lm.layers)
    kinds = {kind: lm.rotary_emb(x, positions, kind) for kind in set(lm.config.layer_types)}
    return [kinds[kind] for kind in lm.config.layer_types]


def seen(layer: Any, n: int, blocks: Tensor | None) -> Tensor:
    """[n, n] which tokens each token sees in this layer."""
    at = torch.arange(n)
    mask = at <= at[:, None]
    if blocks is not None:
        mask |= (blocks == blocks[:, None]) & (blocks >= 0)
    attention = layer.self_attn
    # Without kinds of layers, all of them slide.
    every = (
        None if getattr(attention.config, "layer_types", None) else getattr(attention.config, "sliding_window", None)
    )
    window = getattr(attention, "sliding_window", every)
    return mask if window is None else mask & (at > at[:, None] - window)


@torch.no_grad()
def generate(
    model: Any,
    p: PrefillQK,
    keep: Tensor,
    new_tokens: int,
    compact: bool = False,
    layer_keep: dict[int, Tensor] | None = None,
    start: Sequence[Sequence[int]] | None = None,
    layer_mix: dict[int, Tensor] | None = None,
    cleared: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding of the unwrapped model over the kept tokens.

    Args:
        keep: [B, L] tokens that enter the decoder; layer_keep[k]: [B, L] tokens that enter layer k.
        compact: renumber positions; not with M-RoPE.
        start: per row, tokens appended as if they had been generated (teacher forcing).
        layer_mix: layer_mix[k]: [B, L, L] what a layer's tokens are made of, before the cut of layer_keep[k]; see
            `means`.
        cleared: generated tokens see in no layer what the cut before this layer dropped.

    Returns:
        tokens [B, n] and logits [n, B, V].
    """
    assert not (compact and p.positions.ndim == 3), "M-RoPE positions cannot be renumbered"
    rows, scores = [], []
    for b in range(len(keep)):
        stay = keep[b] & p.mask[b]
        x, positions, last = p.embeds[b : b + 1, stay], p.positions[..., b : b + 1, stay], p.positions[..., b, -1].max()
        deep = [d[b : b + 1, stay] for d in p.deep]
        blocks = None if p.blocks is None else p.blocks[b, stay]
        if compact:
            gone = (p.mask[b] & ~stay).cumsum(0)
            positions, last = positions - gone[stay], last - gone[-1]
        inner = {k: m[b][stay] for k, m in (layer_keep or {}).items()}
        tokens, out = [], []
        for step in range(new_tokens):
            alive = torch.ones(int(stay.sum()) + step, dtype=torch.bool)
            cuts, mix, held = {}, {}, alive
            for k in sorted(inner):
                want = torch.cat([inner[k], torch.ones(step, dtype=torch.bool)])
                if layer_mix and k in layer_mix:
                    mix[k] = torch.block_diag(layer_mix[k][b][stay][:, stay], torch.eye(step))[held][:, held]
                cuts[k], held = want[held], want
            unseen = None
            if cleared is not None:
                left = torch.cat([inner[cleared], torch.ones(step, dtype=torch.bool)])
                unseen = (~left)[None] & (torch.arange(len(left)) >= len(left) - step)[:, None]
            score = logits(model, x, positions, cuts, compact, deep, mix, blocks, unseen)[0, -1]
            out.append(score)
            token = int(score.argmax()) if start is None else start[b][step]
            tokens.append(token)
            x = torch.cat([x, model.get_input_embeddings()(torch.tensor([[token]]))], 1)
            positions = torch.cat([positions, (last + 1 + step).expand(*positions.shape[:-1], 1)], -1)
            deep = [torch.cat([d, torch.zeros_like(d[:, :1])], 1) for d in deep]
            blocks = None if blocks is None else torch.cat([blocks, blocks.new_full((1,), -1)])
        rows.append(tokens)
        scores.append(torch.stack(out))
    return torch.tensor(rows), torch.stack(scores, 1)


def means(p: PrefillQK, kept: Sequence[Tensor], into: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """[B, L, L] what every token is made of when each kept visual token becomes the plain mean of those it takes in.

    Args:
        kept, into: of every image, as in the trace.
        before: of every image, its tokens that were alive until then.
    """
    batch, length = p.mask.shape
    out = torch.eye(length).repeat(batch, 1, 1)
    for image, stay, home, alive in zip(p.images, kept, into, before, strict=True):
        at = image.columns[~p.newline[image.row, image.columns]]
        for k in stay.tolist():
            members = alive[home[alive] == k]
            out[image.row, at[k]] = 0
            out[image.row, at[k], at[members]] = 1 / len(members)
    return out
