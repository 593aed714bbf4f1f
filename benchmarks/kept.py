"""What every method keeps of one picture, as one image: `python benchmarks/kept.py --out docs/kept.jpg`. Two to
three minutes on a CPU.

The picture is the first of the shipped questions; nothing is picked by result. Methods that leave it whole are left
out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # Runs from a checkout that is not installed, too.

CELL = 8  # pixels of a token at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava", metavar="NAME", help="shipped model (default: %(default)s)")
    parser.add_argument(
        "--keep", type=int, default=32, metavar="N", help="visual tokens of the picture (default: %(default)s)"
    )
    parser.add_argument("--columns", type=int, default=6, metavar="N", help="pictures per row (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("kept.jpg"), metavar="FILE", help="JPEG or PNG (default: %(default)s)"
    )
    given = parser.parse_args()

    from vtoken.evals.pictures.overlay import captioned, sheet

    question, tiles = kept(given.model, given.keep)
    shown = [captioned(tile.picture, f"{tile.method}: {tile.tokens}") for tile in tiles]
    sheet(shown, given.columns, background="white").save(given.out, quality=82, optimize=True)
    print(f"{question.question} ({question.answer})")
    print(f"wrote {given.out}: {len(tiles) - 1} methods, {given.out.stat().st_size // 1024} kB")


class Tile(NamedTuple):
    """What a method keeps, and how many tokens; of the method "all", the picture itself."""

    method: str
    tokens: int
    picture: Any


def kept(name: str, keep: int, cell: int = CELL) -> tuple[Any, list[Tile]]:
    """The first of the shipped questions, its picture, and what every method leaves of it."""
    import torch
    from PIL.Image import Resampling

    from vtoken.evals import reference
    from vtoken.evals.pictures.demo import inputs_of
    from vtoken.evals.pictures.demo_pipelines import choose, prefill
    from vtoken.evals.pictures.overlay import drawn, owners, views
    from vtoken.evals.shared.media import Media, still

    model, processor = reference.load(name)
    question = reference.questions(1)[0]
    prompt = inputs_of(processor, question)
    picture = still(question.image)
    tiles: list[Tile] = []
    with torch.inference_mode():
        for label, pipeline in choose(model, prompt, (keep,), everything=True).pipelines.items():
            if not pipeline.stages:
                continue
            seen = prefill(model, pipeline, prompt)
            total, left = seen.visual_tokens[0], len(seen.kept[0])
            (rasters,) = views(processor, prompt.get("pixel_values"), Media((picture,)), seen.parts)
            side = cell * min(n for _, *raster in seen.parts[0] for n in raster)
            shown = drawn(rasters, seen.parts[0], seen.kept[0], owners(seen, 0), side=side, columns=1)
            if not tiles:
                size = (shown.width, round(shown.width * picture.height / picture.width))
                tiles.append(Tile("all", total, picture.resize(size, Resampling.BICUBIC)))
            if left < total:
                tiles.append(Tile(label.partition(":")[0], left, shown))
    return question, tiles


if __name__ == "__main__":
    main()
