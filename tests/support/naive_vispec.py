"""ViSpec's draft row by row and head by head, in float64, from its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Naive:
    """Logits of a draft with these weights for a tiny model."""

    def __init__(self, model: Any, tensors: dict[str, Tensor], theta: float) -> None:
        self.w = {name: value.double() for name, value in tensors.items()}
        self.head = model.get_output_embeddings().weight.detach().double()
        self.queries, self.heads, self.size = self.w["imadpt.q"].shape
        self.eps, self.theta = model.config.get_text_config().rms_norm_eps, theta

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = self.w[f"{name}.weight"] @ x
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def of_head(self, x: Tensor, head: int) -> Tensor:
        return x[head * self.size : (head + 1) * self.size]

    def attended(self, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """[D] of one query, key and value per head each: [size], lists of [D]."""
        out = []
        for head, query in enumerate(queries):
            scores = torch.stack([query @ self.of_head(k, head) for k in keys]) / self.size**0.5
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            out.append(sum(w * self.of_head(v, head) for w, v in zip(weights, values, strict=True)))
        return torch.cat(out)

    def adapted(self, picture: Sequence[Tensor]) -> list[Tensor]:
        keys = [self.linear("imadpt.k_proj", x) for x in picture]
        values = [self.linear("imadpt.v_proj", x) for x in picture]
        return [self.linear("imadpt.o_proj", self.attended(list(q), keys, values)) for q in self.w["imadpt.q"]]

    def row(self, embed: Tensor, hidden: Tensor, seen: Tensor) -> Tensor:
        return self.linear("fc", torch.cat([embed, self.linear("img_fc", torch.cat([hidden, seen]))]))

    def turned(self, x: Tensor, place: int) -> Tensor:
        """RoPE: channel c and the one half a head behind it are turned by place / theta^(2 c / size)."""
        out, half = x.clone(), self.size // 2
        for head in range(self.heads):
            for c in range(half):
                angle = torch.tensor(place * self.theta ** (-2 * c / self.size), dtype=torch.float64)
                a, b = head * self.size + c, head * self.size + c + half
                out[a] = x[a] * angle.cos() - x[b] * angle.sin()
                out[b] = x[b] * angle.cos() + x[a] * angle.sin()
        return out

    def layer(self, rows: Sequence[tuple[Tensor, int]]) -> Tensor:
        """[D] of the last of these rows, given with their places."""
        at = "layers.0.self_attn"
        keys = [self.turned(self.linear(f"{at}.k_proj", x), place) for x, place in rows]
        values = [self.linear(f"{at}.v_proj", x) for x, _ in rows]
        x, place = rows[-1]
        query = self.turned(self.linear(f"{at}.q_proj", x), place)
        queries = [self.of_head(query, head) for head in range(self.heads)]
        x = x + self.linear(f"{at}.o_proj", self.attended(queries, keys, values))
        y = x / (x.pow(2).mean() + self.eps).sqrt() * self.w["layers.0.post_attention_layernorm.weight"]
        gate, up = self.linear("layers.0.mlp.gate_proj", y), self.linear("layers.0.mlp.up_proj", y)
        return x + self.linear("layers.0.mlp.down_proj", gate * gate.sigmoid() * up)

    def prompt(
        self,
        embeds: dict[int, Tensor],
        hidden: dict[int, Tensor],
        pictures: Sequence[Sequence[int]],
        token: Tensor,
        length: int,
    ) -> tuple[list[tuple[Tensor, int]], Tensor]:
        """The rows of a prompt of so many tokens, and the global vector behind it.

        Args:
            embeds: [D] of every place that entered the target; hidden: of every place that its last layer had.
            pictures: places of each, whether they entered or not.
            token: [D] embedding of the first token behind the prompt.
        """
        seen, rows = torch.zeros_like(token), []
        owner = {place: number for number, places in enumerate(pictures) for place in places}
        before: int | None = None  # the last place that the last layer had
        for place in range(length + 1):
            if place in owner:
                number = owner[place]
                if place == max(pictures[number]):
                    entered = [embeds[p] for p in sorted(pictures[number]) if p in embeds]
                    if entered:
                        *instead, seen = self.adapted(entered)
                        for number, x in enumerate(instead):
                            rows.append((x, max(0, place - len(instead) + number)))
            elif before is not None:
                rows.append((self.row(token if place == length else embeds[place], hidden[before], seen), before))
            if place in hidden:
                before = place
        return rows, seen
