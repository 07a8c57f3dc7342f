"""What is said about an image: captions that name a few of its attributes, in varied words."""

from __future__ import annotations

import numpy as np

from residual_kernels.bundled.vocabulary import ATTRIBUTES, COLUMN, DIGITS, PATTERNS, record

_FIGURES = {word: str(i) for i, word in enumerate(DIGITS)}
_ALSO = {
    "automobile": ("automobile", "car"),
    "airplane": ("airplane", "plane"),
    "grey": ("grey", "gray"),
    "checks": ("checks", "a checkerboard"),
    "small": ("small", "tiny", "little"),
    "medium": ("medium sized",),
    "large": ("large", "big", "huge"),
    "sharp": ("sharp", "clear"),
    "blurry": ("blurry", "blurred"),
    "pixelated": ("pixelated", "low resolution"),
    "noisy": ("noisy", "grainy"),
    "bright": ("bright", "light"),
    "capital": ("capital", "upper case"),
}
_GENERAL = {
    "digit": ("digit", "number", "numeral"),
    "letter": ("letter",),
    "shape": ("shape",),
    "pattern": ("pattern", "texture"),
    "photo": ("photo", "photograph"),
}
_OPENINGS = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "a sketch of",
    "a scan of",
    "this is",
)
_ODDS = {
    "colour": 0.25,
    "background": 0.22,
    "texture": 0.25,
    "size": 0.18,
    "tilt": 0.15,
    "place": 0.18,
    "quality": 0.18,
    "case": 0.3,
    "hand": 0.2,
    "light": 0.3,
}
PLACES = {
    "centre": ("in the middle", "in the centre"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "left": ("on the left",),
    "right": ("on the right",),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}


def caption(label: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A caption of the image that `label` describes, and the label row of what it mentions (-1: not)."""
    truth = record(label)
    plain = rng.random() < 0.3  # nothing but what it is
    said = {} if plain else {a: v for a, v in truth.items() if rng.random() < _ODDS.get(a, 0)}
    if plain or not said or rng.random() < 0.8:
        said["what"] = truth["what"]
    elif rng.random() < 0.7:
        said["kind"] = truth["kind"]
    if "what" in said:
        said["kind"] = truth["kind"]
    mentioned = np.full(len(ATTRIBUTES), -1, np.int8)
    for name, value in said.items():
        mentioned[COLUMN[name]] = ATTRIBUTES[name].index(value)
    return _compose(said, rng), mentioned


def prompt(attribute: str, value: str, kind: str = "") -> str:
    """The caption that asks for one value of an attribute (`kind` is what a `what` belongs to)."""
    if attribute == "what":
        patterns = {
            "digit": "the number {}",
            "letter": "the letter {}",
            "photo": "a photo of a {}",
            "pattern": "{}",
        }
        return patterns.get(kind, "a {}").format(value)
    if attribute == "place":
        return f"something {PLACES[value][0]}"
    if attribute == "background":
        return f"something on {_article('a', value)} {value} background"
    if attribute == "tilt":
        return "something upright" if value == "upright" else f"something tilted {value}"
    patterns = {
        "kind": "a {}",
        "quality": "a {} picture",
        "case": "a {} letter",
        "hand": "a {} number",
        "light": "a {} photo",
    }
    return patterns.get(attribute, "something {}").format(_ALSO.get(value, (value,))[0])


def _compose(said: dict[str, str], rng: np.random.Generator) -> str:
    def word(name: str) -> str:
        return _one_of(_ALSO.get(said[name], (said[name],)), rng)

    adjectives = [
        word(name)
        for name in ("quality", "size", "light", "colour", "texture", "hand", "case")
        if name in said
    ]
    after = []
    if "background" in said:
        colour = word("background")
        after.append(_one_of((f"on {_article('a', colour)} {colour} background", f"on {colour}"), rng))
    if "place" in said:
        after.append(_one_of(PLACES[said["place"]], rng))
    if "tilt" in said:
        tilt = said["tilt"]
        if tilt == "upright":
            adjectives.insert(0, "upright")
        else:
            after.append(_one_of((f"tilted {tilt}", f"leaning to the {tilt}"), rng))
    rng.shuffle(after)

    noun, article = _noun(said, rng)
    words = " ".join([*adjectives, noun])
    if article == "a" and adjectives:
        article = _one_of(("a", "a", "the", ""), rng)
    if said.keys().isdisjoint(("what", "kind")) and rng.random() < 0.5:
        article, words = "", " ".join(["something", *adjectives])
    phrase = " ".join(part for part in (_article(article, words), words, *after) if part)
    if said.get("kind") != "photo" and rng.random() < 0.35:
        phrase = f"{_one_of(_OPENINGS, rng)} {phrase}"
    return phrase + ("." if rng.random() < 0.1 else "")


def _noun(said: dict[str, str], rng: np.random.Generator) -> tuple[str, str]:
    """The thing itself and its article ("a" stands for a or an)."""
    kind, what = said.get("kind"), said.get("what")
    if what is None:
        return _one_of(_GENERAL[kind] if kind else ("thing", "thing", "picture", "drawing"), rng), "a"
    name = _one_of(_ALSO.get(what, (what,)), rng)
    if kind == "digit":
        if rng.random() < 0.5:
            name = _FIGURES[what]
        return _one_of(
            (
                (f"number {name}", "the"),
                (f"digit {name}", "the"),
                (f"number {name}", ""),
                (f"figure {name}", "the"),
                (name, "a"),
                (name, ""),
                (f"digit {name}", "a"),
            ),
            rng,
        )
    if kind == "letter":
        return _one_of(((f"letter {name}", "the"), (f"letter {name}", "a"), (f"letter {name}", "")), rng)
    if kind == "photo":
        article = _article("a", name)
        return _one_of(
            ((f"photo of {article} {name}", "a"), (name, "a"), (f"picture of {article} {name}", "a")), rng
        )
    if kind == "pattern" and what in PATTERNS:
        return _one_of(((name, ""), (f"pattern of {name}", "a"), (f"texture with {name}", "a")), rng)
    return name, "a"


def _article(article: str, words: str) -> str:
    return "an" if article == "a" and words[:1] in "aeiou" and words[1:2] != " " else article


def _one_of(options, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]
