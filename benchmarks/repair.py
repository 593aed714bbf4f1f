"""What stages that change answers repair of what pruning damages, on a reference model's held-out questions:
`python benchmarks/repair.py tiny-llava --limit 96`. Minutes on a CPU.

Every repair is compared, question by question, with the same pruning without it: questions that only one of the two
answers, and the p of McNemar's exact test.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Runs from a checkout that is not installed, too.

PRUNED = ("uniform:25%", "fastervlm:16", "none")
SINK = 4.0  # in 128 channels none can be 20 root mean squares long
REPAIRS: dict[str, dict[str, Any]] = {
    "amplify 1.5": {"amplify": {"gamma": 1.5}},
    "amplify 2": {"amplify": {"gamma": 2.0}},
    "amplify 4": {"amplify": {"gamma": 4.0}},
    "amplify 2, salient": {"amplify": {"gamma": 2.0, "tokens": "salient", "keep": "25%", "measured": 1}},
    f"var, tau {SINK:g}": {"var": {"tau": SINK}},
    "damro 0.5": {"contrast": {"stages": [{"fastervlm": {"keep": 10}}], "alpha": 0.5}},
    "damro 2": {"contrast": {"stages": [{"fastervlm": {"keep": 10}}], "alpha": 2.0}},
    "one token, 1": {"contrast": {"stages": [{"uniform": {"keep": 1}}], "alpha": 1.0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-llava", help="shipped model (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=96, metavar="N", help="questions (default: %(default)s)")
    given = parser.parse_args()
    import torch

    import vtoken
    from vtoken.evals import reference
    from vtoken.evals.statistics import mcnemar, wilson

    torch.set_num_threads(1)
    model, processor = reference.load(given.model)
    questions = reference.questions(given.limit)

    def right(pipeline: dict[str, Any]) -> tuple[list[bool], float]:
        began = time.perf_counter()
        with vtoken.wrapped(model, pipeline):
            said = reference.answers(model, processor, questions)
        pairs = zip(said, questions, strict=True)
        return [a.split() == q.answer.split() for a, q in pairs], time.perf_counter() - began

    print(
        "| pruned by | repair | right | 95 % | won | lost | p | time |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name in PRUNED:
        stages = [] if name == "none" else [name]
        plain, took = right({"stages": stages})
        for repair, what in {"": {}, **REPAIRS}.items():
            against = {"contrast": what["contrast"]} if "contrast" in what else {}
            mine, spent = (
                right({"stages": [*stages, *([what] if what and not against else [])], **against})
                if what
                else (plain, took)
            )
            won, lost = (sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((mine, plain), (plain, mine)))
            low, high = wilson(sum(mine), len(mine))
            figures = f"{100 * sum(mine) / len(mine):.1f} | {100 * low:.0f}–{100 * high:.0f} | {won} | {lost}"
            print(
                f"| {name} | {repair or '-'} | {figures} | {mcnemar(lost, won):.2g} | {spent / took:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
