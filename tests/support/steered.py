"""The definition of steered attention: the unwrapped model on the kept tokens, everything recomputed at every step, with
attention weights written out and changed by a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import oracle
import torch
from modes import masks
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

NAME = "known_steering"


@dataclass
class Row:
    """One row of a prompt while the oracle runs it.

    Attributes:
        visual, behind, told: layer -> [N] of the prompt's tokens in it: which are visual, which are text behind a picture,
            and which were read with a picture, so that a stage was asked about them.
        pictures: whether it has any.
        entered: layer -> [N + generated, D] what entered it.
    """

    visual: dict[int, Tensor]
    behind: dict[int, Tensor]
    told: dict[int, Tensor]
    pictures: bool
    entered: dict[int, Tensor] = field(default_factory=dict)


# rule(weights [H, N, N] fp32, visual, behind, told [N] bool, what entered [N, D], layer) -> weights
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


@contextmanager
def ruled(model: Any, row: Row, rule: Rule) -> Iterator[None]:
    """The model's attention is written out and goes by the rule."""
    lm = model.get_decoder()

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        n, number = q.shape[2], module.layer_idx
        weights = (q @ k.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf).float().softmax(-1)[0]
        visual, behind, told = row.visual[number], row.behind[number], row.told[number]
        more = n - len(visual)
        behind = pad(behind, (0, more), value=row.pictures)
        weights = rule(weights, pad(visual, (0, more)), behind, pad(told, (0, more)), row.entered[number], number)
        return (weights.to(v.dtype) @ v[0]).transpose(0, 1)[None].contiguous(), None

    def look(number: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            row.entered[number] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook

    AttentionInterface.register(NAME, attend)
    hooks = [layer.register_forward_pre_hook(look(k), with_kwargs=True) for k, layer in enumerate(lm.layers)]
    before = lm.config._attn_implementation
    lm.config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        lm.config._attn_implementation_internal = before
        for hook in hooks:
            hook.remove()


def literal(
    model: Any, p: oracle.PrefillQK, stages: Sequence[Any], tokens: Tensor, rule: Rule, told: Tensor | None = None
) -> Tensor:
    """[n, B, V] logits while the model is made to say `tokens` [B, n], of the prompt p less what the stages dropped.

    Args:
        told: [B, L] columns that were read together with a picture; None: all of a row with one.
    """
    keep, inner = masks(p, [s for s in stages if s.site != "attention"] or stages)
    out = []
    for b in range(len(keep)):
        one = replace(
            p,
            embeds=p.embeds[b : b + 1],
            positions=p.positions[..., b : b + 1, :],
            mask=p.mask[b : b + 1],
            visual=p.visual[b : b + 1],
            deep=[d[b : b + 1] for d in p.deep],
        )
        shown = p.visual[b] & p.mask[b]
        late = (shown.cumsum(0) > 0) & ~p.visual[b] & ~p.newline[b]
        asked = torch.ones_like(shown) & shown.any() if told is None else told[b]
        visual, behind, known, stay = {}, {}, {}, keep[b] & p.mask[b]
        for k in range(len(model.get_decoder().layers)):
            stay = stay & inner[k][b] if k in inner else stay
            visual[k], behind[k], known[k] = p.visual[b, stay], late[stay], asked[stay]
        with ruled(model, Row(visual, behind, known, bool(shown.any())), rule):
            cuts = {k: x[b : b + 1] for k, x in inner.items()}
            out.append(
                oracle.generate(
                    model, one, keep[b : b + 1], tokens.shape[1], layer_keep=cuts, start=[tokens[b].tolist()]
                )[1]
            )
    return torch.cat(out, 1)


def amplified(gamma: float, layers: Sequence[int], heads: Sequence[tuple[int, int]] | None = None) -> Rule:
    """Weights of visual keys times gamma, then normalised."""

    def rule(weights: Tensor, visual: Tensor, behind: Tensor, told: Tensor, entered: Tensor, layer: int) -> Tensor:
        if layer not in layers:
            return weights
        more = torch.where(visual, gamma, 1.0) * weights
        more = more / more.sum(-1, keepdim=True)
        mine = torch.tensor([heads is None or (layer, h) in heads for h in range(len(weights))])
        return torch.where(mine[:, None, None] & behind[:, None], more, weights)

    return rule


def redistributed(tau: float, rho: float, summ: float, p: float, first: int) -> Rule:
    """Row by row, as VAR is defined on a map; how many rows were changed is counted in `rule.changed`."""

    def rule(weights: Tensor, visual: Tensor, behind: Tensor, told: Tensor, entered: Tensor, layer: int) -> Tensor:
        if layer < first:
            return weights
        size = (entered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        sink = ((entered.abs() / size).amax(-1) > tau) & told
        own, other, out = (visual & sink).nonzero()[:, 0], (visual & ~sink).nonzero()[:, 0], weights.clone()
        if not len(own):
            return weights
        for h in range(len(weights)):
            for i in behind.nonzero()[:, 0].tolist():
                w = weights[h, i]
                mass, share = float(w[visual].sum()), float(w[own].sum())
                if share <= 0 or share > rho * mass or mass < summ or not len(other):
                    continue
                freed = (1 - p) * w[sink].sum()
                out[h, i, sink] = p * w[sink]
                out[h, i, other] += freed * w[other] / w[other].sum()
                rule.changed += 1  # type: ignore[attr-defined]
        return out

    rule.changed = 0  # type: ignore[attr-defined]
    return rule


def salient(gamma: float, keep: int, measured: int) -> Rule:
    """The `keep` visual tokens of the only picture whose weight grows most while the text behind it is read."""
    chosen: dict[str, Tensor] = {}

    def rule(weights: Tensor, visual: Tensor, behind: Tensor, told: Tensor, entered: Tensor, layer: int) -> Tensor:
        if layer == measured:
            rows = weights.mean(0)[(behind & told).nonzero()[:, 0]]
            gains = [sum(max(0.0, float(b - a)) for a, b in pairwise(c)) for c in rows.T]
            best = sorted(visual.nonzero()[:, 0].tolist(), key=lambda j: -gains[j])[:keep]
            chosen["keys"] = torch.zeros_like(visual).index_fill(0, torch.tensor(best, dtype=torch.long), True)
        if layer <= measured:
            return weights
        return amplified(gamma, (layer,))(weights, chosen["keys"], behind, told, entered, layer)

    return rule
