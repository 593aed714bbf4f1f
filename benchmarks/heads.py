"""Do the heads that `vtoken calibrate streaming` ranks first matter more than others: `python benchmarks/heads.py
TABLE`. Markdown to stdout, minutes on a CPU.

TABLE is the file that the command wrote for MODEL. Every stage runs with it, with its reverse, and with random orders
of the same numbers, so that equally many heads read everything.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Runs from a checkout that is not installed, too.

STAGES = ({"static_sparse": {"sink": 16, "window": 64, "size": 16, "min_len": 0}},)
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--model", default="tiny-llava", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, default=192, metavar="N", help="first N questions (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=5, metavar="N", help="random orders (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.25, 0.5, 0.75), metavar="X")
    given = parser.parse_args()

    from vtoken.evals import reference

    model, processor = reference.load(given.model)
    asked = reference.questions(given.limit)
    gates = json.loads(given.table.read_text(encoding="utf-8"))
    print(f"{given.model}, first {len(asked)} shipped questions, exact match, greedy, batch {BATCH}\n")
    print(f"dense: {right(model, processor, asked, 'none'):.1%}\n")
    print(
        "| stage | key heads that stream | ranked | reversed | random, mean of "
        + f"{given.draws} (lowest to highest) |"
    )
    print("|---|---:|---:|---:|---:|")
    for stage in STAGES:
        ((name, options),) = stage.items()
        for sparsity in given.sparsity:

            def of(table: Any) -> float:
                pipeline = [{name: {**options, "gates": table, "sparsity": sparsity}}]  # noqa: B023
                return right(model, processor, asked, pipeline)

            drawn = [of(shuffled(gates, seed)) for seed in range(given.draws)]
            mean = sum(drawn) / len(drawn)
            ranked, reversed_ = of(gates), of([[-x for x in row] for row in gates])
            print(
                f"| {name} | {sparsity:.0%} | {ranked:.1%} | {reversed_:.1%} "
                f"| {mean:.1%} ({min(drawn):.1%} to {max(drawn):.1%}) |",
                flush=True,
            )


def right(model: Any, processor: Any, asked: Any, pipeline: Any) -> float:
    """Share of right answers."""
    import vtoken
    from vtoken import config
    from vtoken.evals import reference

    with vtoken.wrapped(model, pipeline if pipeline == "none" else config.load(pipeline)):
        said = reference.answers(model, processor, asked, BATCH)
    return sum(r for r, _ in reference.score(asked, said).values()) / len(asked)


def shuffled(gates: list[list[float]], seed: int) -> list[list[float]]:
    """The same numbers, at random heads."""
    numbers, width = [x for row in gates for x in row], len(gates[0])
    random.Random(seed).shuffle(numbers)
    return [numbers[at : at + width] for at in range(0, len(numbers), width)]


if __name__ == "__main__":
    main()
