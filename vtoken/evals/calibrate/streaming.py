"""`vtoken calibrate streaming`: which key heads must read everything, as RazorAttention measures it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken import registry
from vtoken.adapters.base import Adapter
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.calibrate._echoes import copies, layers_of, ranked, shown, table, watch
from vtoken.evals.calibrate._report import FLAGS, tell
from vtoken.evals.shared import media, models, whole
from vtoken.evals.shared.options import ModelCommand, option
from vtoken.evals.shared.whole import check_folder
from vtoken.evals.speed.inputs import prepared, random_prompt

SUMMARY = "which key heads must read everything (gates of static_sparse and streaming_cache)"
DESCRIPTION = """\
Shows the model random tokens, again and again, in one prompt. Heads that look back to the earlier copies of a token
(echo), or to what came after them (induction), retrieve; all others may read the first and the latest tokens alone.
No gradients. After RazorAttention (https://arxiv.org/abs/2407.15891); with --images, also heads that look back to the
same place of an earlier copy of a picture (ours, no publication).

The file holds a number per decoder layer and key head: 1 for the head that comes first, less for each one after it.
The heads of the given shares come first, in the order in which they are taken as all shares grow in proportion, so that
any other `sparsity` can be chosen later. Layers with a sliding window or without attention are not probed and have
zeros."""
EXAMPLES = """examples:
  vtoken calibrate streaming tiny-llava --induction 0.25 -o heads.json
  vtoken calibrate streaming Qwen/Qwen2.5-VL-7B-Instruct --dtype bfloat16 --images street.jpg -o heads.json
"""


class Settings(ModelCommand):
    period: int | None = option(
        None, "random tokens that are repeated (default: 2500, or what vocabulary and context of the model allow)", ge=2
    )
    repeats: int = option(4, "times that they, or the picture, are shown", ge=2)
    echo: float = option(0.01, "share of key heads, by echo", ge=0, le=1)
    induction: float = option(0.14, "share of key heads, by induction", ge=0, le=1)
    images: Path | None = option(None, "a picture to repeat, too")
    visual: float = option(0.14, "with --images: share of key heads, by echo among visual tokens", ge=0, le=1)
    seed: int = option(0, "of the random tokens")
    out: Path = option(..., "JSON file to write", flags=FLAGS)


def run(asked: Settings) -> None:
    """Measures, and writes the table."""
    check_folder(asked.out)
    if asked.out.suffix == ".tsv":
        raise ConfigError(
            f"-o {asked.out}: the file is JSON, and stages read a .tsv as a table with tabs; name it .json"
        )
    picture = None if asked.images is None else media.read([asked.images])
    if picture is not None and picture.video:
        raise ConfigError(f"--images {asked.images} is a video; give a picture")
    model, processor = models.load_pair(asked.model, asked.device, asked.dtype)
    adapter = registry.adapter(model.config.model_type)(model)
    inputs, period = repeated(adapter, processor.tokenizer, asked.period, asked.repeats, asked.seed)
    scores = dict(zip(("echo", "induction"), watch(adapter, inputs, partial(copies, period=period)), strict=True))
    if picture is not None:
        scores["visual"] = visual(adapter, prepared(picture, processor, 1, asked.repeats), asked.repeats, asked.seed)
    order, count = ranked([*scores.values()], [getattr(asked, name) for name in scores])
    layers, heads, depth = layers_of(adapter), scores["echo"].shape[1], len(adapter.lm.layers)
    numbers = table(order, layers, depth, heads)
    whole.write(asked.out, json.dumps(numbers) + "\n")
    full = sorted((layers[i // heads], i % heads) for i in order[:count].tolist())
    sparsity = round(1 - count / (depth * heads), 6)
    rows = [("layer", *(f"{name}, best" for name in scores), "read everything")]
    for at, layer in enumerate(layers):
        best = [f"{score[at].max():.1%}" for score in scores.values()]
        rows.append((str(layer), *best, ", ".join(str(h) for k, h in full if k == layer)))
    figures = {
        "file": str(asked.out),
        "tokens": inputs["input_ids"].shape[1],
        "period": period,
        "repeats": asked.repeats,
        "layers": layers,
        **{name: score.tolist() for name, score in scores.items()},
        "full": full,
        "sparsity": sparsity,
    }
    about = (
        f"wrote {asked.out}: {count} of {depth * heads} key heads read everything at sparsity {sparsity:g}; "
        f"{period} tokens, {asked.repeats} times"
    )
    tell(asked, figures, rows, about, f"static_sparse:gates={asked.out},sparsity={sparsity:g}")


def repeated(
    adapter: Adapter, tokenizer: Any, period: int | None, repeats: int, seed: int
) -> tuple[dict[str, Tensor], int]:
    """A prompt of random ordinary tokens, all different where the vocabulary has so many, after a BOS; and how many
    are repeated.

    Raises:
        ConfigError: the prompt is longer than the model takes.
    """
    plain, config = ordinary(adapter, tokenizer), adapter.lm.config
    most = (config.max_position_embeddings - 1) // repeats
    if period is None:
        period = min(2500, most, len(plain))
    if not 2 <= period <= most:
        raise ConfigError(
            f"{repeats} times {period} tokens are more than the {config.max_position_embeddings} that this model "
            f"takes; lower --period (to {most}), or --repeats"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(plain), generator=generator)
    if period > len(plain):
        shuffled = torch.randint(len(plain), (period,), generator=generator)
    words = torch.tensor(plain)[shuffled[:period]]
    ids = torch.cat([torch.tensor([first_of(adapter, tokenizer)]), words.repeat(repeats)])[None]
    ids = ids.to(adapter.model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, period


def visual(adapter: Adapter, pictures: dict[str, Tensor], repeats: int, seed: int) -> Tensor:
    """[layers, Hk] echo among the visual tokens of a prompt that shows one picture again and again.

    Raises:
        UnsupportedError: a family whose pictures are seen both ways.
        ConfigError: the prompt is longer than the model takes.
    """
    if adapter.both_ways:
        raise UnsupportedError(
            f"--images: tokens of a picture see each other both ways in {adapter.model_type}, and this probe looks "
            "back only; leave it out"
        )
    text = 4 + 2 * len(adapter.layouts("image", pictures))  # some families have text between crops
    inputs = random_prompt(adapter, images=repeats, text_tokens=text, seed=seed, pictures=pictures).inputs
    (ids,), most = inputs["input_ids"], adapter.lm.config.max_position_embeddings
    if len(ids) > most:
        raise ConfigError(
            f"{repeats} times this picture are {len(ids)} tokens, more than the {most} that this model takes; give a "
            "smaller one, or lower --repeats"
        )
    marks = torch.tensor([*adapter.placeholders.values()], device=ids.device)
    places = torch.isin(ids, marks).nonzero()[:, 0].view(repeats, -1)
    return watch(adapter, inputs, lambda q, k, scale: [shown(q, k, scale, places)])[0]


def ordinary(adapter: Adapter, tokenizer: Any) -> list[int]:
    """The ids that stand for text and nothing else."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    special |= {*adapter.placeholders.values(), *adapter.embedded.values()}
    size = min(len(tokenizer), adapter.lm.config.vocab_size)
    return [i for i in range(size) if i not in special]


def first_of(adapter: Adapter, tokenizer: Any) -> int:
    """BOS, or what a model without one is given to begin with."""
    ids = (tokenizer.bos_token_id, adapter.lm.config.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((i for i in ids if i is not None), 0)
