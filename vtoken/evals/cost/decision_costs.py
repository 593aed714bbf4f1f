"""What deciding costs: FLOPs and bytes of every stage on one picture, and the families it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from vtoken.config import load
from vtoken.evals.cost.flops import account, resolve_config
from vtoken.evals.cost.geometry import Geometry, geometry
from vtoken.evals.cost.support_matrix import Answer, SupportMatrix, example_stage, support_matrix
from vtoken.stages import FACTS, Stage, size_of
from vtoken.stages.budget import Budget

MODEL = "llava-hf/llava-1.5-7b-hf"
TEXT_TOKENS = 64
HALF, SINGLE = 2, 4  # bytes of a number: the model's tensors, and what is computed from them


@dataclass(frozen=True)
class Cost:
    """One stage, with default options and 64 tokens to keep, on one picture of LLaVA-1.5-7B (576 visual tokens, 64 text tokens).

    Attributes:
        families: answer of the matrix -> the families it goes for.
        flops: of the facts and the decision; None for a stage that has options without a default, or whose defaults do not run on the model.
        fact_bytes: size of the facts that it is given, at its first layer if it acts at several; None likewise, or where a fact is
            not one of vtoken's.
        left_out: what `flops` does not count, one sentence each.
    """

    stage: str
    families: dict[Answer, list[str]]
    flops: int | None
    fact_bytes: int | None
    left_out: tuple[str, ...] = ()


def costs(stages: list[type[Stage]], found: SupportMatrix | None = None) -> list[Cost]:
    """One row per stage.

    Args:
        found: the matrix of these stages, if it is at hand; else it is made, which takes seconds.
    """
    found = support_matrix(stages) if found is None else found
    return [_cost(cls, _by_answer(found, cls.name)) for cls in stages]


def _by_answer(found: SupportMatrix, stage: str) -> dict[Answer, list[str]]:
    out: dict[Answer, list[str]] = {}
    for family, cell in found.cells[stage].items():
        out.setdefault(cell.answer, []).append(family)
    return out


def _cost(cls: type[Stage], families: dict[Answer, list[str]]) -> Cost:
    config = resolve_config(MODEL)
    stage = example_stage(cls)
    runs = [family for answer in ("yes", "substitute") for family in families.get(answer, [])]
    if stage is None or config.model_type not in runs:
        return Cost(cls.name, families, None, None)
    if "keep" in cls.model_fields:
        stage = stage.model_copy(update={"keep": Budget(64)})
    dense, pruned = (account(config, p, text_tokens=TEXT_TOKENS, new_tokens=1) for p in (None, load(stage)))
    missing = tuple(sentence for sentence in pruned.left_out if sentence not in dense.left_out)
    size = fact_bytes(stage, geometry(config, None, 1, 1, "model"), TEXT_TOKENS)
    return Cost(cls.name, families, pruned.stages, size, missing)


def fact_bytes(stage: Stage, shape: Geometry, text_tokens: int) -> int | None:
    """Bytes of the facts a stage is given for one picture; None if there is one whose size is not known.

    Args:
        text_tokens: all of them taken to stand behind the picture.
    """
    encoder, decoder = shape.tower.layers, shape.decoder
    stack = decoder if stage.site == "decoder" else encoder
    keys, hidden = stack.kv_heads * stack.head_dim * HALF, decoder.width * HALF
    per_token = {
        "mean_value": stack.head_dim * SINGLE,
        "mean_key": stack.head_dim * SINGLE,
        "keys": keys,
        "values": keys,
        "normed": hidden,
        "features": encoder.width * HALF,
        "pixels": shape.tower.stem // encoder.width * shape.tower.unit * HALF,
    }
    per_text = {"text": hidden, "later_text": hidden, "later_normed": hidden, "later_keys": keys}
    sizes = {name: SINGLE * size_of(shape.parts) for name in FACTS if name.endswith("_attention")}
    sizes |= {name: size * size_of(shape.parts) for name, size in per_token.items()}
    sizes |= {name: size * text_tokens for name, size in per_text.items()}
    if any(fact.name not in sizes for fact in stage.needs()):
        return None
    return sum(sizes[fact.name] for fact in stage.needs())
