"""A kept adapter on its model: what reads it, whose classes, and whether it is below the model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Subset

from residual_kernels import train
from residual_kernels.adapters.folder import AdapterFolder
from residual_kernels.adapters.methods import identity
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.cli.inputs import Reader, prepare
from residual_kernels.cli.printing import err
from residual_kernels.data import models as sources
from residual_kernels.data.classes import positions
from residual_kernels.data.images import Images
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead

CHECKED = 1000  # images, at most, that are labelled by the model alone too


def fitted(model, pretrained, device, adapter_folder: Path):
    """The model with a kept adapter, the adapter's folder, and the image transform."""
    clip, preprocess, _ = prepare(model, pretrained, device)
    return *kept(clip, adapter_folder), preprocess


@dataclass(frozen=True)
class Readers:
    """What an adapter's folder says of its classes: `head` reads the adapter, `base_head` the model alone."""

    head: ZeroShotHead
    base_head: ZeroShotHead
    class_names: tuple[str, ...]  # of the class folders


def kept(clip, adapter_folder: Path) -> tuple[TowerAdapter, Readers]:
    """An adapter from its folder, on the model's tower; ValueError for a folder without a head."""
    folder = AdapterFolder.open(adapter_folder)
    adapter = folder.adapter(sources.image_tower(clip))
    head = folder.head
    if head is None:
        raise ValueError(
            f"the adapter at {adapter_folder} was saved without a head; save it again with "
            "save_adapter(adapter, path, head=head)"
        )
    return adapter, Readers(head, folder.base_head or head, folder.class_names or head.class_names)


def aligned(
    cache: UnitCache, folders: tuple[str, ...], data: Path, names: tuple[str, ...] | None = None
) -> UnitCache:
    """The cache with its labels renumbered to the folders that the adapter was fitted to; some may be absent.

    `names` are what the adapter's head calls those folders.
    """
    if cache.labels is None:
        raise ValueError(f"{data} has no labels; name a folder of class folders, or a cache of one")
    cache.labels = torch.tensor(positions(cache.class_names, folders, data, "the adapter"))[cache.labels]
    cache.class_names = folders if names is None else names
    return cache


def warn(before: float, after: float, images: int) -> None:
    """Says so when an adapter labels fewer images right than the model without it."""
    if after < before:
        err.print(
            f"The adapter is below the model on these {images} images ({after:.4f} against {before:.4f}): "
            "they may be unlike those it was fitted on. Fit again with some of these, or leave the "
            "adapter out.",
            soft_wrap=True,
        )


def check_on_folders(
    module: TowerAdapter,
    folder: Readers,
    images: Images,
    found: train.Prediction,
    reader: Reader,
) -> None:
    """Warns where the folders of the images name their classes and the model alone labels more of them
    right."""
    named = [(row, name.split("/")[-2]) for row, name in enumerate(images.names) if "/" in name]
    known = [(row, folder.class_names.index(name)) for row, name in named if name in folder.class_names]
    if not known or len(known) < len(images):  # other folders: who knows what these mean
        return
    known = known[:: max(1, len(known) // CHECKED)][:CHECKED]
    rows, labels = (torch.tensor(one) for one in zip(*known, strict=True))
    after = float((found.labels[rows] == labels).double().mean())
    place = next(module.tower.parameters()).device
    some = reader.loader(Subset(images, rows.tolist()))
    alone = train.predict(identity(module.tower), folder.base_head, (batch.to(place) for batch in some))
    warn(float((alone.labels == labels).double().mean()), after, len(rows))
