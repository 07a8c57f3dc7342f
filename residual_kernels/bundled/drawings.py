"""Where do drawn images come from: glyphs, shapes and patterns on 32 x 32 pixels, and what is true of each.

An image is a function of (seed, index) alone: any slice of a stream can be drawn anywhere, in any order.
"""

from __future__ import annotations

import colorsys
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from residual_kernels.bundled.glyphs import font_glyph, pen_glyph, pick, shape_glyph, warp
from residual_kernels.bundled.vocabulary import ATTRIBUTES, COLOURS, DIGITS, LETTERS, PATTERNS, SHAPES
from residual_kernels.bundled.vocabulary import COLUMN as COLUMN
from residual_kernels.bundled.vocabulary import PHOTOS as PHOTOS
from residual_kernels.bundled.vocabulary import record as record

SIZE = 32
_KIND_ODDS = np.cumsum([0.40, 0.24, 0.20, 0.16])
_BOTH_CASES_ALIKE = frozenset("ckpsuvwxz")
_SMALL_ONLY = frozenset("i")  # a capital I is drawn like one
_CAPITAL_ONLY = frozenset("l")
_TEXTURE_PATTERN = {"striped": PATTERNS[:3], "dotted": ("dots",), "checkered": ("checks",)}


class Drawings(NamedTuple):
    """A batch of drawn images: `images` uint8 [n, 32, 32, 3], `labels` int8 [n, len(ATTRIBUTES)]."""

    images: np.ndarray
    labels: np.ndarray


def draw(n: int, seed: int, start: int = 0, kinds: tuple[str, ...] | None = None) -> Drawings:
    """Images `start` ... `start + n - 1` of stream `seed`; `kinds` limits them, in equal parts."""
    known = ATTRIBUTES["kind"][:4]
    if n < 0 or start < 0:
        raise ValueError(f"draw needs n >= 0 and start >= 0, got n={n}, start={start}")
    if kinds is not None and (not kinds or not set(kinds) <= set(known)):
        raise ValueError(f"kinds must be some of {known}, got {kinds!r}")
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    labels = np.full((n, len(ATTRIBUTES)), -1, np.int8)
    for i in range(n):
        rng = np.random.default_rng((seed, start + i))
        kind = known[int(np.searchsorted(_KIND_ODDS, rng.random() * _KIND_ODDS[-1]))]
        if kinds is not None:
            kind = kinds[int(rng.integers(len(kinds)))]
        images[i], truth = _draw_one(kind, rng)
        for name, value in truth.items():
            labels[i, COLUMN[name]] = ATTRIBUTES[name].index(value)
    return Drawings(images, labels)


def drawn_images(n: int, seed: int) -> list[Image.Image]:
    """`n` drawn PIL images of every kind: a background set for spectral bases that holds no real data."""
    return [Image.fromarray(image) for image in draw(n, seed).images]


def _draw_one(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, str]]:
    truth = {"kind": kind}
    truth["colour"], truth["background"] = _two_colours(
        rng, grey=rng.random() < (0.5 if kind == "digit" else 0.25)
    )
    ink, paper = (_jitter(COLOURS[truth[name]], rng) for name in ("colour", "background"))
    if kind == "pattern":
        truth["what"] = pick(PATTERNS, rng)
        mask = _pattern(truth["what"], rng.uniform(5, 12), rng)
    else:
        mask, fill = _thing_mask(truth, rng)
        ink = ink + fill[..., None] * (paper - ink) * 0.75
    image = paper + mask[..., None] * (ink - paper)
    # Light falls off to one side.
    image *= 1 + rng.uniform(-0.15, 0.15) * (np.linspace(-1, 1, SIZE)[:, None, None])
    truth["quality"] = pick(ATTRIBUTES["quality"], rng, (0.45, 0.27, 0.14, 0.14))
    if truth.get("size") == "small" and truth["quality"] == "pixelated":
        truth["quality"] = "sharp"
    return _degrade(image, truth, rng), truth


def _thing_mask(truth: dict[str, str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the thing and of its second colour, both [32, 32] in 0 ... 1; fills in `truth`."""
    kind = truth["kind"]
    if kind == "shape":
        truth["what"] = pick(SHAPES, rng)
        glyph = shape_glyph(truth["what"], rng)
    elif kind == "letter":
        letter = truth["what"] = pick(LETTERS, rng)
        capital = letter not in _SMALL_ONLY and (letter in _CAPITAL_ONLY or rng.random() < 0.5)
        if letter not in _BOTH_CASES_ALIKE:
            truth["case"] = "capital" if capital else "lower case"
        truth["hand"] = "printed"
        glyph = font_glyph(letter.upper() if capital else letter, rng)
    else:
        digit = int(rng.integers(10))
        truth["what"], truth["hand"] = DIGITS[digit], "handwritten" if rng.random() < 0.25 else "printed"
        glyph = font_glyph(str(digit), rng) if truth["hand"] == "printed" else pen_glyph(digit, rng)

    truth["tilt"] = pick(ATTRIBUTES["tilt"], rng, (0.6, 0.2, 0.2))
    angle = rng.uniform(14, 34) * {"upright": 0, "left": 1, "right": -1}[truth["tilt"]] + rng.uniform(-6, 6)
    if truth.get("what") in ("circle", "ring"):
        del truth["tilt"]
    glyph = warp(glyph, angle, rng, bend=0.02 if kind == "shape" else 0.05)

    truth["size"] = pick(ATTRIBUTES["size"], rng, (0.15, 0.25, 0.6))
    low, high = {"small": (10, 13), "medium": (17, 22), "large": (26, 33)}[truth["size"]]
    longest = 2 * rng.uniform(low, high)
    scale = longest / max(glyph.size)
    box = [max(3, round(scale * side)) for side in glyph.size]
    glyph = glyph.resize(box, Image.Resampling.BILINEAR)
    if rng.random() < 0.3 and kind != "shape" and truth["size"] == "large":
        glyph = glyph.filter(ImageFilter.MaxFilter(3) if rng.random() < 0.5 else ImageFilter.MinFilter(3))

    truth["place"] = "centre" if truth["size"] == "large" else pick(ATTRIBUTES["place"], rng)
    free = [2 * SIZE - side for side in box]
    ends = (("left", "right"), ("top", "bottom"))
    corner = [
        round(
            space
            * (
                0.5
                + 0.42 * ((high_end in truth["place"]) - (low_end in truth["place"]))
                + rng.uniform(-0.08, 0.08)
            )
        )
        for space, (low_end, high_end) in zip(free, ends, strict=True)
    ]
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    canvas.paste(glyph, (corner[0], corner[1]))
    mask = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255

    fill = np.zeros((SIZE, SIZE), np.float32)
    truth["texture"] = "plain"
    if (
        kind == "shape"
        and truth["size"] != "small"
        and truth["what"] not in ("ring", "moon")
        and rng.random() < 0.5
    ):
        truth["texture"] = pick(ATTRIBUTES["texture"][1:], rng)
        fill = 1 - _pattern(pick(_TEXTURE_PATTERN[truth["texture"]], rng), rng.uniform(5, 7), rng)
    return mask, fill


def _pattern(name: str, period: float, rng: np.random.Generator) -> np.ndarray:
    """A pattern over the whole image, [32, 32] in 0 ... 1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    y, x = y + rng.uniform(0, period), x + rng.uniform(0, period)
    u, v = 2 * math.pi * x / period, 2 * math.pi * y / period
    if name == "horizontal stripes":
        wave = np.sin(v)
    elif name == "vertical stripes":
        wave = np.sin(u)
    elif name == "diagonal stripes":
        wave = np.sin((u + v * (1 if rng.random() < 0.5 else -1)) / math.sqrt(2))
    elif name == "dots":
        wave = np.cos(u) + np.cos(v) - 0.6
    elif name == "checks":
        wave = np.sin(u / 1.5) * np.sin(v / 1.5)
    elif name == "grid":
        wave = np.maximum(np.cos(u), np.cos(v)) - 0.75
    elif name == "waves":
        wave = np.sin(v + 1.6 * np.sin(u / 2))
    elif name == "bricks":
        row = np.floor(y / period)
        wave = np.minimum(np.cos(v + math.pi) + 0.7, np.cos(u / 1.6 + math.pi * (row % 2)) + 0.85)
    else:
        dx, dy = x - rng.uniform(14, 24), y - rng.uniform(14, 24)
        wave = (
            np.sin(2 * math.pi * np.hypot(dx, dy) / period)
            if name == "rings"
            else np.sin(round(60 / period) * np.arctan2(dy, dx))
        )
    return np.clip(0.5 + 2.5 * wave, 0, 1).astype(np.float32)


def _two_colours(rng: np.random.Generator, grey: bool) -> tuple[str, str]:
    """Names of ink and paper, told apart easily; `grey` draws the grey-level pairs, mostly light on dark."""
    if grey:
        pairs = (
            ("white", "black"),
            ("grey", "black"),
            ("black", "white"),
            ("black", "grey"),
            ("white", "grey"),
        )
        return pick(pairs, rng, (0.55, 0.15, 0.16, 0.07, 0.07))
    while True:
        ink, paper = pick(tuple(COLOURS), rng), pick(tuple(COLOURS), rng)
        if np.abs(np.subtract(COLOURS[ink], COLOURS[paper])).sum() > 200:
            return ink, paper


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    hue, light, saturation = colorsys.rgb_to_hls(*(c / 255 for c in colour))
    light = float(np.clip(light + rng.normal(0, 0.04), 0, 1))
    return 255 * np.asarray(
        colorsys.hls_to_rgb(hue + rng.normal(0, 0.01), light, saturation * rng.uniform(0.8, 1))
    )


def _degrade(image: np.ndarray, truth: dict[str, str], rng: np.random.Generator) -> np.ndarray:
    quality = truth["quality"]
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    if quality in ("blurry", "pixelated"):
        fine = truth.get("size") == "small"
        side = int(rng.integers(14, 17)) if fine else int(rng.integers(8, 11))
        if quality == "pixelated":
            picture = picture.resize((side, side), Image.Resampling.BOX).resize(
                (SIZE, SIZE), Image.Resampling.NEAREST
            )
        elif rng.random() < 0.5:
            back = pick((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC), rng)
            picture = picture.resize((side, side), Image.Resampling.BOX).resize((SIZE, SIZE), back)
        else:
            picture = picture.filter(
                ImageFilter.GaussianBlur(rng.uniform(1, 1.4) if fine else rng.uniform(1.2, 2.2))
            )
    elif quality == "noisy":
        noise = rng.normal(0, rng.uniform(18, 40), (SIZE, SIZE, 3 if rng.random() < 0.5 else 1))
        return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    return np.asarray(picture)
