"""The four stages of the recipe. Each cycle of a stage seeds itself, so a finished one can be skipped.

A  tower: which glyph, which colour and which column each patch belongs to; which digits, colours and pairs the picture holds, told from CLS. Mostly small crops.
B  language model on oracle embeddings (glyph + colour + place) with the background thinned: here the look-ups form, in cheap steps.
C  tower and projector regress onto the oracle embeddings, full pictures.
D  everything jointly on questions, with all visual tokens or some of them.

Then B, C and D once more. B and C need nothing of each other and may run side by side.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .batches import PRESENCE, TOKENS, Pictures, assembled, draw, sequences, thinned
from .build import WIDTH
from .dialogue import EVEN, LOOK_UP, REST
from .pictures import COLOUR_NAMES, GRID, MOST, SIZE


@dataclass(frozen=True)
class Recipe:
    """Steps and batch sizes of every stage."""

    crop_steps: int = 1100
    crop_batch: int = 64
    full_steps: int = 250
    full_batch: int = 16
    # steps, learning rate, weights of the question kinds, numbers of visual tokens: order is learnt in the first cycle, look-ups in the third,
    # counting whatever the share of background in the fifth
    language_cycles: tuple = (
        (1400, 1.5e-3, EVEN, (48,)),
        (550, 1e-3, LOOK_UP, (48,)),
        (800, 1.5e-3, LOOK_UP, (48,)),
        (700, 1.5e-3, REST, (48,)),
        (1200, 1.5e-3, REST, (24, 48, 96, 160)),
        (800, 1e-3, REST, (24, 48, 96, 160)),
    )
    language_batch: int = 32
    # steps, learning rate of the tower, slanted digits
    projector_cycles: tuple = ((900, 6e-4, False), (450, 5e-4, False), (350, 5e-4, True))
    # steps, slanted digits, weights of the question kinds, factor on the learning rates
    joint_cycles: tuple = ((300, False, EVEN, 1.0), (200, True, EVEN, 1.0), (250, True, REST, 0.5))
    # numbers of visual tokens, so that answers do not hang on how much background is left
    joint_tokens: tuple = (24, 48, 96, 192, TOKENS, TOKENS)
    turns: int = 8
    seed: int = 0
    device: str = "cpu"

    def smoke(self) -> "Recipe":
        """A few steps of every stage, to see that it runs."""
        return replace(
            self,
            crop_steps=2,
            crop_batch=4,
            full_steps=1,
            full_batch=2,
            language_cycles=((2, 1e-3, EVEN, (48,)), *[(1, 1e-3, LOOK_UP, (24, 48))] * 5),
            language_batch=4,
            projector_cycles=((2, 6e-4, False), (1, 5e-4, False), (1, 5e-4, True)),
            joint_cycles=((2, False, EVEN, 1.0), *[(1, True, REST, 0.5)] * 2),
        )


class Heads(nn.Module):
    """Read-outs of the tower; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.glyph = nn.Linear(WIDTH, 11)
        self.colour = nn.Linear(WIDTH, len(COLOUR_NAMES) + 1)
        self.column = nn.Linear(WIDTH, GRID)
        self.presence = nn.Linear(WIDTH, PRESENCE)
        self.presence_last = nn.Linear(WIDTH, PRESENCE)


class Oracle(nn.Module):
    """Fixed random embeddings of perfectly recognised patches: the sum of a glyph vector, a colour vector and waves of the horizontal centre.

    Fixed, so that the language model and the projector can be trained towards them apart. Waves rather than a table of columns: "the next one to the right" is
    then a fixed rotation, which suits attention.
    """

    PERIODS = (64, 32, 16, 8, 4)  # in patches; the longest tells left from right

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.glyph, self.colour = nn.Embedding(11, WIDTH), nn.Embedding(len(COLOUR_NAMES) + 1, WIDTH)
        self.column = nn.Linear(2 * len(self.PERIODS) + 1, WIDTH, bias=False)
        for table, std in ((self.glyph, 0.5), (self.colour, 0.5), (self.column, 0.3)):
            nn.init.normal_(table.weight, std=std, generator=generator)
        self.requires_grad_(False)

    def forward(self, batch: Pictures) -> torch.Tensor:
        phase = batch.centre[..., None] * (2 * math.pi / torch.tensor(self.PERIODS, device=batch.centre.device))
        waves = torch.cat([phase.sin(), phase.cos(), batch.centre[..., None] * (2 / GRID) - 1], -1)
        return self.glyph(batch.glyph) + self.colour(batch.colour) + self.column(waves)


def fit(groups: list, steps: int, loss_of: Callable, note: Callable, tag: str, every: int = 100) -> None:
    """AdamW, linear warm-up, cosine decay, clipped gradients. `groups` are (parameters, learning rate); `loss_of(step)` returns the loss."""
    groups = [{"params": list(parameters), "lr": rate} for parameters, rate in groups]
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
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps - 1:
            print(f"{tag} {step}/{steps} loss {loss.item():.3f} {note(step)} {time.time() - started:.0f} s", flush=True)


def _seeded(recipe: Recipe, stage: int) -> np.random.RandomState:
    torch.manual_seed(1000 * stage + recipe.seed)
    return np.random.RandomState(1000 * stage + recipe.seed)


def _autocast(recipe: Recipe) -> torch.autocast:
    return torch.autocast(recipe.device.split(":")[0], torch.bfloat16)


def encode(tower: Any, batch: Pictures) -> list[torch.Tensor]:
    """Hidden states of the tower for crops that stand anywhere on its position grid."""
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(batch.pixels).flatten(2).transpose(1, 2)
    first = embeddings.class_embedding.expand(len(patches), 1, -1)
    positions = torch.cat([torch.zeros_like(batch.positions[:, :1]), batch.positions + 1], 1)
    states = [tower.pre_layrnorm(torch.cat([first, patches], 1) + embeddings.position_embedding(positions))]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], None))
    return states


def presence_loss(heads: Heads, states: list[torch.Tensor], batch: Pictures) -> torch.Tensor:
    """What the picture holds, told from CLS where the features are taken and at the last layer. No attention map is supervised."""
    weight = torch.ones_like(batch.presence[0]) / batch.presence.shape[1] * 4
    selected, last = heads.presence(states[-2][:, 0]).float(), heads.presence_last(states[-1][:, 0]).float()
    bce = F.binary_cross_entropy_with_logits
    return (
        bce(selected, batch.presence, weight, reduction="none").sum(-1).mean()
        + 0.5 * bce(last, batch.presence, weight, reduction="none").sum(-1).mean()
    )


def tower_stage(tower: Any, heads: Heads, recipe: Recipe) -> None:
    """Stage A; trains the tower and its read-out heads in place."""
    rng = _seeded(recipe, 1)
    seen: dict[str, str] = {}

    def balanced(logits: torch.Tensor, target: torch.Tensor, inked: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        weight = torch.where(inked.flatten(), 1.0, 0.1)
        return (loss * weight).sum() / weight.sum()

    def loss_of(step: int) -> torch.Tensor:
        small = step < recipe.crop_steps
        batch = draw(
            rng, *((recipe.crop_batch, SIZE // 2, (2, 5)) if small else (recipe.full_batch, SIZE, (2, MOST)))
        ).to(recipe.device)
        with _autocast(recipe):
            states = encode(tower, batch)
            patches, inked = states[-2][:, 1:], batch.glyph > 0
            glyph, colour, column = heads.glyph(patches), heads.colour(patches), heads.column(patches)
            loss = (
                balanced(glyph, batch.glyph, inked)
                + balanced(colour, batch.colour, inked)
                + 0.5 * balanced(column, batch.column, inked)
            )
            held = presence_loss(heads, states, batch)
        right = [
            (logits.argmax(-1) == target)[inked].float().mean().item()
            for logits, target in ((glyph, batch.glyph), (colour, batch.colour), (column, batch.column))
        ]
        seen["note"] = f"glyph {right[0]:.3f} colour {right[1]:.3f} column {right[2]:.3f} CLS {held.item():.3f}"
        return loss + held

    fit(
        [([*tower.parameters(), *heads.parameters()], 1.5e-3)],
        recipe.crop_steps + recipe.full_steps,
        loss_of,
        lambda _: seen["note"],
        "A",
    )


def answer_loss(model: Any, inputs: dict, target: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross-entropy over the answers, and the share of answer tokens that are right."""
    logits = model.lm_head(
        model.model.language_model(**inputs, use_cache=False).last_hidden_state[:, -target.shape[1] - 1 : -1]
    ).float()
    asked = target != -100
    right = (logits.argmax(-1) == target)[asked].float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100), right


def language_stage(model: Any, oracle: Oracle, recipe: Recipe, cycle: int) -> None:
    """One cycle of stage B; trains decoder and word embeddings in place."""
    rng = _seeded(recipe, 4 + cycle if cycle else 2)
    embed = model.get_input_embeddings()
    if not cycle:
        nn.init.normal_(embed.weight, std=0.5)
    steps, rate, weights, sizes = recipe.language_cycles[cycle]
    seen: dict[str, float] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = draw(rng, recipe.language_batch, SIZE, (2, MOST)).to(recipe.device)
        text, target = (t.to(recipe.device) for t in sequences(batch.pictures, recipe.turns, rng, weights))
        visual = oracle(batch)
        visual = visual + 0.2 * torch.randn_like(visual)
        keep = thinned(batch.glyph, int(rng.choice(sizes)) if len(sizes) > 1 else sizes[0])
        with _autocast(recipe):
            loss, seen["right"] = answer_loss(model, assembled(embed, visual, keep, text), target)
        return loss

    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    fit([(parameters, rate)], steps, loss_of, lambda _: f"right {seen['right']:.3f}", f"B{cycle + 1}")


def distance(visual: torch.Tensor, oracle: Oracle, batch: Pictures) -> torch.Tensor:
    """Mean square distance from the oracle embeddings; background counts little."""
    apart = (visual - oracle(batch)).square().mean(-1)
    weight = torch.where(batch.glyph > 0, 1.0, 0.1)
    return (apart * weight).sum() / weight.sum()


def projector_stage(model: Any, heads: Heads, oracle: Oracle, recipe: Recipe, cycle: int) -> None:
    """One cycle of stage C; trains tower, projector and heads in place."""
    rng = _seeded(recipe, 20 + cycle if cycle else 3)
    steps, rate, slanted = recipe.projector_cycles[cycle]
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    seen: dict[str, str] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = draw(rng, recipe.full_batch, SIZE, (2, MOST), slanted).to(recipe.device)
        with _autocast(recipe):
            states = encode(tower, batch)
            visual = projector(states[-2][:, 1:]).float()
            held = presence_loss(heads, states, batch)
        apart = distance(visual, oracle, batch)
        seen["note"] = f"apart {apart.item():.4f} CLS {held.item():.3f}"
        return 8 * apart + held

    groups = [([*tower.parameters(), *heads.parameters()], rate), (projector.parameters(), 2e-3 if not cycle else rate)]
    fit(groups, steps, loss_of, lambda _: seen["note"], f"C{cycle + 1}")


def joint_stage(model: Any, heads: Heads, oracle: Oracle, recipe: Recipe, cycle: int, check: Callable[[], str]) -> None:
    """One cycle of stage D; trains the whole model in place. `check()` returns a note for the log."""
    rng = _seeded(recipe, 30 + cycle if cycle else 4)
    steps, slanted, weights, factor = recipe.joint_cycles[cycle]
    embed, tower, projector = model.get_input_embeddings(), model.model.vision_tower, model.model.multi_modal_projector
    seen: dict[str, str] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = draw(rng, recipe.full_batch, SIZE, (2, MOST), slanted).to(recipe.device)
        text, target = (t.to(recipe.device) for t in sequences(batch.pictures, recipe.turns, rng, weights))
        with _autocast(recipe):
            states = encode(tower, batch)
            visual = projector(states[-2][:, 1:]).float()
            keep = thinned(batch.glyph, int(rng.choice(recipe.joint_tokens)), rng.uniform(0.3, 1.0))
            loss, right = answer_loss(model, assembled(embed, visual, keep, text), target)
            held = presence_loss(heads, states, batch)
        apart = distance(visual, oracle, batch)
        seen["note"] = f"right {right:.3f} apart {apart.item():.4f} CLS {held.item():.3f}"
        return loss + held + 8 * apart

    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    sight = [*tower.parameters(), *heads.parameters()]
    groups = [(sight, factor * 1e-4), (projector.parameters(), factor * 3e-4), (language, factor * 5e-4)]
    fit(groups, steps, loss_of, lambda _: f"{seen['note']} {check()}", f"D{cycle + 1}")
