"""Merging with and without VTU, and what drops tokens inside the decoder: accuracy against FLOPs on a shipped model.

`python benchmarks/merging.py tiny-llava --out DIR`; one core does a pipeline of tiny-llava-next in some 20 seconds, of
the others in 10. Thresholds, gates, tables and exits are calibrated on pictures from the training halves
(DIR/calibration); questions are the shipped, held-out ones. What is in DIR is not asked again. Writes DIR/MODEL.md and
DIR/MODEL.png.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Runs from a checkout that is not installed, too.

SIZE = (192, 192)  # pixels of the shipped pictures
BATCH = 16
BUDGETS = {"high": 1 / 3, "mid": 2 / 3, "low": 7 / 8}  # of calibrate dtome: the share that merges if every layer merges
BUDGET = re.compile(r" (high|mid|low)|:\d+|, layer \d+|(?<=attention_exit), 0.*")  # of a label
SEED, PICTURES = 4711, 300
TRAINED = 600  # questions that gates and exits are made from
Pipeline = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="shipped model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, default=192, metavar="N", help="first N questions (default: %(default)s)")
    parser.add_argument("--groups", nargs="+", choices=("merging", "decoder"), default=("merging", "decoder"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    from vtoken.evals import reference

    made = Made(given.model, given.out / "calibration")
    model, processor = reference.load(given.model)
    asked = reference.questions(given.limit)
    rows = [point(model, processor, asked, given, "", "dense", [])]
    for group in given.groups:
        for label, pipeline in getattr(Lineup(model, made), group)():
            rows.append(point(model, processor, asked, given, group, label, pipeline))
    write(rows, [q.image for q in asked], given.out / given.model)


class Made:
    """Files that stages read, made by vtoken's own commands when they are first asked for."""

    def __init__(self, model: str, folder: Path) -> None:
        from reference_models.heldout import write

        self.model, self.folder, self.data = model, folder, folder / "pictures"
        if not (self.data / "questions.jsonl").exists():
            write(self.data, PICTURES, SEED, "train")

    def file(self, name: str, *command: str) -> str:
        from vtoken.cli import main

        out = self.folder / f"{self.model}-{name}"
        if not out.exists() and main([command[0], *command[1:], "-o", str(out)]):
            raise SystemExit(f"vtoken {' '.join(command)} failed")
        return str(out)

    def thresholds(self, budget: str) -> str:
        pictures = ("--images", str(self.data), "--limit", "64", "--budget", budget)
        return self.file(f"{budget}.safetensors", "calibrate", "dtome", self.model, *pictures)

    def gates(self) -> str:
        shape = ("--hidden", "64", "--epochs", "40", "--batch", "32", "--rate", "1e-3")
        data = ("--data", str(self.data), "--limit", str(TRAINED))
        return self.file("gates.safetensors", "train-exit", self.model, *data, *shape)

    def pipeline(self, method: str, *options: str, limit: int) -> Pipeline:
        from vtoken.config import yaml_source as source

        data = ("--data", str(self.data), "--limit", str(limit))
        name = "-".join([method, *(o.strip("-") for o in options)]) + ".yaml"
        made = Path(self.file(name, "calibrate", method, self.model, *data, *options))
        stages: Pipeline = source.read(made)[0]["stages"]
        return stages


class Lineup:
    """Labelled pipelines of a model, by group."""

    def __init__(self, model: Any, made: Made) -> None:
        from vtoken.evals.cost.flops import account

        self.model, self.made = model, made
        dense = account(model.config, image_size=SIZE)
        self.tokens, self.depth = dense.visual_entry, len(dense.visual_tokens)
        self.packed = model.config.model_type.startswith("qwen")
        self.crop = self.tokens if not hasattr(model.config, "image_grid_pinpoints") else self.tokens // 5

    def merging(self) -> Iterator[tuple[str, Pipeline]]:
        """Mergers at three budgets, each with and without VTU; even choice at as many tokens."""
        for budget, share in BUDGETS.items():
            mergers: dict[str, dict[str, Any]]
            thresholds = {"thresholds": self.made.thresholds(budget)}
            if self.packed:
                left = self.tokens - round(share * self.tokens)
                mergers = {"dtome_post": thresholds, "visionzip": {"keep": left}}
            else:
                r = round(share * self.crop / 4)  # four layers, of which the last is behind the features
                left = self.tokens - 3 * r * (self.tokens // self.crop)
                mergers = {"tome": {"r": r}, "dtome": thresholds}
            for name, options in mergers.items():
                yield f"{name} {budget}", [{name: options}]
                yield f"{name} {budget}, vtu", [{name: options}, {"vtu": {}}]
            yield f"uniform:{left}", [{"uniform": {"keep": left}}]

    def decoder(self) -> Iterator[tuple[str, Pipeline]]:
        """What acts in the decoder, at half of the tokens on average over its layers where a budget can be set."""
        half = self.tokens // 2
        yield f"uniform:{half}", [{"uniform": {"keep": half}}]
        if not self.packed:
            yield f"vscan:{half}", [{"vscan": {"keep": half, "local_layer": 1}}]
        for name in ("fastv", "dart", "sparsevlm"):
            yield self.halved(name, lambda n, name=name: [{name: {"keep": n, "layer": 2}}])
        yield self.halved("pyramiddrop", lambda n: [{"pyramiddrop": {"keep": f"{100 * n / self.tokens:.2f}%"}}])
        if not self.packed:
            yield self.halved("vscan, vscan_late", lambda n: [{"vscan": {"keep": n, "local_layer": 1}}, "vscan_late"])
        late = {"flowcut_late": {"keep": "50%", "layer": 2}}
        crops = self.tokens // self.crop
        yield self.halved("flowcut, flowcut_late", lambda n: [{"flowcut": {"keep": max(1, n // crops)}}, late])
        yield "fitprune", self.made.pipeline("fitprune", "--reduction", "50", limit=16)
        for layer in range(-(-self.depth // 2), self.depth):
            yield f"vtw, layer {layer}", [{"vtw": {"layer": layer}}]
        yield "dyvte", [{"dyvte": {"gates": self.made.gates()}}]
        yield "todre_exit", [{"todre_exit": {}}]
        yield "attention_exit, defaults", [{"attention_exit": {}}]
        for share in ("0.99", "0.95"):
            # The command says why if no threshold keeps so many answers; then there is nothing to ask.
            with suppress(SystemExit):
                exits = self.made.pipeline("attention_exit", "--agreement", share, limit=96)
                yield f"attention_exit, {share} of the answers as dense", exits

    def halved(self, name: str, make: Callable[[int], Pipeline]) -> tuple[str, Pipeline]:
        """The pipeline with the smallest count that gives half of the tokens on average over layers."""
        from vtoken.config import load
        from vtoken.evals.cost.flops import account

        def average(n: int) -> float:
            return account(self.model.config, load(make(n)), image_size=SIZE).visual_average

        n = 1 + bisect_left(range(1, self.tokens + 1), self.tokens / 2, key=average)
        return f"{name}:{n}", make(min(n, self.tokens))


def point(model: Any, processor: Any, asked: Any, given: Any, group: str, label: str, stages: Any) -> dict[str, Any]:
    """One pipeline asked, or what is known of it from before."""
    import vtoken
    from vtoken import config
    from vtoken.evals import reference

    store, pipeline = given.out / f"{given.model}.jsonl", config.load(stages)
    key = f"{len(asked)} {config.dump(pipeline)}"
    for line in store.read_text().splitlines() if store.exists() else ():
        if (known := json.loads(line))["key"] == key:
            return {**known, "group": group, "label": label}
    said, seen = [], []
    with vtoken.wrapped(model, pipeline):
        for start in range(0, len(asked), BATCH):
            said += reference.answers(model, processor, asked[start : start + BATCH], BATCH)
            trace = vtoken.trace(model)
            columns = zip(*trace.layers, strict=True)
            seen += [(n, list(c)) for n, c in zip(trace.prompt_tokens, columns, strict=True)]
    right = [int(a.split() == q.answer.split()) for a, q in zip(said, asked, strict=True)]
    averages = [sum(c) / len(c) for _, c in seen]
    row = {
        "entry": sum(c[0] for _, c in seen) / len(seen),
        "average": sum(averages) / len(seen),
        "right": right,
        **flops(model.config, pipeline, seen),
    }
    with store.open("a") as file:
        file.write(json.dumps({"key": key, **row}) + "\n")
    print(f"{label}: {row['average']:.0f} tokens, {sum(right)} of {len(right)}", file=sys.stderr, flush=True)
    return {**row, "group": group, "label": label}


def flops(config: Any, pipeline: Any, seen: Sequence[tuple[int, list[int]]]) -> dict[str, float]:
    """FLOPs of a prefill, mean over questions: tower, projector and stages as planned, the decoder by the tokens that
    it was seen to have.

    Args:
        seen: per question, the prompt's tokens that entered the decoder, and the visual ones in each of its layers.
    """
    from vtoken.evals.cost.flops import account
    from vtoken.evals.cost.geometry.decoder import decoder

    stack, dense = decoder(config.get_text_config()), account(config, image_size=SIZE, new_tokens=1)
    places = dense.visual_entry if any(stage.unmerge_mode() for stage in pipeline.stages) else None
    linear = attention = texts = 0
    for prompt, counts in seen:
        others = prompt - counts[0]
        texts += others
        for layer, n in enumerate(counts):
            keys = others + (n if places is None else places)
            linear += stack.linear(others + n, layer)
            attention += 2 * stack.scores(keys, keys)
    planned = account(
        config, pipeline, image_size=SIZE, new_tokens=1, text_tokens=round(texts / len(seen)) - dense.newline_entry
    )
    head = 2 * stack.width * config.get_text_config().vocab_size
    language = (linear + attention) / len(seen) + head
    return {"flops": planned.tower + planned.projector + planned.stages + language, "language": language}


def write(rows: list[dict[str, Any]], pictures: Sequence[Path], stem: Path) -> None:
    """Table and picture. What VTU won and lost: questions against the same pipeline without it, McNemar's p."""
    from vtoken.evals.statistics import paired

    dense = rows[0]
    lines = [
        "| pipeline | tokens at entry | mean over layers | right | of dense (95 %, paired) | FLOPs | of which LLM | "
        "VTU won / lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    plain = {row["label"]: row["right"] for row in rows}
    for row in rows:
        share = paired(row["right"], dense["right"], pictures).of_dense
        assert share is not None
        kept = f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"
        right = 100 * sum(row["right"]) / len(row["right"])
        costs = " | ".join(f"{100 * row[cost] / dense[cost]:.0f} %" for cost in ("flops", "language"))
        bought, before = "", plain.get(row["label"].removesuffix(", vtu"))
        if before is not None and before is not row["right"]:
            found = paired(row["right"], before, pictures)
            bought = f"{found.won} / {found.lost}, p {found.p:.2f}"
        counts = f"{row['entry']:.0f} | {row['average']:.0f}"
        lines.append(f"| {row['label']} | {counts} | {right:.1f} % | {kept} | {costs} | {bought} |")
    stem.with_name(f"{stem.name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(rows, stem)


def draw(rows: list[dict[str, Any]], stem: Path) -> None:
    """Accuracy against FLOPs, a panel per group; lines join a method's budgets."""
    from matplotlib.figure import Figure

    groups = [group for group in ("merging", "decoder") if any(row["group"] == group for row in rows)]
    figure = Figure(figsize=(6 * len(groups), 4.5), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        methods: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["group"] == group:
                methods.setdefault(BUDGET.sub("", row["label"]), []).append(row)
        for k, (name, points) in enumerate(methods.items()):
            points.sort(key=lambda row: row["flops"])
            x = [100 * row["flops"] / rows[0]["flops"] for row in points]
            y = [100 * sum(row["right"]) / len(row["right"]) for row in points]
            axes.plot(
                x, y, "--" if "vtu" in name else "-", marker="os^Dv<>pP*Xh"[k % 12], color=f"C{k % 10}", label=name
            )
        axes.axhline(100 * sum(rows[0]["right"]) / len(rows[0]["right"]), color="black", linewidth=0.8, label="dense")
        axes.set(xlabel="FLOPs of a prefill, % of dense", ylabel="questions right, %", title=group, ylim=(0, 103))
        axes.legend(fontsize=8)
    figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=120)


if __name__ == "__main__":
    main()
