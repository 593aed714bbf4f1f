"""Facts: what a stage may ask about the visual tokens, one row each. Only facts that a stage asks for are computed.

A new fact is a row here and a function of the same name: in `hooks/vision/encoder_facts.py` if it is computed from an
encoder layer, in `hooks/decoder/attention_facts.py` if from a decoder layer. Letters as in `tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Site = Literal["pixels", "frames", "encoder", "tokens", "decoder", "attention", "cache", "decode"]
SITES: tuple[Site, ...] = get_args(Site)
OfEncoder = Literal["pixels", "encoder layer", "encoder states", "encoder output"]
Read = OfEncoder | Literal["hidden states", "positions", "blocks", "decoder layer", "next layer", "target"]


class Fact(NamedTuple):
    """A fact that a stage asks for in `needs`.

    `layer` is the encoder layer (at decoder sites: decoder layer); None means the layer the model takes its features
    from (at encoder and decoder sites: the layer before the cut). Negative layers count from the end. `above` restricts
    received_attention to queries that themselves receive more than `above` times the mean of their crop (frame), or, if
    there is none, to the query that receives most. For target_attention, `layer` is the first layer of the target that
    counts; None: all layers count.
    """

    name: str
    layer: int | None = None
    above: float = 0.0


@dataclass(frozen=True)
class FactSpec:
    """Everything the package knows about a fact, except how to compute it.

    Attributes:
        name: what `Fact` asks for. A name may stand for two facts, at different sites.
        sites: of the stages that may ask for it.
        read: where in the model it is read: the encoder's input or output, a layer's projections, the layer that runs
            next, the hidden states that a stage is given (at site tokens: embeddings) and their positions, or what
            attention and MLP of layers were given and returned; "target": in another model, for which this one drafts.
        means: shape and meaning.
        per: whether there is one entry per visual token, or a tensor over text tokens per image or per batch row.
        holds: size of an entry: one number or d (both fp32), H*d, H x d, D, D_encoder, or the pixel values of a token.
        projections: which of q, k and v are read in the layer.
        queries: of an attention fact: the CLS token (without one: the mean patch), the last prompt token, each image's
            own tokens, the text after each image, or text tokens that the stage chooses (`query_tokens`).
        own: whether the softmax runs over the tokens of each image only, not over all keys.
        whole: whether it covers the whole image even in an encoder layer that attends within windows.
        relayed: whether queries are weighted by the attention that they receive from each other.
        part_of: for facts about the text after an image, the fact that is read from the same tensor over all tokens.
        instead: the fact that replaces it in encoders without a CLS token.
    """

    name: str
    sites: tuple[Site, ...]
    read: Read
    means: str
    per: Literal["token", "image", "row"] = "token"
    holds: Literal["one", "head", "heads", "each head", "hidden", "features", "pixels"] = "one"
    projections: tuple[Literal["q", "k", "v"], ...] = ()
    queries: Literal["cls", "last", "own", "text", "chosen"] | None = None
    own: bool = False
    whole: bool = False
    relayed: bool = False
    part_of: str = ""
    instead: str = ""

    @property
    def of_encoder(self) -> bool:
        """Whether it is about the encoder, and so known before the LLM runs."""
        return self.read in get_args(OfEncoder)


ENCODER: tuple[Site, ...] = ("encoder", "tokens")
DECODER: tuple[Site, ...] = ("decoder",)
LAYER: Read = "decoder layer"
QK: tuple[Literal["q", "k", "v"], ...] = ("q", "k")

# fmt: off
FACTS = (
    FactSpec("pixels", ("tokens", "decoder"), "pixels", holds="pixels",
             means="[ΣN, P] the normalised pixel values of each token (all patches and frames that were merged "
                   "into it)"),
    FactSpec("cls_attention", ENCODER, "encoder layer", projections=QK, queries="cls", instead="received_attention",
             means="[ΣN] attention of the CLS query over all keys, head mean, CLS column dropped, not renormalised"),
    FactSpec("global_attention", ENCODER, "encoder layer", projections=QK, queries="cls", whole=True,
             means="[ΣN] as cls_attention; without CLS the query is the mean over the image's patches, windows "
                   "disregarded"),
    FactSpec("value_attention", ENCODER, "encoder layer", projections=("v",), queries="cls", whole=True,
             means="[ΣN] as global_attention, with values for queries and keys and no scale: softmax of dot products"),
    FactSpec("received_attention", (*ENCODER, "decoder"), "encoder layer", projections=QK, queries="own",
             means="[ΣN] attention each token receives in the encoder, mean over queries and heads"),
    FactSpec("keys", ENCODER, "encoder layer", holds="heads", projections=("k",),
             means="[ΣN, H*d] encoder keys of the layer"),
    FactSpec("values", ENCODER, "encoder layer", holds="heads", projections=("v",),
             means="[ΣN, H*d] encoder values of the layer"),
    FactSpec("mean_key", ENCODER, "encoder layer", holds="head", projections=("k",),
             means="[ΣN, d] encoder keys of the layer, head mean"),
    FactSpec("mean_value", ENCODER, "encoder layer", holds="head", projections=("v",),
             means="[ΣN, d] encoder values of the layer, head mean"),
    FactSpec("change", ("encoder",), "encoder states",
             means="[ΣP] norm of the difference that the layer made to each patch; for stages that refill"),
    FactSpec("features", ("tokens",), "encoder output", holds="features",
             means="[ΣN, D_encoder] encoder output before the projector"),
    FactSpec("text", ("tokens", "decoder"), "hidden states", per="row", holds="hidden",
             means="one [T_r, D] tensor per batch row: embeddings of its text tokens (hidden states at decoder sites)"),
    FactSpec("later_text", DECODER, "hidden states", per="image", holds="hidden", part_of="text",
             means="one [T_i, D] tensor per image: hidden states of its row's text tokens after it"),
    FactSpec("normed", DECODER, "hidden states", holds="hidden",
             means="[ΣN, D] decoder hidden states through the LLM's final norm"),
    FactSpec("later_normed", DECODER, "hidden states", per="image", holds="hidden", part_of="normed",
             means="one [T_i, D] tensor per image: the same of its row's text tokens after it"),
    FactSpec("keys", DECODER, LAYER, holds="heads", projections=("k",),
             means="[ΣN, Hk*d] decoder keys of the layer, with RoPE"),
    FactSpec("later_keys", DECODER, LAYER, per="image", holds="heads", projections=("k",), part_of="keys",
             means="one [T_i, Hk*d] tensor per image: decoder keys, with RoPE, of its row's text tokens after it"),
    FactSpec("mean_cos", DECODER, "positions",
             means="[ΣN] cosine of the layer's RoPE at each token's position, mean over channels and position axes"),
    FactSpec("mean_sin", DECODER, "positions",
             means="[ΣN] the same of the sine"),
    FactSpec("transition", DECODER, "blocks",
             means="[ΣN] how attention and MLP turned and stretched each token, from the named layer to the one before "
                   "the cut: |out| / |in| times the token's share of exp(1 - cosine), summed"),
    FactSpec("values", DECODER, LAYER, holds="each head", projections=("v",),
             means="[ΣN, Hk, d] decoder values of the layer"),
    FactSpec("later_values", DECODER, LAYER, per="image", holds="each head", projections=("v",), part_of="values",
             means="one [T_i, Hk, d] tensor per image: decoder values of its row's text tokens after it"),
    FactSpec("mean_value", DECODER, LAYER, holds="head", projections=("v",),
             means="[ΣN, d] decoder values of the layer, head mean"),
    FactSpec("last_query_attention", DECODER, LAYER, projections=QK, queries="last",
             means="[ΣN] decoder attention of the last prompt token, head mean"),
    FactSpec("next_query_attention", DECODER, "next layer", projections=QK, queries="last",
             means="[ΣN] the same in the decoder layer after the cut, before it runs"),
    FactSpec("next_text_attention", DECODER, "next layer", projections=QK, queries="text",
             means="[ΣN] decoder attention of the text after each image, mean over it and the heads, in the decoder "
                   "layer after the cut, before it runs"),
    FactSpec("text_attention", DECODER, LAYER, projections=QK, queries="chosen",
             means="[ΣN] decoder attention of the text tokens that the stage's `query_tokens` chose, mean over them "
                   "and the heads"),
    FactSpec("visual_attention", DECODER, LAYER, projections=QK, queries="last", own=True,
             means="[ΣN] decoder attention of the last prompt token, softmax over the tokens of each image alone, "
                   "head mean"),
    FactSpec("visual_value_attention", DECODER, LAYER, projections=("v",), queries="last", own=True,
             means="[ΣN] the same with values for query and keys"),
    FactSpec("cross_attention", DECODER, LAYER, projections=QK, queries="text",
             means="[ΣN] decoder attention of the text after each image, maximum over heads, mean over that text"),
    FactSpec("self_attention", DECODER, LAYER, projections=QK, queries="own",
             means="[ΣN] decoder attention of each image's own tokens, maximum over heads, mean over them"),
    FactSpec("relayed_attention", DECODER, LAYER, projections=QK, queries="text", relayed=True,
             means="[ΣN] decoder attention of the text after each image, head mean, weighted by what that text "
                   "receives from itself"),
    FactSpec("target_attention", ("tokens",), "target",
             means="[ΣN] of a draft: attention of the text after the last image in the decoder of the target, mean "
                   "over that text, heads and layers; 0 where the target dropped a token"),
)
# fmt: on
_AT = {(spec.name, site): spec for spec in FACTS for site in spec.sites}


def spec_of(name: str, site: Site) -> FactSpec | None:
    """The fact that a stage at this site means by a name; None if there is none."""
    return _AT.get((name, site))


def encoded(fact: Fact, site: Site) -> bool:
    """Whether this fact, asked for at this site, is about the encoder and so known before the LLM runs."""
    spec = spec_of(fact.name, site)
    return spec is not None and spec.of_encoder


def of_target(fact: Fact, site: Site) -> bool:
    """Whether this fact, asked for at this site, is about the target of the model that has the stage, a draft."""
    spec = spec_of(fact.name, site)
    return spec is not None and spec.read == "target"


def read_of(read: Read) -> dict[str, FactSpec]:
    """The facts that are read at one place in the model, by name."""
    return {spec.name: spec for spec in FACTS if spec.read == read}
