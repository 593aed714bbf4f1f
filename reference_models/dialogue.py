"""Questions about a picture of coloured digits, and the words they are made of."""

import numpy as np

from vtoken.evals.reference import KINDS

from .pictures import COLOUR_NAMES, Picture

EVEN = (0.2, 0.2, 0.1, 0.2, 0.1, 0.2)  # how often training asks each kind
LOOK_UP = (0.32, 0.32, 0.06, 0.05, 0.15, 0.1)  # mostly what finds one digit by its colour or value
REST = (0.08, 0.25, 0.2, 0.15, 0.07, 0.25)  # mostly what is learnt last
WEAK = (0.06, 0.3, 0.06, 0.2, 0.06, 0.32)  # mostly what is still wrong then

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
WORDS = (
    *SPECIAL,
    *"USER ASSISTANT : ? . what digit is color the how many digits are there read from left to right a next of yes no "
    "none".split(),
    *COLOUR_NAMES,
    *map(str, range(10)),
)
VOCABULARY = {word: k for k, word in enumerate(dict.fromkeys(WORDS))}


def ask(picture: Picture, kind: str, rng: np.random.RandomState) -> tuple[str, str]:
    """One question of a kind, and its answer."""
    order = sorted(range(len(picture.glyphs)), key=picture.centre)
    glyphs = [picture.glyphs[k] for k in order]
    place = rng.randint(len(glyphs))
    glyph = glyphs[place]
    if kind == "digit":
        return f"what digit is {glyph.colour}?", str(glyph.digit)
    if kind == "color":
        return f"what color is the {glyph.digit}?", glyph.colour
    if kind == "count":
        return "how many digits are there?", str(len(glyphs))
    if kind == "read":
        return "read the digits from left to right.", " ".join(str(g.digit) for g in glyphs)
    if kind == "exists":
        absent = [name for name in COLOUR_NAMES if name not in {g.colour for g in glyphs}]
        if absent and rng.rand() < 0.5:
            return f"is there a {absent[rng.randint(len(absent))]} digit?", "no"
        return f"is there a {glyph.colour} digit?", "yes"
    if kind == "next":
        after = glyphs[place + 1 :]
        return f"what digit is next to the right of the {glyph.digit}?", str(after[0].digit) if after else "none"
    raise ValueError(f"no question kind {kind!r}; the kinds are {', '.join(KINDS)}")


def turns(
    picture: Picture, count: int, rng: np.random.RandomState, weights: tuple[float, ...] = EVEN
) -> list[tuple[str, str]]:
    """Questions and answers for one training sequence, kinds drawn by their weights."""
    return [ask(picture, kind, rng) for kind in rng.choice(KINDS, count, p=weights)]
