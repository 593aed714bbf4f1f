"""`vtoken train-exit`: train the gates of the stage dyvte for a model."""

from __future__ import annotations

import json
from pathlib import Path

from vtoken.evals.calibrate._report import weights_file
from vtoken.evals.calibrate._train_exit_gates import Training, judge, layers_of, table, train
from vtoken.evals.calibrate._training import kept_back
from vtoken.evals.shared.bars import progress
from vtoken.evals.shared.options import DATA, ModelCommand, option
from vtoken.evals.shared.whole import check_folder

DESCRIPTION = """\
Trains one gate per decoder layer that tells from the question's hidden states whether all visual tokens may leave.
The model is frozen. An exit may happen where more than 99% of the answer's tokens keep their prediction and the
answer's loss stays below 1.03 times the full model's; every layer of every question gives one such label."""
EXAMPLES = """\
examples:
  vtoken train-exit llava-hf/llava-1.5-7b-hf --data mine.jsonl --dtype bfloat16 -o gates.safetensors
      the authors' settings; then: vtoken bench llava-hf/llava-1.5-7b-hf dyvte:gates=gates.safetensors
  vtoken train-exit tiny-llava --data reference --hidden 64 --epochs 40 --batch 32 --rate 1e-3 -o tiny.safetensors
      the shipped model, on the shipped questions; the gates that are shipped were trained on other pictures
  vtoken train-exit tiny-llava --data reference --limit 60 -o tiny.safetensors --json
      what was found, as one JSON object

Data: 1% of LLaVA-1.5's instruction data (some 6,650 questions with answers, each about one picture) in the paper.
Without an answer the model's own is taken. One picture in five is kept back to measure the gates on.

Cost for LLaVA-1.5-7B, counted, not measured: a question with 576 visual and 100 text tokens takes 30.4 TFLOPs (tower
0.4, dense 9.0, text alone from every layer on 20.2, output embeddings 0.8), 6,650 of them 202 PFLOPs: 34 minutes at 100
TFLOP/s. Questions run one at a time, in 496 short layer calls each; a GPU may spend more time on starting those than on
computing them. What gates see of them takes 6.8 GB of memory. A gate has 16.8 million weights: one pass over the data
takes 0.02 PFLOPs for all 31, the file 1.0 GB in bfloat16.
"""


class Settings(Training, ModelCommand):
    data: str = option(..., DATA, "DATA")
    limit: int | None = option(None, "first N questions (default: all)", ge=1)
    out: Path = weights_file()


def run(asked: Settings) -> None:
    """Trains, writes the file and says how the gates do on pictures that were kept back."""
    from vtoken.compressors.decoder._gates import save
    from vtoken.evals.shared import samples

    check_folder(asked.out)
    given = samples.read(asked.data, asked.limit)
    back = kept_back(given, asked.data)
    with progress():
        model, processor = samples.load(asked.model, asked.device, asked.dtype)
        seen = table(model, processor, given)
        known, kept = seen.rows(~back), seen.rows(back)
        gates = train(known, asked)
    found = judge(gates, kept)
    numbers = {"questions": len(known.leave), "kept_back": len(kept.leave)}
    numbers |= asked.model_dump(include=set(Training.model_fields))
    about = {"model": asked.model, "data": asked.data, **{key: str(value) for key, value in numbers.items()}}
    save(asked.out, {k: (a.to(model.dtype), b.to(model.dtype)) for k, (a, b) in gates.items()}, found["stay"], about)
    if asked.in_json:
        print(json.dumps({"file": str(asked.out), "model": asked.model, "data": asked.data, **numbers, **found}))
        return
    print("layer  may leave  gate right  harmful exits  images still there")
    for k in layers_of(seen):
        row = [found[key][k - 1] for key in ("may_leave", "accuracy", "harmful")]
        print(f"{k:>5}  {row[0]:>9.1%}  {row[1]:>10.1%}  {row[2]:>13.1%}  {found['stay'][k]:>18.1%}")
    share = sum(found["stay"]) / len(found["stay"])
    print(
        f"wrote {asked.out}: {share:.1%} of visual tokens on average over layers, on {len(kept.leave)} questions kept "
        "back"
    )
