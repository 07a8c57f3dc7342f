"""eval and predict: what a kept adapter is for."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from residual_kernels.cli.image_options import reads_images
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
from residual_kernels.cli.printing import bar, out, write_numbers
from residual_kernels.data.model_names import BUNDLED

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from residual_kernels.cli.inputs import Reader
    from residual_kernels.units.cache import UnitCache


@reads_images
def eval_command(
    data: Data,
    reader: "Reader",
    run: Run = None,
    adapter: Adapter = None,
    model: Model = BUNDLED,
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
    from residual_kernels import train
    from residual_kernels.adapters.methods import identity
    from residual_kernels.cli.fitted import aligned, fitted, warn
    from residual_kernels.data.classes import Relabelled, positions
    from residual_kernels.files import write_csv

    adapter = run_folder(run, adapter)
    module, folder, preprocess = fitted(model, pretrained, device, adapter)
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
            "images": after.count,
            **reader.account(),
            "base_accuracy": before.accuracy,
            "accuracy": after.accuracy,
            "loss": after.loss,
            "base_balanced_accuracy": before.balanced_accuracy,
            "balanced_accuracy": after.balanced_accuracy,
            "class_accuracy": {
                name: float(one) if seen else None
                for name, one, seen in zip(head.class_names, after.class_accuracy, counts, strict=True)
            },
            "confusion": after.confusion.tolist(),
        },
    )
    reader.report()
    table = Table("class", "images", "without", "with", title=f"{data}")
    for index, name in enumerate(head.class_names):
        both = (before.class_accuracy[index], after.class_accuracy[index])
        table.add_row(name, str(counts[index]), *(f"{one:.3f}" if counts[index] else "-" for one in both))
    table.add_section()
    table.add_row("all", str(after.count), f"{before.accuracy:.3f}", f"{after.accuracy:.3f}")
    table.add_row("balanced", "", f"{before.balanced_accuracy:.3f}", f"{after.balanced_accuracy:.3f}")
    out.print(table)
    warn(before.accuracy, after.accuracy, after.count)


@reads_images
def predict(
    data: Annotated[
        Path, typer.Option(help="images as for `encode`; a folder may be flat or nested, labels are not read")
    ],
    out_file: Annotated[
        Path, typer.Option("--out", callback=new_file, help="the CSV to write: image, label, probability")
    ],
    reader: "Reader",
    run: Run = None,
    adapter: Adapter = None,
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Label new images: a CSV of image, label and probability."""
    import torch

    from residual_kernels import train
    from residual_kernels.cli.fitted import check_on_folders, fitted
    from residual_kernels.files import write_csv

    adapter = run_folder(run, adapter)
    module, folder, preprocess = fitted(model, pretrained, device, adapter)
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
    check_on_folders(module, folder, images, found, reader)
