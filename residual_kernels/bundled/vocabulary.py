"""The words of the bundled model: what its drawings and captions can say, and the label row that says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("abcdefghijklmnpqrstuvwxyz")  # no o: it is drawn like zero
SHAPES = (
    "circle",
    "ring",
    "square",
    "diamond",
    "triangle",
    "star",
    "cross",
    "heart",
    "moon",
    "arrow",
    "hexagon",
)
PATTERNS = (
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "dots",
    "checks",
    "grid",
    "rings",
    "waves",
    "bricks",
    "rays",
)
PHOTOS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COLOURS = {
    "black": (12, 12, 12),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "red": (215, 30, 30),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (35, 155, 50),
    "blue": (35, 70, 215),
    "purple": (130, 40, 170),
    "pink": (250, 140, 185),
    "brown": (120, 70, 30),
}

#: What a label row says, column by column; the entry is an index into the tuple, -1 where nothing is said.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": ("digit", "letter", "shape", "pattern", "photo"),
    "what": DIGITS + LETTERS + SHAPES + PATTERNS + PHOTOS,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "texture": ("plain", "striped", "dotted", "checkered"),
    "size": ("small", "medium", "large"),
    "tilt": ("upright", "left", "right"),
    "place": (
        "centre",
        "top",
        "bottom",
        "left",
        "right",
        "top left",
        "top right",
        "bottom left",
        "bottom right",
    ),
    "quality": ("sharp", "blurry", "pixelated", "noisy"),
    "case": ("capital", "lower case"),
    "hand": ("printed", "handwritten"),
    "light": ("bright", "dark"),
}
COLUMN = {name: i for i, name in enumerate(ATTRIBUTES)}


def record(label: np.ndarray) -> dict[str, str]:
    """A label row in words: {"kind": "digit", "what": "seven", ...}, only what is said of the image."""
    return {name: values[label[c]] for c, (name, values) in enumerate(ATTRIBUTES.items()) if label[c] >= 0}
