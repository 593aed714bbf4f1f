"""`vtoken calibrate fitprune`: the table of FitPrune for a model and a budget."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from vtoken.evals.calibrate._fitprune import fit
from vtoken.evals.calibrate._report import pipeline_file, tell_pipeline
from vtoken.evals.shared import samples
from vtoken.evals.shared.options import DATA, ModelCommand, option
from vtoken.evals.shared.whole import check_folder

SUMMARY = "table of visual tokens that leave behind each decoder layer"
DESCRIPTION = (
    "Finds how little attention has to be lost to spare a share of the visual tokens' FLOPs in the decoder; "
    "writes a pipeline."
)
EXAMPLES = """\
examples:
  vtoken calibrate fitprune tiny-llava --reduction 60 -o table.yaml     # shipped questions
  vtoken calibrate fitprune llava-hf/llava-1.5-7b-hf --reduction 60 --data questions.jsonl --limit 128
  vtoken bench tiny-llava table.yaml

Runs every prompt once dense and some seven times pruned, one at a time. The pictures must have equally many visual
tokens. Lines of --data: {"image": "cat.jpg", "question": "What is it?"}. The table depends on the model, the size and
the questions.
"""


class Settings(ModelCommand):
    reduction: float = option(..., "FLOPs of visual tokens to spare, in percent", "PERCENT", gt=0, lt=100)
    data: str | None = option(None, f"{DATA} (default: the last of the shipped)", "DATA")
    limit: int = option(64, "so many questions", ge=1)
    out: Path | None = pipeline_file()


def run(asked: Settings) -> None:
    """Fits the table and writes the pipeline."""
    check_folder(asked.out)
    given = samples.read(asked.data, asked.limit)
    model, processor = samples.load(asked.model, asked.device, asked.dtype)
    prompts = (samples.prepare(model, processor, sample) for sample in given)
    found = fit(
        model, prompts, asked.reduction / 100, lambda: print(f"a pass over {len(given)} prompts", file=sys.stderr)
    )
    rows = [("after layer", "tokens that leave", "left")]
    rows += [(str(k), str(n), str(found.tokens - sum(found.table[: k + 1]))) for k, n in enumerate(found.table)]
    about = (
        f"FitPrune (https://arxiv.org/abs/2409.10197) for {asked.model}: spares {found.spared:.1%} of the FLOPs that "
        f"{found.tokens} visual tokens cost in the decoder; fitted to {len(given)} prompts, at each layer at most "
        f"{found.alpha:.1%} of the attention is lost."
    )
    figures = {"questions": len(given), "reduction": asked.reduction / 100, **asdict(found)}
    tell_pipeline(asked, figures, rows, about, {"fitprune": {"table": list(found.table), "tokens": found.tokens}})
