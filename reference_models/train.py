"""Train a reference VLM: `python -m reference_models.train --model tiny-llava --out DIR`.

Writes DIR/stages (one checkpoint per cycle of a stage; a finished one is skipped when the command is run again) and
DIR/NAME (model, processor, figures.json). tiny-llava-next and tiny-qwen2.5-vl start from the tiny-llava that is
shipped. `torchrun --nproc-per-node 2 -m reference_models.train ...` shares every batch out among processes, which on a
CPU is faster than as many threads.
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
from transformers.modeling_layers import GradientCheckpointingLayer

from vtoken.evals.reference import KINDS, answers, questions, score

from . import distributed
from .family import Family, Heads
from .hub_form import rewrite
from .llava import TinyLlava
from .llava_next import TinyLlavaNext
from .oracle import Oracle
from .qwen import TinyQwen
from .recipe import Recipe
from .stages import joint_stage, language_stage, projector_stage, tower_stage

FAMILIES: dict[str, Family] = {family.name: family for family in (TinyLlava(), TinyLlavaNext(), TinyQwen())}


def _keep(file: Path, modules: dict[str, torch.nn.Module]) -> None:
    """Write, then rename: an interrupted run leaves no half checkpoint."""
    part = file.with_suffix(".part")
    torch.save({name: module.state_dict() for name, module in modules.items()}, part)
    part.replace(file)


def _restore(file: Path, modules: dict[str, torch.nn.Module]) -> None:
    for name, state in torch.load(file, map_location="cpu", weights_only=True).items():
        modules[name].load_state_dict(state)


def figures(
    model: Any, processor: Any, recipe: Recipe, seconds: float, limit: int | None, heldout: Path | None
) -> dict[str, Any]:
    """Accuracy on held-out questions and the conditions, for the card."""
    asked = questions(limit, heldout)
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


def train(
    family: Family,
    out: Path,
    recipe: Recipe,
    only: list[str] | None = None,
    limit: int | None = None,
    heldout: Path | None = None,
    compiled: bool = False,
) -> None:
    """Run the plan in order, or only the named cycles; what is finished is restored. At the end of the plan the model
    and its figures are written."""
    folder = out / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model = family.model().to(recipe.device).train()
    if compiled:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # every layer of tower and decoder
                module.compile()
    heads, oracle = Heads().to(recipe.device), Oracle(recipe.seed).to(recipe.device)
    sight, language = family.sight(model), {"language": model.model.language_model, "head": model.lm_head}
    seeing = {**sight, "heads": heads}
    stages: dict[str, tuple[dict[str, torch.nn.Module], Callable[[int], None]]] = {
        "a": ({"tower": sight["tower"], "heads": heads}, lambda _: tower_stage(sight["tower"], heads, recipe)),
        "b": (language, partial(language_stage, family, model, oracle, recipe)),
        "c": (seeing, partial(projector_stage, family, model, heads, oracle, recipe)),
        "d": ({**language, **seeing}, partial(joint_stage, family, model, heads, oracle, recipe)),
    }
    started = time.time()
    for name in family.plan:
        modules, run = stages[name[0]]
        file = folder / f"{name}.pt"
        if not file.exists() and (only is None or name in only):
            run(int(name[1:]) - 1)
            if distributed.rank() == 0:
                _keep(file, modules)
            distributed.wait()
        if file.exists():
            _restore(file, modules)
    if distributed.rank() or (only is not None and family.plan[-1] not in only):
        return
    final, processor = out / family.name, family.processor()
    model.save_pretrained(final)
    rewrite(final)
    processor.save_pretrained(final)
    if family.video is not None:
        (final / "video_preprocessor_config.json").write_text(json.dumps(family.video, indent=1) + "\n")
    found = figures(model, processor, recipe, time.time() - started, limit, heldout)
    (final / "figures.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(FAMILIES), default="tiny-llava")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch decides")
    parser.add_argument("--only", nargs="+", metavar="CYCLE", help="run these cycles, on top of what is finished")
    parser.add_argument("--heldout", type=Path, help="held-out set for figures.json; default: the shipped one")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers; needs a C++ compiler")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage")
    given = parser.parse_args()
    family = FAMILIES[given.model]
    if unknown := set(given.only or ()) - set(family.plan):
        parser.error(f"{given.model} has no cycle {', '.join(sorted(unknown))}; its plan is {' '.join(family.plan)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    distributed.join(given.device)
    recipe = Recipe(**{**vars(family.recipe), "seed": given.seed, "device": given.device})
    train(
        family,
        given.out,
        recipe.smoke() if given.smoke else recipe,
        given.only,
        6 if given.smoke else None,
        given.heldout,
        given.compile,
    )


if __name__ == "__main__":
    main()
