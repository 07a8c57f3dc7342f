"""What do the tasks show?

Pictures [n, 32, 32, 3] uint8, drawn, scanned or from a zip of photographs, and their labels.

Every drawn picture is a function of a seed and its number. No font, class or transformation below took part
in making the bundled model, except where a docstring says so.
"""

import functools
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from residual_kernels.bundled.drawings import (
    COLOURS,
    COLUMN,
    DIGITS,
    LETTERS,
    PATTERNS,
    PHOTOS,
    SHAPES,
    SIZE,
    draw,
)
from residual_kernels.bundled.glyphs import font_path, warp
from residual_kernels.bundled.vocabulary import ATTRIBUTES
from residual_kernels.demo.story import digit_images

Pictures = tuple[np.ndarray, np.ndarray]  # uint8 [n, 32, 32, 3] and labels [n]

# Designs that are none of the model's twenty: (font file, code of its A, code of its a).
NEW_LETTERS = (
    ("STIXGeneral.ttf", 0x1D56C, 0x1D586),  # bold Fraktur
    ("STIXGeneral.ttf", 0x1D4D0, 0x1D4EA),  # bold script
    ("STIXGeneral.ttf", 0x1D670, 0x1D68A),  # typewriter
    ("cmsy10.ttf", 0x41, 0x41),  # calligraphic capitals
    ("cmmi10.ttf", 0x41, 0x61),  # mathematical italic
)
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
GREEK_NAMES = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "chi",
    "psi",
    "omega",
)
GREEK_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
)
TURNS = ("upright", "turned left", "upside down", "turned right")


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(name)), 48)


def _character(code: int, font: str, rng: np.random.Generator) -> np.ndarray:
    """One character, warped, on two colours."""
    face, text = _font(font), chr(code)
    left, top, right, bottom = face.getbbox(text)
    glyph = Image.new("L", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(glyph).text((-left, -top), text, fill=255, font=face)
    glyph = warp(glyph, rng.uniform(-8, 8), rng, bend=0.04)
    scale = 2 * rng.uniform(24, 30) / max(glyph.size)
    glyph = glyph.resize([max(3, round(scale * side)) for side in glyph.size], Image.Resampling.BILINEAR)
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    width, height = glyph.size
    canvas.paste(glyph, ((2 * SIZE - width) // 2, (2 * SIZE - height) // 2))
    return _inked(np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255, rng)


def _inked(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask [32, 32] in 0 ... 1 as ink on paper, in two colours that are easily told apart."""
    names = list(COLOURS)
    while True:
        ink, paper = (np.array(COLOURS[names[rng.integers(len(names))]], float) for _ in range(2))
        if np.abs(ink - paper).sum() > 200:
            return np.clip(paper + mask[..., None] * (ink - paper), 0, 255).astype(np.uint8)


def _balanced(each: int, classes: int) -> np.ndarray:
    return np.arange(each * classes) % classes


def digits() -> Pictures:
    """scikit-learn's handwritten digits."""
    images, labels = digit_images()
    return np.stack([np.asarray(image) for image in images]), labels.numpy()


def new_letters(each: int, seed: int) -> Pictures:
    """Letters in designs that the model never saw, capital or small."""
    labels = _balanced(each, len(LETTERS))
    images = []
    for place, label in enumerate(labels):
        rng = np.random.default_rng((seed, place))
        font, capital, small = NEW_LETTERS[rng.integers(len(NEW_LETTERS))]
        start = capital if rng.random() < 0.5 else small
        images.append(_character(start + ord(LETTERS[label]) - ord("a"), font, rng))
    return np.stack(images), labels


def greek(each: int, seed: int) -> Pictures:
    """Small Greek letters: an alphabet the model has no word and no picture of."""
    labels = _balanced(each, len(GREEK))
    images = []
    for place, label in enumerate(labels):
        rng = np.random.default_rng((seed, place))
        images.append(_character(ord(GREEK[label]), GREEK_FONTS[rng.integers(len(GREEK_FONTS))], rng))
    return np.stack(images), labels


def dots(each: int, seed: int, most: int = 6) -> Pictures:
    """One to six dots of one colour, none touching another."""
    labels = _balanced(each, most)
    images = []
    for place, label in enumerate(labels):
        rng = np.random.default_rng((seed, place))
        images.append(_inked(_dots(int(label) + 1, rng), rng))
    return np.stack(images), labels


def _dots(count: int, rng: np.random.Generator) -> np.ndarray:
    while True:
        radius = rng.uniform(4, 8)
        centres: list[np.ndarray] = []
        for _ in range(200):
            centre = rng.uniform(radius, 2 * SIZE - radius, 2)
            if all(np.hypot(*(centre - other)) > 2 * radius + 4 for other in centres):
                centres.append(centre)
                if len(centres) == count:
                    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
                    for x, y in centres:
                        box = (x - radius, y - radius, x + radius, y + radius)
                        ImageDraw.Draw(canvas).ellipse(box, fill=255)
                    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
                    return np.asarray(small, np.float32) / 255


def _drawn(kinds: tuple[str, ...], attribute: str, values: tuple[str, ...], each: int, seed: int) -> Pictures:
    """The model's own kind of drawings, with as many of every value."""
    images, labels, found = [], [], np.zeros(len(values), int)
    wanted = {ATTRIBUTES[attribute].index(value): place for place, value in enumerate(values)}
    start = 0
    while found.min() < each:
        batch = draw(500, seed, start, kinds)
        start += 500
        for image, row in zip(batch.images, batch.labels, strict=True):
            place = wanted.get(int(row[COLUMN[attribute]]))
            if place is not None and found[place] < each:
                found[place] += 1
                images.append(image)
                labels.append(place)
    return np.stack(images), np.array(labels)


def textures(each: int, seed: int) -> Pictures:
    """The ten drawn patterns, twice as coarse as the model knows them, faint and grainy."""
    images, labels = _drawn(("pattern",), "what", PATTERNS, each, seed)
    found = []
    for place, image in enumerate(images):
        rng = np.random.default_rng((seed, place, 1))
        x, y = rng.integers(0, SIZE // 2 + 1, 2)
        part = Image.fromarray(image).crop((x, y, x + SIZE // 2, y + SIZE // 2))
        wide = np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
        faint = 128 + 0.3 * (wide - 128) + rng.normal(0, 12, wide.shape)
        found.append(np.clip(faint, 0, 255).astype(np.uint8))
    return np.stack(found), labels


def outlines(each: int, seed: int) -> Pictures:
    """The drawn shapes, of which only the edges are left."""
    images, labels = _drawn(("shape",), "what", SHAPES, each, seed)
    return edges(images), labels


def case(each: int, seed: int) -> Pictures:
    """Capital or small letters, which the model hardly tells apart."""
    return _drawn(("letter",), "case", ATTRIBUTES["case"], each, seed)


def tilt(each: int, seed: int) -> Pictures:
    """Digits and letters that stand upright or lean; the model hardly learned to tell."""
    return _drawn(("digit", "letter"), "tilt", ATTRIBUTES["tilt"], each, seed)


def edges(images: np.ndarray) -> np.ndarray:
    """Edge drawings: white lines on black."""
    found = []
    for image in images:
        lines = Image.fromarray(image).convert("L").filter(ImageFilter.FIND_EDGES)
        grey = np.asarray(lines, np.float32)
        grey[[0, -1]] = grey[:, [0, -1]] = 0  # the filter leaves the border as it was
        found.append(np.clip(grey * (255 / max(64.0, float(np.percentile(grey, 98)))), 0, 255))
    return np.repeat(np.stack(found)[..., None], 3, 3).astype(np.uint8)


@functools.cache
def photographs(archive: Path, half: str, each: int) -> Pictures:
    """`each` photographs of every class of one half of an ImageFolder in a zip, in the zip's order."""
    images, labels = [], []
    with zipfile.ZipFile(archive) as folder:
        names = sorted(folder.namelist())
        for label, name in enumerate(PHOTOS):
            own = [one for one in names if f"{half}/{name}/" in one and not one.endswith("/")][:each]
            if len(own) < each:
                raise ValueError(f"{archive} holds {len(own)} images under {half}/{name}; {each} are needed")
            for one in own:
                with folder.open(one) as file:
                    image = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                images.append(np.asarray(image))
                labels.append(label)
    return np.stack(images), np.array(labels)


def turned(images: np.ndarray, seed: int) -> Pictures:
    """Each picture turned by 0, 90, 180 or 270 degrees; the label is which."""
    labels = np.random.default_rng(seed).permutation(np.arange(len(images)) % len(TURNS))
    found = [np.rot90(image, k=turn).copy() for image, turn in zip(images, labels, strict=True)]
    return np.stack(found), labels


ANIMALS = frozenset(("bird", "cat", "deer", "dog", "frog", "horse"))
QUESTION = ("vehicle", "animal")


def animals_in_negative(images: np.ndarray, labels: np.ndarray) -> Pictures:
    """Grey negatives of photographs, under another question: a vehicle or an animal?"""
    grey = 255 - images.astype(np.float32).mean(3, keepdims=True)
    answers = np.array([int(name in ANIMALS) for name in PHOTOS])[labels]
    return np.repeat(grey, 3, 3).astype(np.uint8), answers


__all__ = [
    "DIGITS",
    "GREEK_NAMES",
    "LETTERS",
    "PATTERNS",
    "PHOTOS",
    "QUESTION",
    "SHAPES",
    "TURNS",
    "Pictures",
    "animals_in_negative",
    "case",
    "digits",
    "dots",
    "edges",
    "greek",
    "new_letters",
    "outlines",
    "photographs",
    "textures",
    "tilt",
    "turned",
]
