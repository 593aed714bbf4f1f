"""Training batches: pictures with labels for every patch, questions as token sequences, and which visual tokens
stay."""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from . import build, dialogue
from .pictures import COLOUR_NAMES, GRID, PATCH, Picture, picture

INK = 4  # a patch of 8 x 8 pixels belongs to a glyph that inks at least this many of them
HUES = len(COLOUR_NAMES)
PRESENCE = 10 + HUES + 10 * HUES


@dataclass(frozen=True)
class Labels:
    """What every cell shows, all [B, N]: `glyph` and `colour` (0 = background), `column` of the cell's own centre and
    `offset` from there to the centre of its glyph, both horizontal and in patches."""

    glyph: torch.Tensor
    colour: torch.Tensor
    column: torch.Tensor
    offset: torch.Tensor

    @property
    def centre(self) -> torch.Tensor:
        return self.column + self.offset

    def presence(self) -> torch.Tensor:
        """Which digits, colours and pairs of both occur, [B, PRESENCE] of 0 and 1."""
        pair = torch.where(self.glyph > 0, (self.glyph - 1) * HUES + self.colour, 0)
        held = torch.zeros(len(pair), 10 * HUES + 1, device=pair.device).scatter_(1, pair, 1.0)[:, 1:]
        table = held.view(-1, 10, HUES)
        return torch.cat([table.amax(2), table.amax(1), held], 1)

    def to(self, device: str) -> "Labels":
        return Labels(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Pictures:
    """A batch. `fine` labels patches of PATCH pixels, `coarse` squares of 2 x 2 of them."""

    pictures: list[Picture]
    pixels: torch.Tensor  # [B, 3, S, S] in -1..1
    fine: Labels
    coarse: Labels
    positions: torch.Tensor  # [B, N] of the fine patches on the full grid

    def to(self, device: str) -> "Pictures":
        return replace(
            self,
            pixels=self.pixels.to(device),
            fine=self.fine.to(device),
            coarse=self.coarse.to(device),
            positions=self.positions.to(device),
        )


def labels(drawn: list[Picture], cell: int = 1) -> Labels:
    """Labels for squares of `cell` x `cell` patches."""
    rows: list[list[np.ndarray]] = [[], [], [], []]
    for one in drawn:
        count, grid = one.ink.shape[0], one.ink.shape[1] // cell
        ink = one.ink.reshape(count, grid, cell, grid, cell).sum((2, 4))
        owner, inked = ink.argmax(0), ink.max(0) >= INK * cell * cell
        digit = np.array([g.digit for g in one.glyphs])
        colour = np.array([COLOUR_NAMES.index(g.colour) for g in one.glyphs])
        centre = np.array([one.centre(k) / PATCH for k in range(count)], np.float32)
        own = np.broadcast_to((np.arange(grid, dtype=np.float32) + 0.5) * cell, (grid, grid))
        found = (digit[owner] + 1) * inked, (colour[owner] + 1) * inked, own, np.where(inked, centre[owner] - own, 0)
        for row, value in zip(rows, found, strict=True):
            row.append(value.ravel())
    glyph, colours, column, offset = (torch.from_numpy(np.stack(row)) for row in rows)
    return Labels(glyph.long(), colours.long(), column, offset.float())


def draw(rng: np.random.RandomState, count: int, size: int, digits: tuple[int, int], shapes: str = "plain") -> Pictures:
    """Draw a batch. Pictures smaller than the full size stand at a random place of the full position grid, so small
    crops train all positions."""
    drawn = [picture(rng, "train", size, digits, shapes) for _ in range(count)]
    grid = size // PATCH
    corner = torch.from_numpy(rng.randint(0, GRID - grid + 1, (count, 2)))
    rows = torch.arange(grid).view(1, grid, 1) + corner[:, 0].view(-1, 1, 1)
    columns = torch.arange(grid).view(1, 1, grid) + corner[:, 1].view(-1, 1, 1)
    fine, coarse = (replace(one, column=one.column + corner[:, 1:]) for one in (labels(drawn), labels(drawn, 2)))
    pixels = torch.from_numpy(np.stack([np.asarray(p.image) for p in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pictures(drawn, pixels, fine, coarse, (rows * GRID + columns).flatten(1))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return build.tokenizer()


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


def sequences(
    drawn: list[Picture], count: int, rng: np.random.RandomState, weights: tuple[float, ...] = dialogue.EVEN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [B, T] of what follows the image: `count` questions per picture, answers and their <eos>
    supervised."""
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
    """Indices [B, keep] of the tokens that stay: a random share of every glyph's patches, the rest background, in
    reading order."""
    noise = torch.rand(glyph.shape, device=glyph.device)
    chosen = (glyph > 0) & (torch.rand(glyph.shape, device=glyph.device) < share)
    return (noise + 2 * chosen).topk(keep, 1).indices.sort(1).values
