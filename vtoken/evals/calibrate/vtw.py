"""VTW's layer: the first from which the next token hardly changes when all visual tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.calibrate._exit_reference import ExitReference
from vtoken.evals.calibrate._report import tell
from vtoken.evals.shared.options import DATA, ModelCommand, option
from vtoken.evals.shared.samples import Sample, load, prepare, read

SUMMARY = "the decoder layer before which all visual tokens can leave (vtw)"
DESCRIPTION = """\
For every layer K: KL divergence of the next-token distribution with all visual tokens gone before K from that of
the full model, mean over questions; the first K within the tolerance is VTW's. One dense forward per question and
the deeper layers on text alone. Of multiple-choice questions it gives layers too early for OCR and captions."""
EXAMPLES = """examples:
  vtoken calibrate vtw tiny-llava                       # on 20 shipped questions
  vtoken calibrate vtw llava-hf/llava-1.5-13b-hf --data mine.jsonl --tolerance 0.0005
  vtoken calibrate vtw tiny-llava --json | jq .pipeline
"""


class Settings(ModelCommand):
    data: str = option("reference", DATA, "DATA")
    limit: int = option(20, "first N questions", ge=1)
    tolerance: float = option(
        0.003,
        "most divergence, in nats (default: %(default)s, the authors' for LLaVA-1.5-7B; 0.0005 for 13B, 0.0001 for "
        "1.6-7B)",
        "KL",
        ge=0,
    )
    first: int | None = option(None, "first layer that is tried (default: 5 of 32, as the authors)", "K", ge=1)


def run(asked: Settings) -> None:
    """Prints the divergence of every layer and the first within the tolerance; that there is none is an answer, too:
    `none`."""
    samples = read(asked.data, asked.limit)
    model, processor = load(asked.model, asked.device, asked.dtype)
    depth = model.config.get_text_config().num_hidden_layers
    first = max(1, min(5, depth * 5 // 32)) if asked.first is None else asked.first
    if not 1 <= first < depth:
        raise ConfigError(f"--first must lie between 1 and {depth - 1}, the last layer of {asked.model}; not {first}")
    found = divergences(model, processor, samples)
    tolerance, layer = asked.tolerance, choose(found, first, asked.tolerance)
    rows = [("layer", "KL, nats", "")]
    rows += [(str(k), f"{kl:.6f}", f"first within {tolerance}" * (k == layer)) for k, kl in enumerate(found, 1)]
    pipeline = "none" if layer is None else f"vtw:layer={layer}"
    about = f"{pipeline} on {len(samples)} questions of {asked.data}"
    if layer is None:
        lowest = min(found[first - 1 :])
        about += (
            f": no layer from {first} on keeps the divergence within {tolerance}, the lowest is {lowest:.6f} at layer "
            f"{found.index(lowest, first - 1) + 1}; this model reads its images to the end, or raise --tolerance"
        )
    figures = {"data": asked.data, "questions": len(samples), "tolerance": tolerance, "layer": layer}
    tell(asked, {**figures, "divergence": dict(enumerate(found, 1))}, rows, about, pipeline)


def divergences(model: Any, processor: Any, samples: Sequence[Sample]) -> list[float]:
    """Mean divergence for layers 1 to L - 1."""
    rows = []
    for sample in samples:
        run = ExitReference(model, prepare(model, processor, sample))
        rows.append(torch.stack([divergence(run.without(k)[-1], run.full[-1]) for k in range(1, len(run.entering))]))
    means: list[float] = torch.stack(rows).mean(0).tolist()
    return means


def divergence(now: Tensor, full: Tensor) -> Tensor:
    """KL(now || full) of two rows of logits [V], in nats."""
    log_now, log_full = now.double().log_softmax(-1), full.double().log_softmax(-1)
    return (log_now.exp() * (log_now - log_full)).sum()


def choose(found: Sequence[float], first: int, tolerance: float) -> int | None:
    """The first layer from `first` on within the tolerance, if there is one; found[0] is layer 1."""
    return next((k for k, kl in enumerate(found, 1) if k >= first and kl <= tolerance), None)
