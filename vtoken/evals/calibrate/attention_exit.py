"""`vtoken calibrate attention_exit`: the attention below which images may leave, for a share of unchanged answers or a mean layer."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtoken.compressors._exits import asked
from vtoken.compressors.attention_exit import AttentionExit
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.calibrate._report import add_json, add_out, check_out, tell_pipeline
from vtoken.evals.samples import ABOUT, Sample, answer_of, continued, load, prepare, read
from vtoken.evals.withdraw import Withdrawal
from vtoken.stages import Keep, VisualTokens, keep_all
from vtoken.wrap import wrapped

SUMMARY = "the share of attention below which images leave (attention_exit)"
ANSWER = 64  # tokens of an answer that count
SHOWN = 8  # thresholds in the table
EXAMPLES = """examples:
  vtoken calibrate attention_exit tiny-llava -o exit.yaml                  # 99 % of the answers stay what they were
  vtoken calibrate attention_exit llava-hf/llava-1.5-7b-hf --data mine.jsonl --limit 500 --accuracy 0.98 -o exit.yaml
  vtoken calibrate attention_exit tiny-llava --mean-layer 3 --json | jq .threshold
  vtoken bench tiny-llava exit.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the method's options."""
    parser.description = (
        "Notes how much attention images get in every layer, and what the model would answer if they left there: one dense run per\n"
        "question and the deeper layers on text alone. Takes the largest threshold such that it and all smaller ones meet the target."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="shipped model, folder or hub id")
    parser.add_argument("--data", metavar="DATA", help=f"{ABOUT} (default: the last of the shipped)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="so many questions (default: %(default)s)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--agreement", type=float, metavar="SHARE", help="of answers that stay word for word (default: 0.99)"
    )
    target.add_argument(
        "--accuracy", type=float, metavar="SHARE", help="of the dense model's right answers; DATA must hold answers"
    )
    target.add_argument("--mean-layer", type=float, metavar="K", help="images leave before this layer on average")
    parser.add_argument(
        "--first", type=int, metavar="K", help="first layer that may do without (default: half of the depth)"
    )
    parser.add_argument(
        "--window", type=int, default=1, metavar="N", help="text tokens that are asked (default: %(default)s)"
    )
    parser.add_argument("--patience", type=int, default=1, metavar="N", help="layers in a row (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=0, metavar="P", help="percent left out (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: that of the weights)")
    add_out(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Finds the threshold and writes the pipeline.

    Raises:
        VtokenError: a target that no threshold meets, or a model, data or option that cannot be used.
    """
    targets = {name: getattr(args, name) for name in ("agreement", "accuracy", "mean_layer")}
    (kind, target), *_ = [pair for pair in targets.items() if pair[1] is not None] or [("agreement", 0.99)]
    if kind != "mean_layer" and not 0 < target <= 1:
        raise ConfigError(f"--{kind} is a share, above 0 and at most 1, not {target:g}")
    if args.limit < 1:
        raise ConfigError(f"--limit must be at least 1 question, not {args.limit}")
    check_out(args.out)
    samples = read(args.data, args.limit) if args.data else read("reference")[-args.limit :]
    if kind == "accuracy" and any(sample.answer is None for sample in samples):
        raise ConfigError(f"--accuracy needs an answer to every question; {args.data} lacks some, or use --agreement")
    model, processor = load(args.model, args.device, args.dtype)
    depth = model.config.get_text_config().num_hidden_layers
    first = depth // 2 if args.first is None else args.first
    if not 1 <= first < depth:
        raise ConfigError(f"--first must lie between 1 and {depth - 1}, the last layer of {args.model}; not {first}")
    if not 1 <= args.patience <= depth - first:
        raise ConfigError(
            f"--patience must lie between 1 and {depth - first}, the layers from {first} on; not {args.patience}"
        )
    options = {"first": first, "window": args.window, "patience": args.patience, "sinks": args.sinks}
    seen = see(model, processor, samples, AttentionExit(**options))
    points = curve(seen)
    best = choose(points, kind, target, depth)
    told = {"questions": len(samples), "target": {kind: target}, "depth": depth, **options, **asdict(best)}
    about = (
        f"attention_exit for {args.model}: of {len(samples)} questions {best.agreement:.1%} are answered as before, with "
        f"{best.mean_layer / depth:.1%} of the visual tokens on average over layers."
    )
    stage = {"attention_exit": {"threshold": best.threshold, **options}}
    tell_pipeline(args, {**told, "curve": [asdict(each) for each in points]}, table(points, best, depth), about, stage)
    return 0


@dataclass(frozen=True)
class Seen:
    """What was seen of S samples, for exits before the decoder layers that the stage asks at, E of them up to the last.

    Attributes:
        heard: [S, E] what the stage would hold against its threshold; infinite where it asks nobody.
        same: [S, E + 1] whether the answer is the dense model's if images leave there; the last column: they stay.
        right: [S, E + 1] whether it is the sample's answer, token by token; None where a sample has none.
    """

    heard: Tensor
    same: Tensor
    right: Tensor | None
    first: int
    patience: int


@dataclass(frozen=True)
class Point:
    """A threshold and what it does.

    Attributes:
        agreement: share of answers that stay the dense model's.
        accuracy: right answers, as a share of the dense model's; None without answers, or where that gives none.
        mean_layer: before which images leave; the depth where they stay.
    """

    threshold: float
    agreement: float
    accuracy: float | None
    mean_layer: float


class Probe(AttentionExit):
    """Notes what the stage would hold against its threshold; nobody leaves."""

    noted: Any

    def select(self, tokens: VisualTokens) -> Keep:
        self.noted.append(self.heard(tokens)[0].item() if asked(tokens)[0] else math.inf)
        return keep_all(tokens)


def see(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    stage: AttentionExit,
    progress: Callable[[int], None] = lambda done: None,
) -> Seen:
    """Runs every sample once densely, and on text alone from every layer on that the stage asks at."""
    depth = model.config.get_text_config().num_hidden_layers
    layers = stage.layers(depth)
    heard, same, right = [], [], []
    for done, sample in enumerate(samples, 1):
        prompt, noted = prepare(model, processor, sample), list[float]()
        with wrapped(model, [Probe(**stage.model_dump(), noted=noted)]), torch.no_grad():
            said = model.generate(**prompt, do_sample=False, max_new_tokens=ANSWER)[0, prompt["input_ids"].shape[1] :]
        heard.append(noted)
        same.append([*keeps(model, prompt, said, layers), True])
        if sample.answer is not None:
            wanted = answer_of(model, processor, sample, prompt, ANSWER)
            known = torch.equal(wanted, said)
            right.append(same[-1] if known else [*keeps(model, prompt, wanted, layers), False])
        progress(done)
    answered = torch.tensor(right) if len(right) == len(same) else None
    return Seen(torch.tensor(heard, dtype=torch.float64), torch.tensor(same), answered, layers[0], stage.patience)


def keeps(model: Any, prompt: dict[str, Tensor], answer: Tensor, layers: Sequence[int]) -> list[bool]:
    """Whether greedy decoding gives this answer if images leave before each of the layers."""
    run = Withdrawal(model, continued(prompt, answer))
    return [bool((run.without(k)[-len(answer) - 1 : -1].argmax(1) == answer).all()) for k in layers]


def curve(seen: Seen) -> list[Point]:
    """What every threshold does that lies between two values that were heard, the smallest first: with it nobody leaves."""
    values = [0.0, *seen.heard[seen.heard <= 1].unique().tolist()]
    return [_point(seen, between(a, b)) for a, b in pairwise([*values, 1.0]) if a < b] or [_point(seen, 1.0)]


def between(low: float, high: float) -> float:
    """A number of few digits above `low` and below `high`, near the middle."""
    middle = (low + high) / 2
    return next((n for n in (round(middle, digits) for digits in range(2, 18)) if low < n < high), middle)


def leaves_at(heard: Tensor, threshold: float, patience: int) -> Tensor:
    """[S] the column of heard [S, E] at which images leave, E where they stay."""
    calm = (heard < threshold).unfold(1, patience, 1).all(-1)
    never = torch.ones(len(heard), heard.shape[1] + 1, dtype=torch.bool)
    never[:, :-1] = False
    never[:, patience - 1 : -1] = calm
    return never.int().argmax(1)


def _point(seen: Seen, threshold: float) -> Point:
    at = leaves_at(seen.heard, threshold, seen.patience)[:, None]
    accuracy = None
    if seen.right is not None and seen.right[:, -1].any():
        accuracy = (seen.right.gather(1, at).sum() / seen.right[:, -1].sum()).item()
    agreement = seen.same.gather(1, at).double().mean().item()
    return Point(threshold, agreement, accuracy, seen.first + at.double().mean().item())


def choose(points: Sequence[Point], kind: str, target: float, depth: int) -> Point:
    """The largest threshold such that it and all smaller ones keep the share; of a mean layer the smallest that reaches it.

    Raises:
        VtokenError: none does, or none that lets an image go.
    """
    if kind == "mean_layer":
        best = next((point for point in points if point.mean_layer <= target), None)
        if best is None:
            lowest = points[-1].mean_layer
            raise VtokenError(
                f"images leave before layer {lowest:.2f} at the earliest, not {target:g}; lower --first, or --patience"
            )
        return best
    if points[0].accuracy is None and kind == "accuracy":
        raise VtokenError(
            "the dense model gives none of the answers word for word, so no accuracy can be kept; use --agreement"
        )
    worse = next((k for k, point in enumerate(points) if getattr(point, kind) < target), len(points))
    if worse and points[worse - 1].mean_layer < depth:
        return points[worse - 1]
    told = f"the next one leaves {getattr(points[worse], kind):.1%}" if worse < len(points) else "nobody was asked"
    raise VtokenError(
        f"no threshold that lets an image go keeps {kind} at {target:.1%}: {told}; this model reads its images to the end, or raise "
        "--first, or ask for less"
    )


def table(points: Sequence[Point], best: Point, depth: int) -> list[tuple[str, ...]]:
    """Head and rows: some thresholds, the chosen one among them."""
    step = max(1, -(-len(points) // SHOWN))
    shown = [point for k, point in enumerate(points) if k % step == 0 or point == best or k == len(points) - 1]
    head = (
        "threshold",
        "answers as dense",
        "right / dense",
        "leave before layer",
        "visual tokens, mean over layers",
        "",
    )
    rows = [
        (
            f"{point.threshold:g}",
            f"{point.agreement:.1%}",
            "n/a" if point.accuracy is None else f"{point.accuracy:.1%}",
            f"{point.mean_layer:.2f}",
            f"{point.mean_layer / depth:.1%}",
            "chosen" if point == best else "",
        )
        for point in shown
    ]
    return [head, *rows]
