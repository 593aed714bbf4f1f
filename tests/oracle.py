"""The definition that wrapped models are held against: per row, no cache, no hooks, everything recomputed over the kept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Prompt:
    """What the unwrapped model feeds its language model."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    visual: Tensor


@torch.no_grad()
def prompt(model: Any, batch: dict[str, Tensor]) -> Prompt:
    """Runs the unwrapped model's prefill and records what enters the language model."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        seen.update({k: v for k, v in kwargs.items() if k in ("inputs_embeds", "position_ids")} if not seen else {})

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    model.generate(**{k: v.clone() for k, v in batch.items()}, max_new_tokens=1, do_sample=False)
    hook.remove()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    positions = seen["position_ids"].expand(len(mask), -1)
    visual = batch["input_ids"] == model.config.image_token_id
    return Prompt(seen["inputs_embeds"], positions, mask, visual)


def keep_mask(p: Prompt, kept: Sequence[Tensor], tokens: int) -> Tensor:
    """[B, L]: text, and of each image (of `tokens` tokens, in reading order) the kept ones."""
    keep = p.mask.clone()
    keep[p.visual] = False
    line, column = p.visual.nonzero(as_tuple=True)
    for i, index in enumerate(kept):
        at = i * tokens + index
        keep[line[at], column[at]] = True
    return keep


@torch.no_grad()
def logits(
    model: Any, x: Tensor, positions: Tensor, cuts: dict[int, Tensor] | None = None, compact: bool = False
) -> Tensor:
    """One row [1, N, D] through the decoder, all layers dense causal; `cuts[k]` [N_k] bool drops tokens before layer k."""
    lm = model.model.language_model
    rope = lm.rotary_emb(x, positions)
    for k, layer in enumerate(lm.layers):
        if cuts and k in cuts:
            stay = cuts[k]
            if compact:
                positions = positions - (~stay).cumsum(0)[None]
            x, positions = x[:, stay], positions[:, stay]
            rope = lm.rotary_emb(x, positions)
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if lm.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None, past_key_values=None)
    return model.lm_head(lm.norm(x))


@torch.no_grad()
def generate(
    model: Any,
    p: Prompt,
    keep: Tensor,
    new_tokens: int,
    compact: bool = False,
    layer_keep: dict[int, Tensor] | None = None,
    start: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding of the unwrapped model over the kept tokens.

    Args:
        keep: [B, L] tokens that enter the decoder; layer_keep[k]: [B, L] tokens that enter layer k.
        start: per row, tokens appended as if they had been generated (teacher forcing).

    Returns:
        tokens [B, n] and logits [n, B, V].
    """
    rows, scores = [], []
    for b in range(len(keep)):
        stay = keep[b] & p.mask[b]
        x, positions, last = p.embeds[b : b + 1, stay], p.positions[b : b + 1, stay], p.positions[b, -1]
        if compact:
            gone = (p.mask[b] & ~stay).cumsum(0)
            positions, last = positions - gone[stay], last - gone[-1]
        inner = {k: m[b][stay] for k, m in (layer_keep or {}).items()}
        tokens, out = [], []
        for step in range(new_tokens):
            alive = torch.ones(int(stay.sum()) + step, dtype=torch.bool)
            cuts, held = {}, alive
            for k in sorted(inner):
                want = torch.cat([inner[k], torch.ones(step, dtype=torch.bool)])
                cuts[k], held = want[held], want
            score = logits(model, x, positions, cuts, compact)[0, -1]
            out.append(score)
            token = int(score.argmax()) if start is None else start[b][step]
            tokens.append(token)
            x = torch.cat([x, model.get_input_embeddings()(torch.tensor([[token]]))], 1)
            positions = torch.cat([positions, (last + 1 + step).view(1, 1)], 1)
        rows.append(tokens)
        scores.append(torch.stack(out))
    return torch.tensor(rows), torch.stack(scores, 1)
