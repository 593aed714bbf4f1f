"""`vtoken calibrate seerattention`: train the gates of the stage seerattention for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtoken.compressors.attention._seer import SIZES, save
from vtoken.compressors.attention.seerattention import SeerAttention
from vtoken.evals.calibrate._report import tell, weights_file
from vtoken.evals.calibrate._train_block_gates import Training, judge, train, watch
from vtoken.evals.calibrate._training import kept_back
from vtoken.evals.shared.bars import progress
from vtoken.evals.shared.options import DATA, ModelCommand, option
from vtoken.evals.shared.samples import load, read
from vtoken.evals.shared.whole import check_folder

SUMMARY = "train SeerAttention's gates on the model's own attention"
DESCRIPTION = """\
Trains one matrix per decoder layer and query head that tells from pooled queries and keys which blocks of keys get
attention. The model is frozen: a gate learns the largest attention between every two blocks (KL divergence)."""
EXAMPLES = """\
examples:
  vtoken calibrate seerattention Qwen/Qwen2.5-VL-7B-Instruct --data long.jsonl --dtype bfloat16 -o gates.safetensors
      the authors' settings; then: vtoken bench Qwen/Qwen2.5-VL-7B-Instruct seerattention:gates=gates.safetensors
  vtoken calibrate seerattention tiny-llava --data reference --limit 120 --size 16 --steps 200 -o tiny.safetensors
      the shipped model, whose prompts are some 40 blocks of 16
  vtoken calibrate seerattention tiny-llava --data reference --limit 30 --size 16 --steps 20 -o tiny.safetensors --json

Gates learn on prompts like those that they will be used on: with pictures as large, and as long. The authors train text
models on 8,000 documents of 64k tokens. Every prompt runs once; what is kept of it takes, per layer, 8 H T^2 +
4 (H + 3 Hk) T d bytes for T blocks, H and Hk heads of width d: 62 MB for 28 layers of a Qwen2.5-VL-7B and 4,096 tokens
in blocks of 64. One picture in five is kept back to measure on.
"""


class Settings(Training, ModelCommand):
    data: str = option(..., DATA, "DATA")
    limit: int | None = option(None, "first N questions (default: all)", ge=1)
    size: int = option(64, "tokens of a block (default: %(default)s, the authors')", choices=SIZES)
    threshold: float | None = option(None, "to measure density and recall at (default: the stage's)", ge=0, lt=1)
    out: Path = weights_file()


def run(asked: Settings) -> None:
    """Trains, writes the file and says how the gates do on pictures that were kept back."""
    check_folder(asked.out)
    given = read(asked.data, asked.limit)
    back = kept_back(given, asked.data).tolist()
    with progress():
        model, processor = load(asked.model, asked.device, asked.dtype)
        seen = watch(model, processor, given, asked.size)
        known, kept = ([s for s, b in zip(seen, back, strict=True) if b == which] for which in (False, True))
        gates = train(known, asked, model.device)
    defaults: Any = {name: field.default for name, field in SeerAttention.model_fields.items()}
    threshold = defaults["threshold"] if asked.threshold is None else asked.threshold
    found = judge(gates, kept, asked.seed, asked.size, threshold, defaults["last"])
    numbers = {"prompts": len(known), "kept_back": len(kept), "size": asked.size}
    numbers |= asked.model_dump(include=set(Training.model_fields))
    about = {"model": asked.model, "data": asked.data, **{key: str(value) for key, value in numbers.items()}}
    save(asked.out, [gate.to(model.dtype) for gate in gates], len(seen[0][0].keys), asked.size, about)
    rows: list[tuple[str, ...]] = [
        ("layer", "KL untrained, nats", "KL, nats", "blocks read", "attention there", "at best")
    ]
    for layer, (before, after, *shares) in enumerate(zip(*found.values(), strict=True)):
        rows.append((str(layer), f"{before:.3f}", f"{after:.3f}", *(f"{share:.1%}" for share in shares)))
    density, recall = (sum(found[key]) / len(found[key]) for key in ("density", "recall"))
    sentence = (
        f"wrote {asked.out}: {recall:.1%} of the attention in {density:.1%} of the blocks at threshold {threshold:g}, "
        f"on {len(kept)} prompts kept back"
    )
    figures = {"file": str(asked.out), "data": asked.data, **numbers}
    figures |= {"blocks": max(len(layers[0].starts.cos) for layers in seen), "threshold": threshold, **found}
    tell(asked, figures, rows, sentence, f"seerattention:gates={asked.out}")
