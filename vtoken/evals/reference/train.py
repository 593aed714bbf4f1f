"""Train the shipped reference VLM: `python -m vtoken.evals.reference.train --out DIR`.

Writes DIR/stages (one checkpoint per cycle of a stage; a finished one is skipped when the command is run again) and DIR/tiny-llava (model, processor, figures.json).
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from . import KINDS, answers, build, questions, score
from .stages import Heads, Oracle, Recipe, joint_stage, language_stage, projector_stage, tower_stage

PLAN = ("a1", "b1", "b2", "b3", "b4", "b5", "c1", "c2", "d1", "b6", "c3", "d2", "d3")


def _keep(file: Path, modules: dict[str, torch.nn.Module]) -> None:
    """Write, then rename: an interrupted run leaves no half checkpoint."""
    part = file.with_suffix(".part")
    torch.save({name: module.state_dict() for name, module in modules.items()}, part)
    part.replace(file)


def _restore(file: Path, modules: dict[str, torch.nn.Module]) -> None:
    for name, state in torch.load(file, map_location="cpu", weights_only=True).items():
        modules[name].load_state_dict(state)


def figures(model: Any, processor: Any, recipe: Recipe, seconds: float, limit: int | None) -> dict:
    """Accuracy on the shipped questions and the conditions, for the card."""
    asked = questions(limit)
    model.eval()
    table = score(asked, answers(model, processor, asked))
    right, total = (sum(pair[k] for pair in table.values()) for k in (0, 1))
    return {
        "recipe": vars(recipe),
        "minutes": round(seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accuracy": {kind: {"right": table[kind][0], "n": table[kind][1]} for kind in KINDS if kind in table},
        "overall": {"right": right, "n": total},
    }


def train(out: Path, recipe: Recipe, only: list[str] | None = None, limit: int | None = None) -> None:
    """Run PLAN in order, or only the named cycles; what is finished is restored. At the end of PLAN the model and its figures are written."""
    folder = out / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model: Any = build.model()
    model.to(recipe.device)
    processor = build.processor()
    heads, oracle = Heads().to(recipe.device), Oracle(recipe.seed).to(recipe.device)
    tower, language = model.model.vision_tower, {"language": model.model.language_model, "head": model.lm_head}
    sight = {"tower": tower, "heads": heads, "projector": model.model.multi_modal_projector}

    def check() -> str:
        sample = questions(48 if limit is None else limit)
        model.eval()
        table = score(sample, answers(model, processor, sample))
        model.train()
        return " ".join(f"{kind} {right}/{total}" for kind, (right, total) in table.items())

    stages: dict[str, tuple[dict[str, torch.nn.Module], Callable[[int], None]]] = {
        "a": ({"tower": tower, "heads": heads}, lambda _: tower_stage(tower, heads, recipe)),
        "b": (language, partial(language_stage, model, oracle, recipe)),
        "c": (sight, partial(projector_stage, model, heads, oracle, recipe)),
        "d": ({**language, **sight}, lambda cycle: joint_stage(model, heads, oracle, recipe, cycle, check)),
    }
    started = time.time()
    for name in PLAN:
        modules, run = stages[name[0]]
        file = folder / f"{name}.pt"
        if not file.exists() and (only is None or name in only):
            run(int(name[1:]) - 1)
            _keep(file, modules)
        if file.exists():
            _restore(file, modules)
    if only is not None and PLAN[-1] not in only:
        return
    final = out / "tiny-llava"
    model.save_pretrained(final)
    processor.save_pretrained(final)
    (final / "figures.json").write_text(
        json.dumps(figures(model, processor, recipe, time.time() - started, limit), indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch decides")
    parser.add_argument(
        "--only", nargs="+", choices=PLAN, help="run these cycles of stages, on top of what is finished"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    recipe = Recipe(seed=given.seed, device=given.device)
    train(given.out, recipe.smoke() if given.smoke else recipe, given.only, 6 if given.smoke else None)


if __name__ == "__main__":
    main()
