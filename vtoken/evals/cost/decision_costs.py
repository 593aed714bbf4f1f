"""What deciding costs: FLOPs and bytes of every stage on one picture, and the families it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from vtoken.config import load
from vtoken.evals.cost.flops import account
from vtoken.evals.cost.geometry import Geometry, geometry
from vtoken.evals.cost.support_matrix import Answer, SupportMatrix, example_stage, support_matrix
from vtoken.evals.shared.configs import resolve_config
from vtoken.stages import Stage, size_of, spec_of
from vtoken.stages.budget import Budget

MODEL = "llava-hf/llava-1.5-7b-hf"
TEXT_TOKENS = 64
HALF, SINGLE = 2, 4  # bytes of a number: the model's tensors, and what is computed from them


@dataclass(frozen=True)
class Cost:
    """One stage, with default options and 64 tokens to keep, on one picture of LLaVA-1.5-7B (576 visual tokens, 64 text
    tokens).

    Attributes:
        families: answer of the support matrix -> families.
        flops: of facts and decision; None where options have no default, or the defaults do not run on the model.
        fact_bytes: size of the facts, at the first layer where the stage acts; None likewise, or for a fact of unknown
            size.
        left_out: what `flops` does not count, one sentence each.
    """

    stage: str
    families: dict[Answer, list[str]]
    flops: int | None
    fact_bytes: int | None
    left_out: tuple[str, ...] = ()


def costs(stages: list[type[Stage]], found: SupportMatrix | None = None) -> list[Cost]:
    """One row per stage; `found` is their support matrix, which takes seconds to make."""
    found = support_matrix(stages) if found is None else found
    return [_cost(cls, found) for cls in stages]


def _cost(cls: type[Stage], found: SupportMatrix) -> Cost:
    families: dict[Answer, list[str]] = {}
    for family, cell in found.cells[cls.name].items():
        families.setdefault(cell.answer, []).append(family)
    config, stage = resolve_config(MODEL), example_stage(cls)
    if stage is None or config.model_type not in families.get("yes", []) + families.get("substitute", []):
        return Cost(cls.name, families, None, None)
    if "keep" in cls.model_fields:
        stage = stage.model_copy(update={"keep": Budget(64)})
    dense, pruned = (account(config, p, text_tokens=TEXT_TOKENS, new_tokens=1) for p in (None, load(stage)))
    missing = tuple(sentence for sentence in pruned.left_out if sentence not in dense.left_out)
    return Cost(cls.name, families, pruned.stages, fact_bytes(stage, geometry(config), TEXT_TOKENS), missing)


def fact_bytes(stage: Stage, shape: Geometry, text_tokens: int) -> int | None:
    """Bytes of the facts a stage is given for one picture with all the text after it; None if there is one of unknown
    size."""
    encoder, decoder = shape.tower.layers, shape.decoder
    total = 0
    for fact in stage.needs():
        spec = spec_of(fact.name, stage.site)
        if spec is None:
            return None
        stack = encoder if spec.of_encoder else decoder
        entry = {
            "one": SINGLE,
            "head": stack.head_dim * SINGLE,
            "heads": stack.kv_heads * stack.head_dim * HALF,
            "each head": stack.kv_heads * stack.head_dim * HALF,
            "hidden": decoder.width * HALF,
            "features": encoder.width * HALF,
            "pixels": shape.tower.patch * shape.tower.unit * HALF,
        }[spec.holds]
        total += entry * (size_of(shape.parts) if spec.per == "token" else text_tokens)
    return total
