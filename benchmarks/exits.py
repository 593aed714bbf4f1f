"""Exits on the shipped tiny-llava: accuracy against visual tokens, on shipped questions: `python benchmarks/exits.py`.
Markdown to stdout, minutes on a CPU.

The gates of dyvte were trained on other pictures (`vtoken train-exit`). Tokens are measured: averaged over decoder
layers and questions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Runs from a checkout that is not installed, too.

PIPELINES = (
    "none",
    "dyvte-tiny-llava",
    "vtw:layer=3",
    "vtw:layer=2",
    "todre_exit",
    "attention_exit",
    "attention_exit:threshold=0.02",
    "attention_exit:first=1",
)
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=384, metavar="N", help="first N questions (default: %(default)s)")
    parser.add_argument("pipelines", nargs="*", default=PIPELINES, help="instead of the usual ones")
    given = parser.parse_args()

    from vtoken.evals import reference

    model, processor = reference.load()
    asked = reference.questions(given.limit)
    print(f"tiny-llava, first {len(asked)} shipped questions, exact match, greedy, batch {BATCH}\n")
    print("| pipeline | tokens, mean over layers | right | " + " | ".join(reference.KINDS) + " |")
    print("|---|---|---|" + "---|" * len(reference.KINDS))
    for name in given.pipelines:
        table, tokens = measured(model, processor, asked, name)
        right = sum(r for r, _ in table.values()) / len(asked)
        kinds = " | ".join(f"{table[kind][0] / table[kind][1]:.1%}" for kind in reference.KINDS)
        print(f"| {name} | {tokens:.0f} | {right:.1%} | {kinds} |", flush=True)


def measured(model: Any, processor: Any, asked: Any, name: str) -> tuple[dict[str, tuple[int, int]], float]:
    """Right answers by kind, and visual tokens of a question averaged over decoder layers."""
    import vtoken
    from vtoken.evals import reference

    said, total = [], 0.0
    # A pipeline without stages leaves no trace to count by.
    with vtoken.wrapped(model, "uniform:100%" if name == "none" else name):
        for start in range(0, len(asked), BATCH):
            said += reference.answers(model, processor, asked[start : start + BATCH], BATCH)
            total += vtoken.trace(model).average_tokens
    return reference.score(asked, said), total / len(asked)


if __name__ == "__main__":
    main()
