"""The tasks: a model, its class vectors, and images of which only some are labelled."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import residual_kernels as rk
from residual_kernels.bundled.drawings import DIGITS, PHOTOS, drawn_images
from residual_kernels.demo.story import DRAWINGS, DRAWINGS_SEED, TEMPLATES, digit_images, thirds
from residual_kernels.units.cache import UnitCache

BATCH = 256
PHOTO_SPLIT = (100, 60, 240)  # a class: train, validation, test; all from the zip's test half
BASES_PHOTOS = 3000  # of the train half, unlabelled, beside as many drawings


@dataclass(frozen=True)
class Split:
    """Images, what the tower makes of them, and labels."""

    images: Tensor
    labels: Tensor
    units: UnitCache

    def rows(self, chosen: Tensor) -> "Split":
        return Split(self.images[chosen], self.labels[chosen], self.units.subset(chosen))


@dataclass(frozen=True)
class PeerTask:
    """Everything that a method may read: it fits on `train`, chooses on `val`, and is measured on `test`."""

    name: str
    tower: nn.Module
    head: rk.ZeroShotHead
    bases: rk.SpectralBases
    stream_bases: rk.SpectralBases
    train: Split
    val: Split
    test: Split
    encoding_seconds: float  # for train and validation, which methods on cached units or outputs need once


@dataclass(frozen=True)
class Fitted:
    """Logits [N, K] of a split by what was fitted, and how many numbers were trained."""

    logits: Callable[[Split], Tensor]
    parameters: int


@dataclass(frozen=True)
class Peer:
    """`fit(task, train, settings, seed)` fits one configuration of `grid`."""

    fit: Callable[[PeerTask, Split, dict[str, Any], int], Fitted]
    grid: tuple[dict[str, Any], ...]
    source: str = field(repr=False)


def few(split: Split, shots: int | None, seed: int) -> Split:
    """`shots` images of every class, chosen by `seed`; all of them for None."""
    if shots is None:
        return split
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[split.labels[order] == label][:shots] for label in split.labels.unique()]
    return split.rows(torch.cat(chosen))


def _batches(images: Tensor, labels: Tensor | None = None):
    if labels is None:
        return images.split(BATCH)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def _splits(tower, images: Tensor, labels: Tensor, runs) -> tuple[Split, Split, Split]:
    units = rk.encode(tower, _batches(images, labels), kinds=("head", "mlp"))
    whole = Split(images, labels, units)
    train, val, test = (whole.rows(rows) for rows in runs)
    return train, val, test


def _task(name: str, model, head, background: Tensor, images: Tensor, labels: Tensor, runs) -> PeerTask:
    tower = model.visual
    start = time.perf_counter()
    train, val, test = _splits(tower, images, labels, runs)
    encoding = (time.perf_counter() - start) * (len(train.labels) + len(val.labels)) / len(labels)
    return PeerTask(
        name=name,
        tower=tower,
        head=head,
        bases=rk.fit_bases(tower, _batches(background), kinds=("head", "mlp")),
        stream_bases=rk.fit_bases(tower, _batches(background[::3]), placement="stream"),
        train=train,
        val=val,
        test=test,
        encoding_seconds=encoding,
    )


def digits(drawings: int = DRAWINGS) -> PeerTask:
    """scikit-learn's handwritten digits in the demo's thirds; bases from drawings."""
    model, preprocess, tokenizer = rk.load_bundled()
    pictures, labels = digit_images()
    images = torch.stack([preprocess(picture) for picture in pictures])
    background = torch.stack([preprocess(image) for image in drawn_images(drawings, DRAWINGS_SEED)])
    head = rk.ZeroShotHead.from_text(model, tokenizer, DIGITS, TEMPLATES)
    return _task("digits", model, head, background, images, labels, thirds(len(labels)))


def photographs(archive: Path, drawings: int = DRAWINGS) -> PeerTask:
    """CIFAR-10's photographs: all three parts from the zip's test half,
    as the model was trained on its train half.

    That one serves the bases alone, without its labels.
    """
    reader = _bundled_clip_reader()
    model, preprocess, tokenizer = rk.load_bundled()
    config = {"preprocess_cfg": model.visual.preprocess_cfg}
    pixels, label_rows = reader.read_photos(archive, "test")
    images = reader.as_input(pixels, config)
    labels = torch.from_numpy(np.unique(label_rows[:, reader.COLUMN["what"]], return_inverse=True)[1])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    runs: tuple[list, list, list] = ([], [], [])
    for label in range(len(PHOTOS)):
        own = order[labels[order] == label]
        for run, part in zip(runs, own.split([*PHOTO_SPLIT, len(own) - sum(PHOTO_SPLIT)]), strict=False):
            run.append(part)
    seen, _ = reader.read_photos(archive, "train")
    chosen = np.random.default_rng(1).permutation(len(seen))[:BASES_PHOTOS]
    drawn = torch.stack([preprocess(image) for image in drawn_images(drawings, DRAWINGS_SEED)])
    background = torch.cat([drawn, reader.as_input(seen[chosen], config)])
    background = background[torch.randperm(len(background), generator=torch.Generator().manual_seed(0))]
    templates = [lambda name: reader.prompt("what", name, "photo")]
    head = rk.ZeroShotHead.from_text(model, tokenizer, PHOTOS, templates)
    parts = tuple(torch.cat(run) for run in runs)
    return _task("photographs", model, head, background, images, labels, parts)


def _bundled_clip_reader():
    """examples/bundled_clip/evaluate.py, which knows how the zip is laid out."""
    path = Path(__file__).resolve().parents[2] / "examples" / "bundled_clip" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("bundled_clip_evaluate", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
