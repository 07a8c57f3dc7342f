"""eval and predict: what a kept adapter is for."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from residual_kernels import train
from residual_kernels.adapters.folder import AdapterFolder
from residual_kernels.adapters.methods import identity
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.cli.inputs import Reader, prepare, reads_images
from residual_kernels.cli.options import (
    Adapter,
    Data,
    Device,
    Json,
    Model,
    Pretrained,
    Run,
    run_folder,
)
from residual_kernels.cli.outputs import new_file
from residual_kernels.cli.printing import bar, err, out, write_numbers
from residual_kernels.data import models as sources
from residual_kernels.data.classes import Relabelled, positions
from residual_kernels.data.images import Images
from residual_kernels.files import write_csv
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead

CHECKED = 1000  # images, at most, that are labelled by the model alone too


def _fitted(model, pretrained, device, adapter_folder: Path):
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


@reads_images
def eval_command(
    data: Data,
    reader: Reader,
    run: Run = None,
    adapter: Adapter = None,
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    device: Device = None,
    confusion: Annotated[
        Path | None,
        typer.Option(
            callback=new_file, help="also write the confusion matrix to this CSV: a row for each true class"
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Accuracy of an adapter, and of the model without it, on a labelled folder of images."""
    adapter = run_folder(run, adapter)
    module, folder, preprocess = _fitted(model, pretrained, device, adapter)
    head, folders = folder.head, folder.class_names
    source = reader.open(data, preprocess)
    if module.placement == "stream":
        images = reader.only_images(source, data)
        numbers = positions(images.class_names, folders, data, "the adapter")
        read: UnitCache | DataLoader = reader.loader(Relabelled(images, numbers))
    else:
        kinds = module.adapted
        cache = reader.cached(module.tower, source, kinds, "encoding")
        read = aligned(cache, folders, data, head.class_names)
    before = train.evaluate(identity(module.tower), folder.base_head, read)
    after = train.evaluate(module, head, read)
    counts = after.confusion.sum(1).tolist()
    if confusion is not None:
        counted = zip(head.class_names, after.confusion.tolist(), strict=True)
        write_csv(confusion, [["true class", *head.class_names], *([name, *row] for name, row in counted)])
    write_numbers(
        json_file,
        {
            "images": after.count, **reader.account(),
            "base_accuracy": before.accuracy, "accuracy": after.accuracy, "loss": after.loss,
            "base_balanced_accuracy": before.balanced_accuracy, "balanced_accuracy": after.balanced_accuracy,
            "class_accuracy": {
                name: float(one) if seen else None
                for name, one, seen in zip(head.class_names, after.class_accuracy, counts, strict=True)
            },
            "confusion": after.confusion.tolist(),
        },
    )  # fmt: skip
    reader.report()
    table = Table("class", "images", "without", "with", title=f"{data}")
    for index, name in enumerate(head.class_names):
        both = (before.class_accuracy[index], after.class_accuracy[index])
        table.add_row(name, str(counts[index]), *(f"{one:.3f}" if counts[index] else "-" for one in both))
    table.add_section()
    table.add_row("all", str(after.count), f"{before.accuracy:.3f}", f"{after.accuracy:.3f}")
    table.add_row("balanced", "", f"{before.balanced_accuracy:.3f}", f"{after.balanced_accuracy:.3f}")
    out.print(table)
    _warn(before.accuracy, after.accuracy, after.count)


def _warn(before: float, after: float, images: int) -> None:
    """Says so when an adapter labels fewer images right than the model without it."""
    if after < before:
        err.print(
            f"The adapter is below the model on these {images} images ({after:.4f} against {before:.4f}): they may be "
            "unlike those it was fitted on. Fit again with some of these, or leave the adapter out.",
            soft_wrap=True,
        )


def _check_on_folders(
    module: TowerAdapter,
    folder: Readers,
    images: Images,
    found: train.Prediction,
    reader: Reader,
) -> None:
    """Warns where the folders of the images name their classes and the model alone labels more of them right."""
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
    _warn(float((alone.labels == labels).double().mean()), after, len(rows))


@reads_images
def predict(
    data: Annotated[
        Path, typer.Option(help="images as for `encode`; a folder may be flat or nested, labels are not read")
    ],
    out_file: Annotated[
        Path, typer.Option("--out", callback=new_file, help="the CSV to write: image, label, probability")
    ],
    reader: Reader,
    run: Run = None,
    adapter: Adapter = None,
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Label new images: a CSV of image, label and probability."""
    adapter = run_folder(run, adapter)
    module, folder, preprocess = _fitted(model, pretrained, device, adapter)
    head = folder.head
    images = reader.images(data, preprocess, labelled=False)
    with bar("reading", len(images)) as step:
        loader = reader.loader(images)
        place = next(module.tower.parameters()).device

        def batches():
            for batch in loader:
                yield batch.to(place)
                step(len(batch))

        found = train.predict(module, head, batches())
    rows = zip(images.names, found.labels.tolist(), found.probabilities, strict=True)
    labelled = ([name, found.class_names[label], f"{row[label]:.6f}"] for name, label, row in rows)
    write_csv(out_file, itertools.chain([["image", "label", "probability"]], labelled))
    counts = torch.bincount(found.labels, minlength=len(head.class_names)).tolist()
    common = ", ".join(
        f"{n} {name}" for n, name in sorted(zip(counts, head.class_names, strict=True), reverse=True)[:5]
    )
    write_numbers(
        json_file,
        {
            "images": len(images),
            "counts": dict(zip(head.class_names, counts, strict=True)),
            **reader.account(),
        },
    )
    reader.report()
    out.print(f"{len(images)} images labelled ({common}); written to {out_file}")
    _check_on_folders(module, folder, images, found, reader)
