"""`vtoken calibrate attention_exit`: the attention below which images may leave, for a share of unchanged answers or a
mean layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import model_validator

from vtoken.compressors.decoder.attention_exit import AttentionExit
from vtoken.errors import ConfigError
from vtoken.evals.calibrate._attention import Point, search, see
from vtoken.evals.calibrate._report import pipeline_file, tell_pipeline
from vtoken.evals.shared.options import DATA, ModelCommand, option
from vtoken.evals.shared.samples import load, read
from vtoken.evals.shared.whole import check_folder
from vtoken.evals.statistics import wilson

SUMMARY = "the share of attention below which images leave (attention_exit)"
DESCRIPTION = """\
Notes how much attention images get in every layer, and what the model would answer if they left there: one dense run
per question and the deeper layers on text alone. Takes the largest threshold such that it and all smaller ones meet the
target. Questions that images must answer late count as any other: give questions of every kind the model will get."""
EXAMPLES = """examples:
  vtoken calibrate attention_exit tiny-llava -o exit.yaml                  # 99 % of the answers stay what they were
  vtoken calibrate attention_exit llava-hf/llava-1.5-7b-hf --data mine.jsonl --limit 500 --accuracy 0.98 -o exit.yaml
  vtoken calibrate attention_exit tiny-llava --mean-layer 3 --json | jq .threshold
  vtoken bench tiny-llava exit.yaml
"""
SHOWN = 8  # thresholds in the table
TARGETS = ("agreement", "accuracy", "mean_layer")


class Settings(ModelCommand):
    data: str | None = option(None, f"{DATA} (default: the last of the shipped)", "DATA")
    limit: int = option(100, "so many questions", ge=1)
    agreement: float | None = option(None, "of answers that stay word for word (default: 0.99)", "SHARE", gt=0, le=1)
    accuracy: float | None = option(
        None, "of the dense model's right answers, in place of --agreement; DATA must hold answers", "SHARE", gt=0, le=1
    )
    mean_layer: float | None = option(
        None, "images leave before this layer on average, in place of --agreement", "K", ge=0
    )
    first: int | None = option(
        None, "first layer that may do without (default: the best from half of the depth on)", "K", ge=1
    )
    window: int = option(1, "text tokens that are asked", ge=1)
    patience: int = option(1, "layers in a row", ge=1)
    sinks: int = option(0, "percent left out", "P", ge=0, le=50)
    out: Path | None = pipeline_file()

    @model_validator(mode="after")
    def _one_target(self) -> Settings:
        if sum(getattr(self, name) is not None for name in TARGETS) > 1:
            raise ValueError("give one of --agreement, --accuracy and --mean-layer")
        return self

    def target(self) -> tuple[str, float]:
        """What the threshold must reach, and how much of it."""
        return next(
            ((name, value) for name in TARGETS if (value := getattr(self, name)) is not None), ("agreement", 0.99)
        )


def run(asked: Settings) -> None:
    """Finds the threshold and writes the pipeline."""
    kind, target = asked.target()
    check_folder(asked.out)
    samples = read(asked.data, asked.limit, answered=kind == "accuracy")
    model, processor = load(asked.model, asked.device, asked.dtype)
    depth = model.config.get_text_config().num_hidden_layers
    tried = range(max(1, depth // 2), depth) if asked.first is None else range(asked.first, asked.first + 1)
    behind = depth - tried[0]
    if not 1 <= tried[0] < depth:
        raise ConfigError(
            f"--first must lie between 1 and {depth - 1}, the last layer of {asked.model}; not {asked.first}"
        )
    if not 1 <= asked.patience <= behind:
        raise ConfigError(
            f"--patience must lie between 1 and {behind}, the layers from {tried[0]} on; not {asked.patience}"
        )
    options = {"window": asked.window, "patience": asked.patience, "sinks": asked.sinks}
    seen = see(model, processor, samples, AttentionExit(first=tried[0], **options))
    first, best, points = search(seen, tried, kind, target, depth)
    options = {"first": first, **options}
    low, high = wilson(round(best.agreement * len(samples)), len(samples))
    figures = {"questions": len(samples), "target": {kind: target}, "depth": depth, **options, **asdict(best)}
    figures |= {"agreement_interval": [low, high], "curve": [asdict(each) for each in points]}
    about = (
        f"attention_exit for {asked.model}: of {len(samples)} questions {best.agreement:.1%} are answered as before "
        f"(95 % interval {low:.0%} to {high:.0%}, of other questions of their kind), "
        f"with {best.mean_layer / depth:.1%} of the visual tokens on average over layers."
    )
    stage = {"attention_exit": {"threshold": best.threshold, **options}}
    tell_pipeline(asked, figures, table(points, best, depth), about, stage)


def table(points: Sequence[Point], best: Point, depth: int) -> list[tuple[str, ...]]:
    """Head and rows: some thresholds, the chosen one among them."""
    step = max(1, -(-len(points) // SHOWN))
    mean = "visual tokens, mean over layers"
    rows: list[tuple[str, ...]] = [("threshold", "answers as dense", "right / dense", "leave before layer", mean, "")]
    for k, point in enumerate(points):
        if k % step and point != best and k < len(points) - 1:
            continue
        shares = f"{point.agreement:.1%}", "n/a" if point.accuracy is None else f"{point.accuracy:.1%}"
        layers = f"{point.mean_layer:.2f}", f"{point.mean_layer / depth:.1%}"
        rows.append((f"{point.threshold:g}", *shares, *layers, "chosen" if point == best else ""))
    return rows
