"""Write the shipped held-out set: `python -m reference_models.heldout --out DIR`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vtoken.evals.reference import KINDS

from .dialogue import ask
from .pictures import picture

SEED = 20262
DEVELOPMENT = 20251  # the set that was looked at while the models were made
PICTURES = 128
DIGITS = (2, 5)  # one fewer than the most in training


def generate(count: int = PICTURES, seed: int = SEED, split: str = "test") -> Iterator[tuple[Image.Image, list[dict]]]:
    """Every picture and one question of each kind about it."""
    rng = np.random.RandomState(seed)
    for k in range(count):
        drawn = picture(rng, split, digits=DIGITS)
        about = {"boxes": [g.box for g in drawn.glyphs], "fonts": [g.font for g in drawn.glyphs], "photo": drawn.photo}
        rows = []
        for kind in KINDS:
            question, answer = ask(drawn, kind, rng)
            rows.append({"image": f"{k:03d}.jpg", "question": question, "answer": answer, "kind": kind, **about})
        yield drawn.image, rows


def write(folder: Path, count: int = PICTURES, seed: int = SEED, split: str = "test") -> None:
    """Pictures as JPEG without colour subsampling, questions as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, rows in generate(count, seed, split):
        image.save(folder / rows[0]["image"], quality=92, subsampling=0)
        lines += [json.dumps(row) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED, help=f"another set; {DEVELOPMENT} is that of the development")
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N")
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="whose photographs' halves and fonts"
    )
    given = parser.parse_args()
    write(given.out, given.pictures, given.seed, given.split)


if __name__ == "__main__":
    main()
