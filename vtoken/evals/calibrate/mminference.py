"""`vtoken calibrate mminference`: which pattern each head reads along, searched on one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from vtoken import registry
from vtoken.compressors._rows import rows_at
from vtoken.errors import ConfigError
from vtoken.evals.calibrate._report import pipeline_file, tell_pipeline
from vtoken.evals.shared import models
from vtoken.evals.shared.options import ModelCommand, PictureOptions, option
from vtoken.evals.shared.whole import check_folder
from vtoken.evals.speed.inputs import random_prompt
from vtoken.session import wrapped
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, everything

SUMMARY = "search MMInference's pattern of every head on one prompt of random or given pictures"
DESCRIPTION = """\
Every head takes the pattern that recalls most of what visual tokens attend to among visual tokens, a later one only if
it recalls 0.01 more of all their attention: the order is from cheap to costly. Text keys take their part, as in the
authors' search."""
EXAMPLES = """examples:
  vtoken calibrate mminference tiny-llava -o table.yaml            # the form of a table, on random pictures
  vtoken calibrate mminference Qwen/Qwen2.5-VL-7B-Instruct --inputs clip.pt --dtype bfloat16 -o table.yaml
  vtoken bench Qwen/Qwen2.5-VL-7B-Instruct table.yaml
"""
LONGEST = 25_000  # tokens of the authors' sample; longer ones take too long
GAIN = 0.01
QUERIES = 256  # rows of an attention map that are in memory at once


class Search(SparseAttention):
    """Keeps the attention dense and records, per layer and head, the pattern that recalls most. No paper: a tool."""

    name: ClassVar[str] = "search"
    min_len: int = 0
    candidates: tuple[str, ...]
    method: SparseAttention
    found: Any = None

    def reads(self, prompt: PrefillQK) -> SparseMask:
        chosen, best = ["a_shape"] * prompt.heads, [-1.0] * prompt.heads
        for name in self.candidates:
            reads = self.method.model_copy(update={"pattern": name, "heads": None}).reads(prompt)
            assert isinstance(reads, SparseMask)
            for head, value in enumerate(recall(prompt, reads).tolist()):
                if value > best[head] + GAIN:
                    chosen[head], best[head] = name, value
        self.found[prompt.layer] = (tuple(chosen), tuple(best))
        n = prompt.length
        return SparseMask(128, everything(prompt.heads, n, n, 128, prompt.q.device))


def recall(prompt: PrefillQK, reads: SparseMask) -> Tensor:
    """[H] share of the attention of visual queries, over all keys, that goes to visual keys and that a mask keeps; mean
    over queries."""
    seen, total = (prompt.image >= 0).nonzero()[:, 0], torch.zeros(prompt.heads)
    keys = prompt.k.repeat_interleave(prompt.heads // len(prompt.k), 0)
    for rows in seen.split(QUERIES):
        share = rows_at(prompt.q, keys, rows, prompt.scale)[..., seen]
        total += torch.where(visible(reads, rows)[..., seen], share, 0).sum((1, 2)).cpu()
    return total / len(seen)


def visible(mask: SparseMask, rows: Tensor) -> Tensor:
    """[H, R, N] bool: which keys the queries `rows` [R] read, of a prompt of N = M * size tokens."""
    n = mask.blocks.shape[2] * mask.size
    seen = mask.blocks[:, rows // mask.size].repeat_interleave(mask.size, 2)
    if mask.columns is not None:
        heads, groups, _ = mask.columns.shape
        marks = seen.new_zeros(heads, groups, n + 1)
        marks.scatter_(2, torch.where(mask.columns < 0, n, mask.columns).long(), True)
        tiles = rows // mask.size
        seen |= marks[:, tiles // mask.share if mask.of is None else mask.of[tiles], :n]
    if mask.own is not None:
        seen |= (torch.arange(n, device=rows.device) == rows[:, None]) & mask.own[rows, None]
    if mask.dense is not None:
        seen |= mask.dense[:, rows, None]
    return seen & (torch.arange(n, device=rows.device) <= rows[:, None])


class Settings(PictureOptions, ModelCommand):
    text_tokens: int = option(64, "text tokens", ge=1)
    seed: int = option(0, "of text and pictures")
    inputs: Path | None = option(None, "a torch.save'd dict of the processor's output, instead of random pictures")
    random_weights: bool = option(False, "build the model from its config")
    out: Path | None = pipeline_file()


def run(asked: Settings) -> None:
    """Searches, and writes a pipeline with the table."""
    check_folder(asked.out)
    given = None if asked.inputs is None else saved(asked.inputs)
    model: Any = models.load(
        asked.model, asked.device, asked.dtype, random_weights=asked.random_weights, seed=asked.seed
    )
    if given is not None:
        inputs = {k: v.to(model.device) for k, v in given.items()}
    else:
        options = asked.model_dump(include={*PictureOptions.model_fields, "text_tokens", "seed"})
        inputs = random_prompt(registry.adapter(model.config.model_type)(model), **options).inputs
    stage, recalls = search(model, inputs)
    length, shown = inputs["input_ids"].shape[1], "random pictures" if asked.inputs is None else str(asked.inputs)
    about = (
        f"MMInference (https://arxiv.org/abs/2504.16083) for {asked.model}: searched on one prompt of {length} "
        f"tokens ({shown})."
    )
    if asked.inputs is None:
        about += " This table shows the form, not what the model attends to; use --inputs for a real one."
    rows = [("layer", "patterns of its heads", "recall, mean")]
    for layer, (names, values) in enumerate(zip(stage.heads, recalls, strict=True)):
        many = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        rows.append((str(layer), many, f"{sum(values) / len(values):.1%}"))
    figures = {"tokens": length, "inputs": shown, "heads": stage.heads, "recall": recalls}
    tell_pipeline(asked, figures, rows, about, {"mminference": {"heads": stage.heads}})


def saved(file: Path) -> dict[str, Tensor]:
    """The inputs in a file."""
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
        if isinstance(found, dict) and "input_ids" in found and all(isinstance(x, Tensor) for x in found.values()):
            return found
        what = "no dict of tensors with input_ids"
    except Exception as error:  # bytes that no pickle wrote can raise anything
        what = str(error).partition("\n")[0] or type(error).__name__
    raise ConfigError(f"--inputs {file}: {what}; write it with torch.save(dict(processor(...)), FILE)") from None


def search(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[tuple[float, ...]]]:
    """The stage with the table found on one prompt, and per layer what the chosen pattern of every head recalls.

    Raises:
        ConfigError: several prompts, a long one, or one without a picture.
    """
    rows, length = inputs["input_ids"].shape
    if rows != 1 or length > LONGEST:
        raise ConfigError(f"the search takes one prompt of at most {LONGEST} tokens, not {rows} of {length}")
    found: dict[int, Any] = {}
    cls: Any = registry.stage("mminference")
    patterns, method = get_args(cls.model_fields["pattern"].annotation), cls()
    with wrapped(model, [Search(candidates=patterns, found=found, method=method)]), torch.no_grad():
        model(**inputs, logits_to_keep=1)
    if not found:
        raise ConfigError("the prompt shows no picture; a pattern is searched by what its visual tokens attend to")
    chosen, recalls = zip(*(pair for _, pair in sorted(found.items())), strict=True)
    return cls(heads=chosen), list(recalls)
