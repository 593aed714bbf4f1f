"""Training batches: pictures with per-patch labels, questions as token sequences, visual tokens thinned at their own positions."""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from . import build, dialogue
from .pictures import COLOUR_NAMES, GRID, PATCH, Picture, picture

TOKENS = GRID * GRID
PREFIX = ("<bos>", "USER", ":")  # what the chat template puts before the image
INK = 4  # a patch belongs to a glyph that inks at least this many of its pixels
PAIRS = 10 * len(COLOUR_NAMES)
PRESENCE = 10 + len(COLOUR_NAMES) + PAIRS


@dataclass(frozen=True)
class Pictures:
    """A batch. `glyph` and `colour` (0 = background), `column` and `centre` (whole and exact, in patches) of the glyph a patch belongs to: all [B, N]."""

    pictures: list[Picture]
    pixels: torch.Tensor  # [B, 3, S, S] in -1..1
    glyph: torch.Tensor
    colour: torch.Tensor
    column: torch.Tensor
    centre: torch.Tensor
    presence: torch.Tensor  # [B, PRESENCE]
    positions: torch.Tensor  # [B, N] on the full grid

    def to(self, device: str) -> "Pictures":
        moved = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return Pictures(self.pictures, **moved)


def labels(drawn: Picture) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Glyph, colour and horizontal centre for every patch, and which digits, colours and pairs are present."""
    grid = drawn.ink.shape[1]
    owner = drawn.ink.argmax(0)
    inked = drawn.ink.max(0) >= INK
    digit = np.array([g.digit for g in drawn.glyphs])
    colour = np.array([COLOUR_NAMES.index(g.colour) for g in drawn.glyphs])
    centre = np.array([drawn.centre(k) / PATCH for k in range(len(drawn.glyphs))], np.float32)
    own = np.broadcast_to(np.arange(grid, dtype=np.float32) + 0.5, (grid, grid))
    presence = np.zeros(PRESENCE, np.float32)
    presence[digit] = presence[10 + colour] = presence[10 + len(COLOUR_NAMES) + digit * len(COLOUR_NAMES) + colour] = 1
    return (digit[owner] + 1) * inked, (colour[owner] + 1) * inked, np.where(inked, centre[owner], own), presence


def draw(rng: np.random.RandomState, count: int, size: int, digits: tuple[int, int], slanted: bool = False) -> Pictures:
    """Draw a batch. Pictures smaller than the full size stand at a random place of the full position grid, so small crops train all positions."""
    drawn = [picture(rng, "train", size, digits, slanted) for _ in range(count)]
    glyph, colour, centre, presence = (
        torch.from_numpy(np.stack(rows)) for rows in zip(*map(labels, drawn), strict=True)
    )
    grid = size // PATCH
    corner = torch.from_numpy(rng.randint(0, GRID - grid + 1, (count, 2)))
    rows = torch.arange(grid).view(1, grid, 1) + corner[:, 0].view(-1, 1, 1)
    columns = torch.arange(grid).view(1, 1, grid) + corner[:, 1].view(-1, 1, 1)
    centre = (centre + corner[:, 1].view(-1, 1, 1)).flatten(1)
    pixels = torch.from_numpy(np.stack([np.asarray(p.image) for p in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pictures(
        drawn,
        pixels,
        glyph.long().flatten(1),
        colour.long().flatten(1),
        centre.long(),
        centre,
        presence,
        (rows * GRID + columns).flatten(1),
    )


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return build.tokenizer()


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


def sequences(
    drawn: list[Picture], count: int, rng: np.random.RandomState, weights: tuple[float, ...] = dialogue.EVEN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [B, T] of what follows the image: `count` questions per picture, answers and their <eos> supervised."""
    rows, targets = [], []
    for one in drawn:
        row, target = [], []
        for k, (question, answer) in enumerate(dialogue.turns(one, count, rng, weights)):
            asked = _ids(f"{'USER: ' if k else ''}{question} ASSISTANT:")
            said = _ids(f"{answer}<eos>")
            row += [*asked, *said]
            target += [*[-100] * len(asked), *said]
        rows.append(row)
        targets.append(target)
    length = max(map(len, rows))
    pad = dialogue.VOCABULARY["<pad>"]
    return (
        torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
        torch.tensor([target + [-100] * (length - len(target)) for target in targets]),
    )


def thinned(glyph: torch.Tensor, keep: int, share: float = 0.6) -> torch.Tensor:
    """Indices [B, keep] of the tokens that stay: a random share of every glyph's patches, the rest background, in reading order."""
    noise = torch.rand(glyph.shape, device=glyph.device)
    chosen = (glyph > 0) & (torch.rand(glyph.shape, device=glyph.device) < share)
    return (noise + 2 * chosen).topk(keep, 1).indices.sort(1).values


def assembled(embed: Any, visual: torch.Tensor, keep: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of the decoder: prefix, the kept visual tokens, text; each at the position it has in the full sequence."""
    count, device = len(text), text.device
    prefix = torch.tensor([dialogue.VOCABULARY[word] for word in PREFIX], device=device).expand(count, -1)
    kept = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
    start = len(PREFIX)
    positions = torch.cat(
        [
            torch.arange(start, device=device).expand(count, -1),
            keep + start,
            torch.arange(start + TOKENS, start + TOKENS + text.shape[1], device=device).expand(count, -1),
        ],
        1,
    )
    return {
        "inputs_embeds": torch.cat([embed(prefix), kept.to(embed.weight.dtype), embed(text)], 1),
        "position_ids": positions,
        "attention_mask": torch.ones_like(positions),
    }
