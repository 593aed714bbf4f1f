"""ViSpec: one trained decoder layer that drafts from its target's hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import GenerationConfig

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.read_prompt import ReadPrompt
from vtoken.stages import uploaded

GUESSES = 4  # the authors' tree of depth 3 is four tokens deep


class Sizes(NamedTuple):
    """`width` (D), `heads` and `words` are the target's. `inner`: channels of the MLP; `queries`: vectors that a
    picture becomes, the global one among them; `bias`: whether q, k and v have one."""

    width: int
    heads: int
    words: int
    inner: int
    queries: int
    bias: bool

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the published tensors, as the authors' module of these sizes has them."""
        d = self.width
        yield "embed_tokens.weight", (self.words, d)
        for name, parts in (("layers.0.self_attn", "qkvo"), ("imadpt", "kvo")):
            for part in parts:
                yield f"{name}.{part}_proj.weight", (d, d)
                if self.bias and part != "o":
                    yield f"{name}.{part}_proj.bias", (d,)
        yield "layers.0.mlp.gate_proj.weight", (self.inner, d)
        yield "layers.0.mlp.up_proj.weight", (self.inner, d)
        yield "layers.0.mlp.down_proj.weight", (d, self.inner)
        yield "layers.0.post_attention_layernorm.weight", (d,)
        yield "imadpt.q", (self.queries, self.heads, d // self.heads)
        for name in ("fc", "img_fc"):
            yield f"{name}.weight", (d, 2 * d)
            yield f"{name}.bias", (d,)


class ViSpec(nn.Module):
    """ViSpec (Kang et al., 2025). https://arxiv.org/abs/2509.15235

    A row of its layer is fc [e; img_fc [h; g]]: e embeds a token, h is the target's last hidden state of the token
    before, and g a global vector of the latest picture (0 before the first). `queries` learned queries attend to the
    embeddings with which a picture enters the target. The last of them gives g for the text after the picture; the
    others replace the picture's rows, at the last of their positions. The layer has no norm before its attention. What
    it returns goes to the target's head, and is h in the row of the token guessed from it. Positions count the tokens
    of the prompt as it was given, on one axis, also where the target's have three.

    `ChainGenerator` drives it, not transformers. It guesses chains; the authors verify trees of 30 tokens. Their code
    takes adjacent pictures for one, and puts the rows of several back by the lengths of the first; here each is read by
    itself. Their evaluation gives LLaVA-1.5 no pictures, though their training does; here it has them.

    Args:
        sizes: of the weights.
        target: drafted for. Its embeddings and head are used; the authors' files contain a frozen copy of the former.
        eps: of the norms of the target's decoder.
        theta: base of the RoPE of the target's decoder.
    """

    def __init__(self, sizes: Sizes, target: Any, *, eps: float, theta: float) -> None:
        super().__init__()
        d, self.heads, self.theta, self.config = sizes.width, sizes.heads, theta, target.config
        attention = {f"{part}_proj": nn.Linear(d, d, bias=sizes.bias and part != "o") for part in "qkvo"}
        mlp = {name: nn.Linear(d, sizes.inner, bias=False) for name in ("gate_proj", "up_proj")}
        layer = {
            "self_attn": nn.ModuleDict(attention),
            "mlp": nn.ModuleDict({**mlp, "down_proj": nn.Linear(sizes.inner, d, bias=False)}),
            "post_attention_layernorm": nn.RMSNorm(d, eps),
        }
        self.layers = nn.ModuleList([nn.ModuleDict(layer)])
        self.fc, self.img_fc = nn.Linear(2 * d, d), nn.Linear(2 * d, d)
        self.imadpt = Adaptor(sizes)
        self.generation_config = GenerationConfig(num_assistant_tokens=GUESSES)
        # In a tuple, so that they do not become submodules.
        self._of_target = (target.get_input_embeddings(), target.get_output_embeddings())

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, D] of ids [n]."""
        return self.here(self._of_target[0](tokens))

    def logits(self, out: Tensor) -> Tensor:
        """Logits [n, V] of what the layer returned [n, D]."""
        found: Tensor = self._of_target[1](out)
        return found

    def here(self, x: Tensor) -> Tensor:
        return x.to(self.fc.weight)

    def rows(self, embeds: Tensor, hidden: Tensor, seen: Tensor) -> Tensor:
        """Rows [n, D] of text, from embeddings, hidden states and global vectors, [n, D] each."""
        mixed = self.img_fc(torch.cat([hidden, seen], dim=-1))
        out: Tensor = self.fc(torch.cat([embeds, mixed], dim=-1))
        return out

    def chain(self) -> ViSpecChain:
        return ViSpecChain(self)

    def _supports_logits_to_keep(self) -> bool:
        """A model that is not the target asks this of any assistant before `generate` can refuse."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "this draft reads the hidden states of the target that it was made for, and that is another one or was "
            "unwrapped since; call vtoken.draft(target, weights)"
        )


class Adaptor(nn.Module):
    """Learned queries that attend to the embeddings of a picture."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d = sizes.width
        self.q = nn.Parameter(torch.empty(sizes.queries, sizes.heads, d // sizes.heads))
        self.k_proj, self.v_proj = nn.Linear(d, d, bias=sizes.bias), nn.Linear(d, d, bias=sizes.bias)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the queries read, [queries, D], in embeddings [N, D]."""
        k, v = (split(each(x), self.q.shape[1]) for each in (self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(attend(self.q.transpose(0, 1), k, v))
        return out


class ViSpecChain:
    """A `Chain`: what one `generate` keeps. A row is sure if its hidden state is the target's; rows of guesses follow.

    Attributes:
        sure: how many rows are sure.
        end: place of the next row that will be sure.
        seen: [1, D] global vector of the last picture of the prompt; 0 without pictures.
        k, v: [H, n, d] keys and values of all rows, the keys with RoPE.
        out: [1, D] what the layer returned for the last row.
    """

    def __init__(self, module: ViSpec) -> None:
        self.module, self.sure, self.end = module, 0, 0
        self.seen = module.fc.weight.new_zeros(1, module.fc.out_features)
        self.k = self.v = self.seen.new_zeros(module.heads, 0, module.fc.out_features // module.heads)

    def read(self, prompt: ReadPrompt, token: Tensor) -> Tensor:
        """Logits [V] after the prompt and the first token [1] of the answer."""
        module, place = self.module, prompt.places.to(self.module.device)
        embeds = torch.cat([module.here(prompt.embeds), module.embed(token)])[1:]
        follows = torch.cat([place, place.new_tensor([prompt.length])])[1:]
        text = torch.cat([~prompt.visual[1:], prompt.visual.new_ones(1)]).nonzero()[:, 0].to(place.device)
        read = [module.imadpt(module.here(each.embeds)) for each in prompt.pictures]
        lasts = place.new_tensor([each.last for each in prompt.pictures])
        known = torch.cat([self.seen, *(each[-1:] for each in read)])
        self.seen = known[-1:]
        seen = known[(follows[text, None] > lasts).sum(1)]
        rows = [module.rows(embeds[text], module.here(prompt.hidden)[text], seen), *(each[:-1] for each in read)]
        # A row stands where the token does whose hidden state it has; its order is that of the token after.
        back = torch.arange(-module.imadpt.q.shape[0] + 1, 0, device=place.device)
        order = torch.cat([follows[text], lasts.repeat_interleave(len(back))]).argsort(stable=True)
        places = torch.cat([place[text], (lasts[:, None] + back).clamp(min=0).flatten()])
        self.end = prompt.length
        return self._sure(torch.cat(rows)[order], places[order])

    def verified(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits [V] after tokens [n] of the target, given the hidden state [n, D] before each; drops all guesses."""
        self.k, self.v = self.k[:, : self.sure], self.v[:, : self.sure]
        embeds = self.module.embed(tokens)
        rows = self.module.rows(embeds, self.module.here(hidden), self.seen.expand_as(embeds))
        places = torch.arange(self.end, self.end + len(rows), device=rows.device)
        self.end += len(rows)
        return self._sure(rows, places)

    def ahead(self, token: Tensor) -> Tensor:
        """Logits [V] after the latest guess [1]."""
        row = self.module.rows(self.module.embed(token), self.out, self.seen)
        guessed = self.k.shape[1] - self.sure
        return self._layer(row, uploaded([self.end + guessed], row.device))

    def _sure(self, rows: Tensor, places: Tensor) -> Tensor:
        """Logits [V] after sure rows [n, D] at places [n]."""
        self.sure += len(rows)
        return self._layer(rows, places)

    def _layer(self, x: Tensor, places: Tensor) -> Tensor:
        """Logits [V] after the last of rows [n, D] at places [n]. There is no second layer, so the other rows need
        nothing but keys and values."""
        heads, theta, last = self.module.heads, self.module.theta, x[-1:]
        layer: Any = self.module.layers[0]
        attention, mlp = layer["self_attn"], layer["mlp"]
        k, v = (split(attention[name](x), heads) for name in ("k_proj", "v_proj"))
        self.k, self.v = torch.cat([self.k, rotated(k, places, theta)], dim=1), torch.cat([self.v, v], dim=1)
        q = rotated(split(attention["q_proj"](last), heads), places[-1:], theta)
        x = last + attention["o_proj"](attend(q, self.k, self.v))
        y = layer["post_attention_layernorm"](x)
        self.out = x + mlp["down_proj"](silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return self.module.logits(self.out)[0]


def split(x: Tensor, heads: int) -> Tensor:
    """[n, H d] -> [H, n, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [n, H d] of queries [H, n, d], which see all keys."""
    return scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)


def rotated(x: Tensor, places: Tensor, theta: float) -> Tensor:
    """RoPE of [H, n, d] at places [n]."""
    half = x.shape[-1] // 2
    steps = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (places[:, None] * steps).to(torch.float32)
    cos, sin = (each.repeat(1, 2).to(x.dtype) for each in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
