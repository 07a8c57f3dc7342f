"""The tasks: images encoded once by the bundled model, and the class vectors that everybody starts from."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import residual_kernels as rk
from benchmarks.peers.tasks import BATCH, Split, few
from benchmarks.suite import pictures
from residual_kernels.bundled.captions import prompt
from residual_kernels.bundled.drawings import draw
from residual_kernels.demo.story import DRAWINGS, DRAWINGS_SEED, TEMPLATES, thirds

TRAIN, FEWEST, TEST = 600, 40, 1000  # images of a drawn task, shared by its classes; of a class at least
PHOTO_EACH = 160  # photographs a class, from the zip's test half: the model was trained on its train half
BASES_PHOTOS = 200  # a class, of the train half, without labels


@dataclass(frozen=True)
class Recipe:
    """One task by name: its classes, how each is asked for (None: the means of labelled images),
    and its pictures."""

    names: tuple[str, ...]
    templates: Sequence[str | Callable[[str], str]] | None
    read: Callable[[Path | None], tuple[pictures.Pictures, pictures.Pictures]]
    photographs: bool = False
    about: str = ""


@dataclass(frozen=True)
class SuiteTask:
    """A task for methods to read: they fit on a few rows of `train` and are measured on `test`."""

    name: str
    tower: nn.Module
    names: tuple[str, ...]
    text_head: rk.ZeroShotHead | None
    bases: rk.SpectralBases
    train: Split
    test: Split

    def head(self, train: Split) -> rk.ZeroShotHead:
        """The class vectors that everybody starts from: of the text, or the means of the labelled images."""
        if self.text_head is not None:
            return self.text_head
        scale = float(_model()[0].logit_scale.detach())
        found = rk.ZeroShotHead.from_prototypes(train.units.output, train.labels, self.names)
        return rk.ZeroShotHead(found.class_vectors, self.names, scale)

    def of_classes(self, chosen: Sequence[int]) -> "SuiteTask":
        """The same task with some of its classes alone, numbered anew."""
        if self.text_head is None:
            raise ValueError(f"{self.name} has no class names in words")
        head = rk.ZeroShotHead(
            self.text_head.class_vectors[:, list(chosen)],
            [self.names[k] for k in chosen],
            float(self.text_head.logit_scale),
        )
        return SuiteTask(
            self.name,
            self.tower,
            tuple(head.class_names),
            head,
            self.bases,
            _some(self.train, chosen),
            _some(self.test, chosen),
        )


def _some(split: Split, chosen: Sequence[int]) -> Split:
    number = torch.full((int(split.labels.max()) + 1,), -1)
    number[list(chosen)] = torch.arange(len(chosen))
    rows = (number[split.labels] >= 0).nonzero().flatten()
    part = split.rows(rows)
    labels = number[part.labels]
    part.units.labels = labels
    part.units.class_names = None
    return Split(part.images, labels, part.units)


def _parts(draw_some: Callable[[int, int], pictures.Pictures], classes: int):
    """Training and test pictures of a drawn task, from two seeds."""
    return lambda archive: (draw_some(max(FEWEST, TRAIN // classes), 101), draw_some(TEST // classes, 102))


def _digits(archive: Path | None):
    images, labels = pictures.digits()
    train, _, test = (part.numpy() for part in thirds(len(labels)))
    return (images[train], labels[train]), (images[test], labels[test])


def _photographs(archive: Path | None):
    """60 a class to learn from and 100 to test on."""
    images, labels = pictures.photographs(archive, "test", PHOTO_EACH)
    place = np.arange(len(labels)) % PHOTO_EACH
    train, test = place < 60, place >= 60
    return (images[train], labels[train]), (images[test], labels[test])


def _changed(change: Callable[[np.ndarray, np.ndarray, int], pictures.Pictures]):
    def read(archive: Path | None):
        return tuple(
            change(images, labels, seed) for seed, (images, labels) in enumerate(_photographs(archive))
        )

    return read


def _asked(attribute: str, kind: str = "") -> tuple[Callable[[str], str], ...]:
    return (lambda name: prompt(attribute, name, kind),)


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(pictures.DIGITS, TEMPLATES, _digits, about="scikit-learn's handwritten digits"),
    "new fonts": Recipe(
        pictures.LETTERS,
        _asked("what", "letter"),
        _parts(pictures.new_letters, 25),
        about="Fraktur, script, calligraphic and typewriter letters",
    ),
    "Greek": Recipe(
        pictures.GREEK_NAMES,
        None,
        _parts(pictures.greek, 24),
        about="24 Greek letters; class vectors are means of labelled images",
    ),
    "textures": Recipe(
        pictures.PATTERNS,
        _asked("what", "pattern"),
        _parts(pictures.textures, 10),
        about="drawn patterns, enlarged, faint and grainy",
    ),
    "outlines": Recipe(
        pictures.SHAPES, _asked("what", "shape"), _parts(pictures.outlines, 11), about="edges of drawn shapes"
    ),
    "counting": Recipe(
        ("one", "two", "three", "four", "five", "six"),
        ("{} dots", "a picture of {} dots"),
        _parts(pictures.dots, 6),
        about="one to six dots",
    ),
    "case": Recipe(
        ("capital", "lower case"), _asked("case"), _parts(pictures.case, 2), about="capital or small letters"
    ),
    "tilt": Recipe(
        ("upright", "left", "right"),
        _asked("tilt"),
        _parts(pictures.tilt, 3),
        about="digits and letters that lean",
    ),
    "photographs": Recipe(
        pictures.PHOTOS, _asked("what", "photo"), _photographs, True, "CIFAR-10, ten classes"
    ),
    "edge drawings": Recipe(
        pictures.PHOTOS,
        _asked("what", "photo"),
        _changed(lambda images, labels, seed: (pictures.edges(images), labels)),
        True,
        "edges of the photographs",
    ),
    "orientation": Recipe(
        pictures.TURNS,
        ("a photo that is {}", "something {}"),
        _changed(lambda images, labels, seed: pictures.turned(images, seed)),
        True,
        "photographs turned by 0, 90, 180 or 270 degrees",
    ),
    "negatives": Recipe(
        pictures.QUESTION,
        ("a photo of a {}", "a {}"),
        _changed(lambda images, labels, seed: pictures.animals_in_negative(images, labels)),
        True,
        "grey negatives: vehicle or animal",
    ),
}


def names(archive: Path | None) -> list[str]:
    """The tasks that can be run: all of them, or without photographs where there is no zip."""
    return [name for name, recipe in RECIPES.items() if archive is not None or not recipe.photographs]


_folder: Path | None = None  # of a model that examples/bundled_clip/train.py wrote; None is the bundled one


def choose_model(folder: Path) -> None:
    """All tasks are encoded by the model in this folder from now on."""
    global _folder
    _folder = folder
    for remembered in (_model, _bases, task):
        remembered.cache_clear()


@functools.cache
def _model():
    if _folder is not None:
        return _of_example("towers").load(_folder)
    model, _, tokenizer = rk.load_bundled()
    return model, tokenizer


def _of_example(name: str):
    """A module of examples/bundled_clip, which makes and reads such models."""
    path = Path(__file__).resolve().parents[2] / "examples" / "bundled_clip" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bundled_clip_{name}", path)
    assert spec is not None  # of a path that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_input(images: np.ndarray) -> Tensor:
    """Pictures [n, 32, 32, 3] uint8 as the model takes them."""
    config = _model()[0].visual.preprocess_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


@functools.cache
def _bases(archive: Path | None) -> rk.SpectralBases:
    """Bases of all heads and MLPs, from drawings; with a zip, from photographs of its train half too."""
    background = draw(DRAWINGS, DRAWINGS_SEED).images
    if archive is not None:
        seen, _ = pictures.photographs(archive, "train", BASES_PHOTOS)
        background = np.concatenate([background, seen])
    order = np.random.default_rng(0).permutation(len(background))
    return rk.fit_bases(_model()[0].visual, as_input(background[order]).split(BATCH), kinds=("head", "mlp"))


def encoded(pictures_of: pictures.Pictures) -> Split:
    images, labels = as_input(pictures_of[0]), torch.from_numpy(pictures_of[1]).long()
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    return Split(images, labels, rk.encode(_model()[0].visual, batches, kinds=("head", "mlp")))


@functools.lru_cache(maxsize=2)
def task(name: str, archive: Path | None = None) -> SuiteTask:
    """One task, encoded."""
    recipe = RECIPES[name]
    model, tokenizer = _model()
    head = None
    if recipe.templates is not None:
        head = rk.ZeroShotHead.from_text(model, tokenizer, recipe.names, recipe.templates)
    train, test = (encoded(part) for part in recipe.read(archive))
    bases = _bases(archive if recipe.photographs else None)
    return SuiteTask(name, model.visual, recipe.names, head, bases, train, test)


__all__ = [
    "RECIPES",
    "Recipe",
    "Split",
    "SuiteTask",
    "as_input",
    "choose_model",
    "encoded",
    "few",
    "names",
    "task",
]
