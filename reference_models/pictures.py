"""Pictures of the reference task: coloured digits on dimmed photographs, drawn from a seed.

The photographs and fonts lie inside the wheels of scikit-learn, scikit-image, matplotlib and Pillow; nothing is
downloaded. Every photograph is cut by a vertical line: training crops lie left of it, test crops right of it. Two fonts
appear in test pictures only. Placement depends on the seed alone, not on how a font renders, so other versions of
FreeType give the same digits, colours and places.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from vtoken.evals.shared.media import still

SIZE = 192  # pixels per side
PATCH = 8  # pixels per side of the patch behind one visual token
GRID = SIZE // PATCH
MOST = 6  # digits per picture

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 220, 40),
    "pink": (235, 80, 200),
    "cyan": (40, 215, 220),
}
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Photo:
    """One photograph: the package and file that hold it, its licence and whom to credit."""

    package: str
    file: str
    licence: str
    credit: str


PHOTOS = (
    Photo(
        "sklearn",
        "datasets/images/china.jpg",
        "CC BY 2.0",
        "danielbuechele, flickr.com/photos/danielbuechele/6061409035",
    ),
    Photo("sklearn", "datasets/images/flower.jpg", "CC BY 2.0", "vultilion, flickr.com/photos/vultilion/6056698931"),
    Photo("skimage", "data/astronaut.png", "public domain", "NASA"),
    Photo("skimage", "data/chelsea.png", "CC0", "Stefan van der Walt"),
    Photo("skimage", "data/coffee.png", "CC0", "Rachel Michetti, courtesy of Pikolo Espresso Bar"),
    Photo("skimage", "data/rocket.jpg", "public domain", "SpaceX, flickr.com/photos/spacexphotos/16511594820"),
    Photo("skimage", "data/camera.png", "CC0", "Lav Varshney"),
    Photo("skimage", "data/hubble_deep_field.jpg", "public domain", "NASA and STScI, hubblesite.org"),
    Photo("skimage", "data/brick.png", "CC0", "CC0Textures, Bricks25"),
    Photo("skimage", "data/grass.png", "CC0", "linolafett, deviantart.com"),
    Photo("skimage", "data/gravel.png", "CC0", "CC0Textures, Gravel04"),
)

TRAIN_FONTS = (
    "pillow-default",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
)
UNSEEN_FONTS = ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic")
FONT_SIZES = range(24, 33)
SLANTS = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
STROKES = (-0.4, 0.0, 0.5, 1.0)  # pixels that a stroke gains on either side
STRETCHES = (0.85, 1.0, 1.15)  # of the width
SHAPES = ("plain", "slanted", "varied")


@dataclass(frozen=True)
class Glyph:
    """One drawn digit. `box` is (left, top, right, bottom) of its ink in pixels."""

    digit: int
    colour: str
    box: tuple[int, int, int, int]
    font: str


@dataclass(frozen=True)
class Picture:
    """Pixels, glyphs, and `ink [glyphs, rows, columns]`: how many pixels of each patch each glyph inks."""

    image: Image.Image
    glyphs: tuple[Glyph, ...]
    ink: np.ndarray
    photo: str
    corner: tuple[int, int]  # left and top of the crop within the photograph

    def centre(self, k: int) -> float:
        """Horizontal centre of glyph k in pixels."""
        left, _, right, _ = self.glyphs[k].box
        return (left + right) / 2


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the reference pictures need {package}: pip install scikit-learn scikit-image matplotlib")
    return Path(spec.submodule_search_locations[0])


@cache
def _photo(index: int) -> np.ndarray:
    photo = PHOTOS[index]
    return np.asarray(still(_folder(photo.package) / photo.file))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "pillow-default":
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"), size)


@lru_cache(maxsize=8192)
def _mask(digit: int, font: str, size: int, slant: float = 0.0) -> np.ndarray:
    """Coverage 0..255 of one glyph, cut to its ink."""
    tile = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(tile).text((size // 2, size // 4), str(digit), font=_font(font, size), fill=255)
    if slant:
        tile = tile.transform(
            tile.size, Image.Transform.AFFINE, (1, slant, -slant * size, 0, 1, 0), Image.Resampling.BICUBIC
        )
    return np.asarray(tile.crop(tile.getbbox()))


def _varied(mask: np.ndarray, stroke: float, stretch: float, size: int) -> np.ndarray:
    """A glyph made bolder or thinner by about `stroke` pixels on either side, and wider or narrower; never larger than
    its place."""
    tile = Image.fromarray(mask)
    if stroke:
        tile = ImageOps.expand(tile, 1)
        grown = tile.filter((ImageFilter.MaxFilter if stroke > 0 else ImageFilter.MinFilter)(3))
        tile = Image.blend(tile, grown, abs(stroke))
        tile = tile.crop(tile.getbbox())
    shape = min(max(round(tile.width * stretch), 1), size), min(tile.height, size)
    return np.asarray(tile.resize(shape, Image.Resampling.BILINEAR))


def columns(split: str, width: int) -> tuple[int, int]:
    """First and last column of a photograph that crops of a split may touch; the two splits never overlap."""
    cut = width - SIZE - 16
    return {"train": (0, cut), "test": (cut, width)}[split]


def _background(rng: np.random.RandomState, split: str, size: int) -> tuple[np.ndarray, int, tuple[int, int]]:
    index = rng.randint(len(PHOTOS))
    photo = _photo(index)
    first, last = columns(split, photo.shape[1])
    left, top = first + rng.randint(last - first - size + 1), rng.randint(photo.shape[0] - size + 1)
    dimmed = photo[top : top + size, left : left + size] * rng.uniform(0.25, 0.6)
    return dimmed.astype(np.float32), index, (left, top)


def _places(rng: np.random.RandomState, sizes: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Left-top corners of squares that do not touch and whose centres lie in different columns, so left-to-right order
    is plain to see."""
    places: list[tuple[int, int]] = []
    for side in sizes:
        for _ in range(500):
            x, y = rng.randint(size - side + 1), rng.randint(size - side + 1)
            clear = all(
                abs(2 * x + side - 2 * u - other) >= 20
                and (abs(x - u) >= max(side, other) or abs(y - v) >= max(side, other))
                for (u, v), other in zip(places, sizes, strict=False)
            )
            if clear:
                places.append((x, y))
                break
        else:
            return places  # full: the picture holds fewer digits
    return places


def _ink(mask: np.ndarray, left: int, top: int, grid: int) -> np.ndarray:
    full = np.zeros((grid * PATCH, grid * PATCH), bool)
    full[top : top + mask.shape[0], left : left + mask.shape[1]] = mask > 127
    return full.reshape(grid, PATCH, grid, PATCH).sum((1, 3))


def picture(
    rng: np.random.RandomState,
    split: str = "train",
    size: int = SIZE,
    digits: tuple[int, int] = (2, MOST),
    shapes: str = "plain",
) -> Picture:
    """Draw one picture: `digits` = fewest and most, (0, 0) for a photograph alone; digits and colours are distinct
    within a picture.

    `shapes`: "slanted" shears every digit by its own amount, "varied" also changes its stroke and its width.
    """
    if shapes not in SHAPES:
        raise ValueError(f"no shapes {shapes!r}; there are: {', '.join(SHAPES)}")
    canvas, index, corner = _background(rng, split, size)
    wanted = rng.randint(digits[0], digits[1] + 1)
    values, colours = rng.permutation(10)[:wanted], rng.permutation(len(COLOURS))[:wanted]
    sizes = rng.choice(FONT_SIZES, wanted)
    unseen, seen = rng.rand(wanted) < 0.4, rng.randint(len(TRAIN_FONTS), size=wanted)
    held_out, jitter = rng.randint(len(UNSEEN_FONTS), size=wanted), rng.randint(-15, 16, (wanted, 3))
    places = _places(rng, sizes, size)
    slants = np.zeros(wanted) if shapes == "plain" else rng.choice(SLANTS, wanted)
    varied = shapes == "varied"
    strokes = rng.choice(STROKES, wanted) if varied else np.zeros(wanted)
    stretches = rng.choice(STRETCHES, wanted) if varied else np.ones(wanted)
    glyphs, inks = [], []
    for k, (x, y) in enumerate(places):
        font = UNSEEN_FONTS[held_out[k]] if split == "test" and unseen[k] else TRAIN_FONTS[seen[k]]
        mask = _mask(int(values[k]), font, int(sizes[k]), float(slants[k]))
        if varied:
            mask = _varied(mask, strokes[k], stretches[k], sizes[k])
        height, width = mask.shape
        left = min(max(x + (sizes[k] - width) // 2, 0), size - width)
        top = min(max(y + (sizes[k] - height) // 2, 0), size - height)
        name = COLOUR_NAMES[colours[k]]
        alpha = mask[..., None] / 255.0
        area = canvas[top : top + height, left : left + width]
        area += alpha * (np.clip(np.array(COLOURS[name]) + jitter[k], 0, 255) - area)
        glyphs.append(Glyph(int(values[k]), name, (int(left), int(top), int(left + width), int(top + height)), font))
        inks.append(_ink(mask, left, top, size // PATCH))
    image = Image.fromarray(canvas.round().astype(np.uint8))
    ink = np.array(inks).reshape(-1, size // PATCH, size // PATCH)
    return Picture(image, tuple(glyphs), ink, Path(PHOTOS[index].file).stem, corner)
