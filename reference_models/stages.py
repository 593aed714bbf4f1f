"""The four stages of the recipe. Each cycle of a stage seeds itself, so a finished one can be skipped.

A  tower: which glyph, which colour and which column each patch belongs to; which digits, colours and pairs the picture
holds, told from CLS. Mostly small crops. B  language model on oracle embeddings (glyph + colour + place) with the
background thinned: here the look-ups form, in cheap steps. C  tower and projector regress onto the oracle embeddings.
D  everything jointly on questions, full pictures, with all visual tokens or some of them.

The plan of a model says which cycles it runs. B and C need nothing of each other and may run side by side.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import distributed
from .batches import Pictures, draw, sequences, thinned
from .family import Family, Heads, clip_states, presence_loss
from .oracle import Oracle
from .pictures import MOST, SIZE
from .recipe import Recipe


def fit(groups: list, steps: int, loss_of: Callable, note: Callable, tag: str, every: int = 50) -> None:
    """AdamW, linear warm-up, cosine decay, clipped gradients. `groups` are (parameters, learning rate); `loss_of(step)`
    returns the loss."""
    groups = [{"params": list(parameters), "lr": rate} for parameters, rate in groups]
    every_one = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        return (
            (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.time()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        distributed.average(every_one)
        nn.utils.clip_grad_norm_(every_one, 1.0)
        optimizer.step()
        schedule.step()
        if distributed.rank() == 0 and (step % every == 0 or step == steps - 1):
            print(f"{tag} {step}/{steps} loss {loss.item():.3f} {note()} {time.time() - started:.0f} s", flush=True)


def seeded(recipe: Recipe, stage: int) -> np.random.RandomState:
    seed = 1000 * stage + recipe.seed + 100_000 * distributed.rank()
    torch.manual_seed(seed)
    return np.random.RandomState(seed)


def _autocast(recipe: Recipe) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU: one without instructions for bfloat16 takes eight times as long in it."""
    kind = recipe.device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


def crop_batch(rng: np.random.RandomState, recipe: Recipe, shapes: str = "plain") -> Pictures:
    """Quarters of a picture: as many patches as a full batch, with three times the digits."""
    return draw(rng, distributed.part(recipe.crop_batch), SIZE // 2, (2, 5), shapes).to(recipe.device)


def full_batch(rng: np.random.RandomState, recipe: Recipe, shapes: str = "plain") -> Pictures:
    return draw(rng, distributed.part(recipe.full_batch), SIZE, (2, MOST), shapes).to(recipe.device)


def tower_stage(tower: Any, heads: Heads, recipe: Recipe) -> None:
    """Stage A for a CLIP tower; trains it and its read-out heads in place."""
    rng = seeded(recipe, 1)
    seen: dict[str, str] = {}

    def balanced(logits: torch.Tensor, target: torch.Tensor, inked: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        weight = torch.where(inked.flatten(), 1.0, 0.1)
        return (loss * weight).sum() / weight.sum()

    def loss_of(step: int) -> torch.Tensor:
        batch = (crop_batch if step < recipe.crop_steps else full_batch)(rng, recipe)
        shown = batch.fine
        inked = shown.glyph > 0
        targets = (shown.glyph, shown.colour, shown.centre.long())
        with _autocast(recipe):
            states = clip_states(tower, batch.pixels, batch.positions)
            logits = [head(states[-2][:, 1:]) for head in (heads.glyph, heads.colour, heads.column)]
            losses = [balanced(*pair, inked) for pair in zip(logits, targets, strict=True)]
            held = presence_loss(heads, states, shown.presence())
        right = [
            (said.argmax(-1) == target)[inked].float().mean().item()
            for said, target in zip(logits, targets, strict=True)
        ]
        seen["note"] = f"glyph {right[0]:.3f} colour {right[1]:.3f} column {right[2]:.3f} CLS {held.item():.3f}"
        return losses[0] + losses[1] + 0.5 * losses[2] + held

    parameters = [*tower.parameters(), *heads.parameters()]
    fit([(parameters, 1.5e-3)], recipe.crop_steps + recipe.full_steps, loss_of, lambda: seen["note"], "A")


def answer_loss(
    model: Any, inputs: dict, target: torch.Tensor, layer: int | None = None
) -> tuple[torch.Tensor, float, torch.Tensor | None]:
    """Cross-entropy over the answers, the share of answer tokens that are right, and the hidden states before decoder
    layer `layer`."""
    out = model.model.language_model(**inputs, use_cache=False, output_hidden_states=layer is not None)
    logits = model.lm_head(out.last_hidden_state[:, -target.shape[1] - 1 : -1]).float()
    asked = target != -100
    right = (logits.argmax(-1) == target)[asked].float().mean().item()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    return loss, right, None if layer is None else out.hidden_states[layer]


def distance(visual: torch.Tensor, target: torch.Tensor, glyph: torch.Tensor) -> torch.Tensor:
    """Mean square distance from what a perfect eye would see; background counts little."""
    apart = (visual - target).square().mean(-1)
    weight = torch.where(glyph > 0, 1.0, 0.1)
    return (apart * weight).sum() / weight.sum()


def language_stage(family: Family, model: Any, oracle: Oracle, recipe: Recipe, cycle: int) -> None:
    """One cycle of stage B; trains decoder and word embeddings in place."""
    rng = seeded(recipe, 4 + cycle if cycle else 2)
    steps, rate, weights, sizes = recipe.language_cycles[cycle]
    seen: dict[str, str] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = draw(rng, distributed.part(recipe.language_batch), SIZE, (2, MOST)).to(recipe.device)
        text, target = (t.to(recipe.device) for t in sequences(batch.pictures, recipe.turns, rng, weights))
        visual = family.target(model, oracle, batch)
        visual = visual + 0.2 * torch.randn_like(visual)
        glyph = family.labels(batch)
        keep = thinned(glyph, int(rng.choice(sizes)) if len(sizes) > 1 else sizes[0])
        with _autocast(recipe):
            loss, right, states = answer_loss(model, family.inputs(model, visual, keep, text), target, family.hinted)
        seen["note"] = f"right {right:.3f}"
        if states is None:
            return loss
        start = len(family.prefix)
        hint = family.hint(oracle, batch).gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
        apart = distance(states[:, start : start + keep.shape[1]].float(), hint, glyph.gather(1, keep))
        seen["note"] += f" apart {apart.item():.4f}"
        return loss + 8 * apart

    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    fit([(parameters, rate)], steps, loss_of, lambda: seen["note"], f"B{cycle + 1}")


def projector_stage(family: Family, model: Any, heads: Heads, oracle: Oracle, recipe: Recipe, cycle: int) -> None:
    """One cycle of stage C; trains tower, projector and heads in place."""
    rng = seeded(recipe, 20 + cycle if cycle else 3)
    steps, rate, shapes, crops = recipe.projector_cycles[cycle]
    seen: dict[str, str] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = (crop_batch if crops else full_batch)(rng, recipe, shapes)
        with _autocast(recipe):
            visual, held = family.see(model, heads, batch)
        apart = distance(visual, family.target(model, oracle, batch), family.labels(batch))
        seen["note"] = f"apart {apart.item():.4f} held {held.item():.3f}"
        return 8 * apart + held

    sight = family.sight(model)
    groups = [([*sight["tower"].parameters(), *heads.parameters()], rate)]
    if "projector" in sight:
        groups.append(([*sight["projector"].parameters()], rate if cycle else recipe.projector_rate))
    fit(groups, steps, loss_of, lambda: seen["note"], f"C{cycle + 1}")


def joint_stage(family: Family, model: Any, heads: Heads, oracle: Oracle, recipe: Recipe, cycle: int) -> None:
    """One cycle of stage D; trains the whole model in place."""
    rng = seeded(recipe, 30 + cycle if cycle else 4)
    steps, shapes, weights, factor, turns = recipe.joint_cycles[cycle]
    seen: dict[str, str] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = full_batch(rng, recipe, shapes)
        text, target = (t.to(recipe.device) for t in sequences(batch.pictures, turns, rng, weights))
        glyph = family.labels(batch)
        with _autocast(recipe):
            visual, held = family.see(model, heads, batch)
            keep = thinned(glyph, int(rng.choice(recipe.joint_tokens)), rng.uniform(0.3, 1.0))
            loss, right, _ = answer_loss(model, family.inputs(model, visual, keep, text), target)
        apart = distance(visual, family.target(model, oracle, batch), glyph)
        seen["note"] = f"right {right:.3f} apart {apart.item():.4f} held {held.item():.3f}"
        return loss + held + 8 * apart

    sight = family.sight(model)
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    groups = [(language, factor * 5e-4), ([*sight["tower"].parameters(), *heads.parameters()], factor * 1e-4)]
    if "projector" in sight:
        groups.append(([*sight["projector"].parameters()], factor * 3e-4))
    fit(groups, steps, loss_of, lambda: seen["note"], f"D{cycle + 1}")
