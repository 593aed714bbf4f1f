"""A Perceiver-like resampler for a frozen reference VLM, and its training: `python -m reference_models.resampler`.

It stands for the compressors that bring weights of their own (https://arxiv.org/abs/2204.14198 and its kin) and runs as
`learned_compressor: {module: reference_models.resampler:Resampler, weights: FILE}`.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vtoken.evals.reference import load
from vtoken.stages import Layout, TokenModule

from .batches import sequences
from .dialogue import EVEN
from .llava import TinyLlava
from .recipe import Recipe
from .stages import answer_loss, fit, full_batch, seeded


class Resampler(TokenModule):
    """side x side queries, each at home in one cell of a raster of grid x grid tokens. A head's logit is what it thinks
    of the token, plus a learnt bias of query and place, which begins as a bell around the cell."""

    def __init__(self, width: int, side: int, grid: int, heads: int = 2) -> None:
        super().__init__()
        self.takes = self.makes = width
        self.side, self.grid = side, grid
        self.worth = nn.Linear(width, heads)
        self.value = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        cell = grid / side
        at = torch.arange(grid) + 0.5
        far = ((at - (torch.arange(side)[:, None] + 0.5) * cell) / cell).square()  # [side, grid]
        bell = -2 * (far[:, None, :, None] + far[None, :, None, :]).view(side * side, grid * grid)
        self.bias = nn.Parameter(bell.expand(heads, -1, -1).clone())
        nn.init.eye_(self.value.weight)
        last: nn.Linear = self.mlp[-1]  # type: ignore[assignment]
        for zero in (self.value.bias, last.weight, last.bias):
            nn.init.zeros_(zero)

    def many(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[..., K, D] of [..., N, D] tokens at the same places [N]."""
        logits = self.bias[:, :, places] + self.worth(tokens).transpose(-1, -2)[..., :, None, :]
        values = self.value(tokens).unflatten(-1, (len(self.bias), -1)).transpose(-2, -3)
        made = (logits.softmax(-1) @ values).transpose(-2, -3).flatten(-2)
        return made + self.mlp(made)

    def forward(self, tokens: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, Layout]:
        if layout.parts != ((1, self.grid, self.grid),):
            raise ValueError(f"trained for pictures of {self.grid} x {self.grid} tokens, given {layout.parts}")
        made = self.many(tokens, layout.places)
        return made[: self.count(len(tokens))], layout.spread(self.count(len(tokens)))

    def count(self, tokens: int) -> int:
        return min(tokens, self.side**2)

    def flops(self, tokens: int) -> int:
        width = self.takes
        queries = self.count(tokens)
        return 2 * width * (tokens * (width + len(self.bias) + queries) + 4 * queries * width)


def train(out: Path, side: int, steps: int, seed: int = 0, rate: float = 2e-3) -> None:
    """Trains it on questions, the model frozen, and writes `out`."""
    family, recipe = TinyLlava(), Recipe(seed=seed)
    model, _ = load(family.name)
    model.eval().requires_grad_(False)
    rng = seeded(recipe, 50)
    width = model.config.text_config.hidden_size
    options = {"width": width, "side": side, "grid": round(family.tokens**0.5)}
    resampler = Resampler(**options)
    everywhere = torch.arange(family.tokens)
    places = Layout((), everywhere).spread(side**2).places
    seen: dict[str, str] = {}

    def loss_of(step: int) -> torch.Tensor:
        batch = full_batch(rng, recipe, ("plain", "slanted")[step % 2])
        text, target = sequences(batch.pictures, recipe.turns, rng, EVEN)
        with torch.no_grad():
            visual = model.get_image_features(batch.pixels).pooler_output
            visual = torch.stack(list(visual))
        made = resampler.many(visual, everywhere)
        whole = torch.zeros_like(visual).index_copy(1, places, made)
        loss, right, _ = answer_loss(model, family.inputs(model, whole, places.expand(len(made), -1), text), target)
        seen["note"] = f"right {right:.3f}"
        return loss

    fit([(resampler.parameters(), rate)], steps, loss_of, lambda: seen["note"], "resampler", every=25)
    state = {key: value.contiguous() for key, value in resampler.state_dict().items()}
    save_file(state, out, {"config": json.dumps(options), "model": family.name, "steps": str(steps), "seed": str(seed)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--side", type=int, default=8, help="8 makes 64 tokens of 576")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.out, given.side, given.steps, given.seed)


if __name__ == "__main__":
    main()
