"""Stages that store what they are told inside the LLM, and the stock model's own maps, which must agree."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import oracle
import tiny
import torch
from transformers import DynamicCache

from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens, keep_all, spec_of

ATTENTION = ("last_query_attention", "next_query_attention", "text_attention")
OTHER = (
    *("keys", "later_keys", "values", "later_values", "normed", "later_normed", "text", "later_text"),
    *("mean_cos", "mean_sin", "transition", "next_text_attention"),
)


LAYERS = (1, 3)


class Watcher(Compressor):
    """Keeps everything and stores what it was told. No paper."""

    site: ClassVar[Site] = "decoder"
    at: tuple[int, ...] = LAYERS
    asks: tuple[str, ...] = ATTENTION + OTHER
    seen: Any = None

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

    def needs(self) -> tuple[Fact, ...]:
        return tuple(map(Fact, self.asks))

    def query_tokens(self, tokens: VisualTokens) -> list[torch.Tensor]:
        return [every_other(len(text)) for text in tokens.fact("later_text")]

    def select(self, tokens: VisualTokens) -> Keep:
        self.seen[tokens.layer] = tokens
        return keep_all(tokens)


class First(Compressor):
    """Before layer `at`, drops the first half of every image. No paper."""

    site: ClassVar[Site] = "decoder"
    at: int = 3

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.at,)

    def select(self, tokens: VisualTokens) -> Keep:
        rows = torch.arange(len(tokens.x)).split(list(tokens.lengths))
        kept = [r[len(r) // 2 :] for r in rows]
        return Keep(torch.cat(kept), tuple(map(len, kept)))


def every_other(n):
    return torch.arange(0, n, 2)


def dense(model, batch):
    """Attention maps, keys, what enters every layer (`hidden`) and the positions that RoPE is made of, of the stock
    model in eager attention."""
    entering: list[torch.Tensor] = []
    turned: list[torch.Tensor] = []
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: entering.append(args[0]))
        for layer in model.get_decoder().layers
    ]
    for layer in model.get_decoder().layers:
        for block in (getattr(layer, "self_attn", None), getattr(layer, "mlp", None) or layer.feed_forward):
            hooks += [block.register_forward_hook(partial(block_of, blocks), with_kwargs=True)] if block else []
    turn = model.get_decoder().rotary_emb.register_forward_pre_hook(
        lambda m, args, kwargs: turned.append(kwargs.get("position_ids", args[1] if len(args) > 1 else None)),
        with_kwargs=True,
    )
    model.set_attn_implementation("eager")
    # A cache that is told nothing of windows holds all keys; of layers that keep a state it has to be told.
    config = model.config.get_text_config() if tiny.family(model).states else None
    with torch.no_grad():
        out = model(**batch, output_attentions=True, past_key_values=DynamicCache(config=config))
    model.set_attn_implementation("sdpa")
    for hook in [*hooks, turn]:
        hook.remove()
    out.hidden, out.positions, out.blocks = entering, turned[0], blocks
    return out


def block_of(blocks, module, args, kwargs, out):
    given = args[0] if args else kwargs["hidden_states"]
    blocks.append((given.double(), (out[0] if isinstance(out, tuple) else out).double()))


def transitions(given, out):
    """One row [N, D] each: |out| / |given|, times the share of exp(1 - cosine)."""
    cosine = (given * out).sum(-1) / given.norm(dim=-1) / out.norm(dim=-1)
    return out.norm(dim=-1) / given.norm(dim=-1) * (1 - cosine).softmax(-1)


def where(model, batch):
    """Per image its row, its columns without newlines, and the columns of its row's text in front of and behind it."""
    p = tiny.segments(model, batch)
    newline = tiny.family(model).breaks(batch["input_ids"]) | tiny.family(model).leads(batch["input_ids"])
    if hasattr(model.model, "image_newline"):
        newline = oracle.prompt(model, batch).newline
    visual = torch.zeros_like(newline)
    for s in p:
        visual[s.row, s.columns] = True
    text = batch["attention_mask"].bool() & ~visual
    for s in p:
        columns = s.columns[~newline[s.row, s.columns]]
        words = text[s.row].nonzero()[:, 0]
        yield s.row, columns, words, words[words > columns[-1]]


def expected(model, batch, out, k, tail=0):
    """Fact -> per image (text: as the fact) what a stage before layer k must be told."""
    want = {name: [] for name in ATTENTION + OTHER}
    normed = tiny.normed(model, out.hidden[k])
    keys = out.past_key_values.layers[k - 1].keys.transpose(1, 2).flatten(2)
    values = out.past_key_values.layers[k - 1].values.transpose(1, 2)
    # Every position axis turns every channel.
    angles = out.positions.double()[..., None] * model.get_decoder().rotary_emb.inv_freq.double()
    angles = angles if angles.ndim == 4 else angles[None]
    angles = angles.expand(-1, len(batch["input_ids"]), -1, -1)
    for row, columns, words, later in where(model, batch):
        last = batch["input_ids"].shape[1] - 1 - tail
        words, later = words[words <= last], later[later <= last]
        for name, layer in (("last_query_attention", k - 1), ("next_query_attention", k)):
            want[name].append(out.attentions[layer][row, :, last].mean(0)[columns])
        rows = out.attentions[k - 1][row][:, later[every_other(len(later))]]
        want["text_attention"].append(rows.mean((0, 1))[columns] if rows.shape[1] else torch.zeros(len(columns)))
        want["keys"].append(keys[row, columns])
        want["later_keys"].append(keys[row, later])
        rows = out.attentions[k][row][:, later]
        want["next_text_attention"].append(rows.mean((0, 1))[columns] if rows.shape[1] else torch.zeros(len(columns)))
        real = batch["attention_mask"][row].bool() & (torch.arange(len(batch["input_ids"][row])) <= last)
        found = torch.zeros(len(real), dtype=torch.float64)
        for given, returned in out.blocks[2 * (k - 1) : 2 * k]:
            found[real] += transitions(given[row, real], returned[row, real])
        want["transition"].append(found[columns].float())
        want["values"].append(values[row, columns])
        want["later_values"].append(values[row, later])
        for name, function in (("mean_cos", torch.cos), ("mean_sin", torch.sin)):
            want[name].append(function(angles[:, row, columns]).mean((0, 2)).float())
        want["normed"].append(normed[row, columns])
        want["later_normed"].append(normed[row, later])
        want["later_text"].append(out.hidden[k][row, later])
        want["text"].append(out.hidden[k][row, words])
    return want


def held_against(tokens, want):
    for name, values in want.items():
        got = tokens.fact(name)
        spec = spec_of(name, "decoder")
        if spec.per == "row":
            got = [got[row] for row in tokens.row]
        elif spec.per == "token":
            got = got.split(list(tokens.lengths))
        for a, b in zip(got, values, strict=True):
            atol = 1e-5 if spec.queries else 2e-4
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
