"""What does a single glyph or shape look like: coverage masks from fonts, from pen strokes and from polygons.

The fonts are the TrueType files inside matplotlib; the pen strokes of the ten digits are written down here.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from residual_kernels import extras

FONTS = tuple(
    f"{name}.ttf"
    for name in (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "DejaVuSerif-BoldItalic",
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
        "STIXGeneralBolIta",
        "cmr10",
        "cmb10",
        "cmss10",
        "cmtt10",
        "cmti10",
    )
)

# Pen strokes of the digits in the unit square (x right, y down); a corner ends one stroke, starts the next.
_OVAL = [(0.5 + 0.4 * math.sin(a), 0.5 - 0.5 * math.cos(a)) for a in np.linspace(0.3, 0.3 + 2 * math.pi, 13)]
_PEN: tuple[tuple[list[list[tuple[float, float]]], ...], ...] = (
    ([_OVAL], [[(0.65, 0.05), *_OVAL[9:12], *_OVAL[0:10]]]),
    ([[(0.5, 0), (0.5, 1)]], [[(0.25, 0.25), (0.55, 0)], [(0.55, 0), (0.55, 1)]],
     [[(0.25, 0.22), (0.5, 0)], [(0.5, 0), (0.5, 1)], [(0.2, 1), (0.8, 1)]]),
    ([[(0.15, 0.25), (0.35, 0.03), (0.7, 0.06), (0.82, 0.28), (0.6, 0.6), (0.12, 1)], [(0.12, 1), (0.9, 1)]],
     [[(0.15, 0.2), (0.5, 0), (0.8, 0.25), (0.55, 0.7), (0.25, 0.95), (0.15, 0.8), (0.4, 0.82), (0.9, 1)]]),
    ([[(0.15, 0.12), (0.45, 0), (0.8, 0.18), (0.7, 0.4), (0.4, 0.48)],
      [(0.4, 0.48), (0.8, 0.6), (0.82, 0.86), (0.45, 1), (0.1, 0.88)]],
     [[(0.15, 0), (0.8, 0)], [(0.8, 0), (0.45, 0.4)],
      [(0.45, 0.4), (0.8, 0.55), (0.82, 0.85), (0.45, 1), (0.1, 0.9)]]),
    ([[(0.35, 0), (0.15, 0.6)], [(0.15, 0.6), (0.92, 0.6)], [(0.68, 0.3), (0.62, 1)]],
     [[(0.7, 1), (0.7, 0)], [(0.7, 0), (0.08, 0.66)], [(0.08, 0.66), (0.95, 0.66)]],
     [[(0.2, 0), (0.2, 0.45), (0.45, 0.55), (0.8, 0.45)], [(0.8, 0), (0.75, 1)]]),
    ([[(0.85, 0.02), (0.25, 0.02)], [(0.25, 0.02), (0.2, 0.45)],
      [(0.2, 0.45), (0.55, 0.38), (0.85, 0.65), (0.7, 0.94), (0.4, 1), (0.1, 0.88)]],),
    ([[(0.7, 0.02), (0.35, 0.25), (0.15, 0.65), (0.3, 0.95), (0.65, 0.97), (0.82, 0.74), (0.55, 0.54),
       (0.2, 0.72)]],
     [[(0.35, 0), (0.18, 0.4), (0.15, 0.8), (0.45, 1), (0.8, 0.82), (0.6, 0.6), (0.2, 0.75)]]),
    ([[(0.1, 0.05), (0.9, 0.05)], [(0.9, 0.05), (0.55, 0.5), (0.4, 1)]],
     [[(0.1, 0.05), (0.9, 0.05)], [(0.9, 0.05), (0.4, 1)], [(0.3, 0.5), (0.85, 0.48)]]),
    ([[(0.72, 0.15), (0.45, 0), (0.22, 0.2), (0.5, 0.47), (0.82, 0.75), (0.5, 1), (0.18, 0.78), (0.5, 0.47),
       (0.78, 0.2), (0.5, 0)]],),
    ([[(0.8, 0.25), (0.55, 0.48), (0.22, 0.38), (0.22, 0.1), (0.55, 0), (0.8, 0.2)],
      [(0.8, 0.2), (0.75, 0.6), (0.6, 1)]],
     [[(0.78, 0.22), (0.5, 0.48), (0.2, 0.25), (0.5, 0), (0.78, 0.22), (0.75, 0.75), (0.5, 1), (0.2, 0.9)]]),
)  # fmt: skip


def pick(options, rng: np.random.Generator, odds: tuple[float, ...] | None = None):
    if odds is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(odds), rng.random() * sum(odds)))]


# Matplotlib has had the first since 3.11, the second always.
STAND_INS = {"cmti10.ttf": "STIXGeneralItalic.ttf"}


def font_path(name: str) -> Path:
    """Where matplotlib keeps the font file `name`, or the one that stands in for it in older releases."""
    matplotlib = extras.need("matplotlib", "plot", "drawing letters and digits")
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    path = folder / name
    return path if path.is_file() else folder / STAND_INS.get(name, name)


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(name)), 48)


def font_glyph(text: str, rng: np.random.Generator) -> Image.Image:
    font = _font(pick(FONTS, rng))
    left, top, right, bottom = font.getbbox(text)
    glyph = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), text, fill=255, font=font)
    return glyph


def pen_glyph(digit: int, rng: np.random.Generator) -> Image.Image:
    """A digit written with a round pen: smooth curves through jittered points."""
    strokes = _PEN[digit][int(rng.integers(len(_PEN[digit])))]
    moved: dict[tuple[float, float], np.ndarray] = {}
    width, squeeze = rng.uniform(4, 10), rng.uniform(0.55, 1.0) if digit != 1 else rng.uniform(0.3, 0.8)
    glyph = Image.new("L", (64, 64))
    pen = ImageDraw.Draw(glyph)
    for stroke in strokes:
        points = []
        for point in stroke:
            if point not in moved:
                x, y = np.asarray(point) + rng.normal(0, 0.035, 2)
                moved[point] = np.array([32 + 44 * squeeze * (x - 0.5), 10 + 44 * y])
            points.append(moved[point])
        curve = [(float(x), float(y)) for x, y in _smooth(np.stack(points))]
        pen.line(curve, fill=255, width=round(width), joint="curve")
        for x, y in (curve[0], curve[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return glyph


def _smooth(points: np.ndarray, steps: int = 6) -> np.ndarray:
    """Catmull-Rom curve through `points` [n, 2]."""
    if len(points) == 2:
        return points
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([curve.reshape(-1, 2), points[-1:]])


def shape_glyph(name: str, rng: np.random.Generator) -> Image.Image:
    glyph = Image.new("L", (64, 64))
    pen = ImageDraw.Draw(glyph)

    def polygon(corners: int, radii: tuple[float, ...] = (26,), turn: float = 0.0) -> None:
        angles = turn - math.pi / 2 + 2 * math.pi * np.arange(corners) / corners
        radius = np.resize(radii, corners)
        pen.polygon(
            [(32 + r * math.cos(a), 32 + r * math.sin(a)) for a, r in zip(angles, radius, strict=True)],
            fill=255,
        )

    if name in ("circle", "ring", "moon"):
        pen.ellipse((6, 6, 58, 58), fill=255)
        if name == "ring":
            hole = rng.uniform(12, 18)
            pen.ellipse((32 - hole, 32 - hole, 32 + hole, 32 + hole), fill=0)
        elif name == "moon":
            pen.ellipse((20, 2, 68, 50), fill=0)
    elif name == "cross":
        arm = rng.uniform(6, 10)
        pen.rectangle((6, 32 - arm, 58, 32 + arm), fill=255)
        pen.rectangle((32 - arm, 6, 32 + arm, 58), fill=255)
    elif name == "heart":
        pen.ellipse((7, 10, 33, 36), fill=255)
        pen.ellipse((31, 10, 57, 36), fill=255)
        pen.polygon([(9, 30), (55, 30), (32, 58)], fill=255)
    elif name == "arrow":
        pen.polygon([(6, 24), (34, 24), (34, 10), (60, 32), (34, 54), (34, 40), (6, 40)], fill=255)
    else:
        corners, turn = {
            "square": (4, math.pi / 4),
            "diamond": (4, 0),
            "triangle": (3, 0),
            "hexagon": (6, 0),
        }.get(name, (10, 0))
        polygon(corners, (28, 11) if name == "star" else (28, 18) if name == "diamond" else (28,), turn)
    return glyph


def warp(glyph: Image.Image, angle: float, rng: np.random.Generator, bend: float) -> Image.Image:
    """Shear, stretch, rotate by `angle` degrees (counter-clockwise), bend on a mesh, crop to the ink."""
    width, height = glyph.size
    size = 112
    shear, stretch = rng.uniform(-0.15, 0.15), math.exp(rng.uniform(-0.2, 0.2))
    a = math.radians(angle)
    turn = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    inverse = np.array([[1 / stretch, shear], [0.0, 1.0]]) @ turn
    shift = np.array([width / 2, height / 2]) - inverse @ np.array([size / 2, size / 2])
    matrix = (*inverse[0], shift[0], *inverse[1], shift[1])
    moved = glyph.transform(
        (size, size), Image.Transform.AFFINE, tuple(map(float, matrix)), Image.Resampling.BILINEAR
    )
    left, top, right, bottom = moved.getbbox() or (0, 0, size, size)
    xs, ys = np.meshgrid(np.linspace(left, right, 4), np.linspace(top, bottom, 4))
    span = max(right - left, bottom - top)
    xs, ys = xs + rng.normal(0, bend * span, xs.shape), ys + rng.normal(0, bend * span, ys.shape)
    cell, pad = 20, 10
    mesh = []
    for i in range(3):
        for j in range(3):
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))
            quad = tuple(float(v) for r, c in corners for v in (xs[r, c], ys[r, c]))
            tall, wide = (bottom - top) / span, (right - left) / span
            box = (
                pad + round(j * cell * wide),
                pad + round(i * cell * tall),
                pad + round((j + 1) * cell * wide),
                pad + round((i + 1) * cell * tall),
            )
            mesh.append((box, quad))
    bent = moved.transform((80, 80), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return bent.crop(bent.getbbox() or (pad, pad, 70, 70))
