"""analyze: what a tower's heads know of a data set, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from residual_kernels.cli.apart import ANALYSIS_FILES
from residual_kernels.cli.image_options import reads_images
from residual_kernels.cli.options import (
    ClassNames,
    Device,
    Json,
    Kind,
    Model,
    Pretrained,
    Templates,
    Words,
)
from residual_kernels.cli.outputs import folder_of
from residual_kernels.cli.printing import out, status, write_numbers
from residual_kernels.data.model_names import BUNDLED

if TYPE_CHECKING:
    from residual_kernels.analysis import Analysis
    from residual_kernels.cli.inputs import Reader

SHOWN = 10  # units in the printed table
FEWEST = 3  # images; the TwoNN dimension asks each for two neighbours


@reads_images
def analyze_command(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "--cache",
            help="images (as for `encode`), or a cache of `encode`; labels give accuracies",
        ),
    ],
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", callback=folder_of(*ANALYSIS_FILES), help="folder for analysis.json and the CSV tables"
        ),
    ],
    reader: "Reader",
    bases_file: Annotated[
        Path | None, typer.Option("--bases", help="file of `bases`; fitted on --data by default")
    ] = None,
    words_file: Words = None,
    kind: Annotated[Kind, typer.Option(help="the units to look at")] = Kind.head,
    points: Annotated[int, typer.Option(min=3, help="most images used for the TwoNN dimension")] = 10_000,
    seeds: Annotated[int, typer.Option(min=0, help="number of random selections to compare with")] = 10,
    prototypes: Annotated[bool, typer.Option(help="class vectors from these images instead of text")] = False,
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    class_names: ClassNames = None,
    templates: Templates = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Dimensions, similarity, scores, selection curves and words of a tower's heads on a folder of images."""
    from residual_kernels.analysis import TextDictionary, analyze
    from residual_kernels.analysis.findings import FILE
    from residual_kernels.bases.spectral_bases import SpectralBases
    from residual_kernels.cli.inputs import prepare
    from residual_kernels.data import models as sources
    from residual_kernels.data import prompts
    from residual_kernels.zeroshot import ZeroShotHead

    if (out_folder / FILE).exists() or (out_folder.exists() and not out_folder.is_dir()):
        raise FileExistsError(f"{out_folder} holds an analysis already or is a file; name a new folder")
    bases = None if bases_file is None else SpectralBases.load(bases_file)
    clip, preprocess, tokenizer = prepare(model, pretrained, device)
    tower = sources.image_tower(clip)
    source = reader.open(data, preprocess, labelled=None)
    if len(source) < FEWEST:
        raise ValueError(f"{data} has {len(source)} images to analyse, and {FEWEST} are needed")
    names = texts = None
    if source.class_names is None:
        given = {"--class-names": class_names, "--templates": templates, "--prototypes": prototypes or None}
        for option, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{option} is for labelled images, and {data} has no class folders; leave it out"
                )
    else:
        names = reader.class_names(class_names, source.class_names, text=not prototypes)
        texts = prompts.for_head(templates, model, prototypes)
    dictionary = None
    if words_file is not None:
        dictionary = TextDictionary.from_file(clip, tokenizer, words_file)
    elif model == BUNDLED:
        dictionary = TextDictionary.bundled(clip, tokenizer)
    cache = reader.cached(tower, source, (kind.value,), "encoding")
    head = None
    if names is not None and cache.labels is not None:
        cache.class_names = names
        if texts is None:
            head = ZeroShotHead.from_prototypes(cache.output, cache.labels, names)
        else:
            head = ZeroShotHead.from_text(clip, tokenizer, names, texts)
    with status("starting") as say:
        found = analyze(
            tower,
            cache,
            head,
            bases,
            dictionary,
            kind=kind.value,
            points=points,
            seeds=range(seeds),
            progress=say,
        )
    found.save(out_folder)
    write_numbers(json_file, found.to_dict() | reader.account())
    reader.report()
    out.print(_table(found))
    seconds = sum(found.seconds.values())
    out.print(
        f"{found.images} images, {len(found.units)} units of kind {kind.value} in {seconds:.1f} s; "
        f"tables written to {out_folder}"
    )
    if head is None:
        out.print("no labels with class names, so no accuracies and no selection curves")


def _table(found: "Analysis") -> Table:
    """The units that score best, by accuracy where there is one."""
    by = "pearson" if found.units[0].accuracy is None else "accuracy"
    best = sorted(found.units, key=lambda row: -getattr(row, by))[:SHOWN]
    energy = found.energies[-1]
    table = Table(
        "unit",
        f"dimensions at {energy:g}",
        "TwoNN",
        "Pearson",
        "Spearman",
        "accuracy",
        "words",
        title=f"The {len(best)} units with the highest {by}",
    )
    for row in best:
        name = f"{row.kind} {row.index}" if row.layer is None else f"layer {row.layer}"
        table.add_row(
            name if row.head is None else f"{name} head {row.head}",
            str(row.linear[-1]),
            f"{row.two_nn:.1f}",
            f"{row.pearson:.3f}",
            f"{row.spearman:.3f}",
            "" if row.accuracy is None else f"{row.accuracy:.3f}",
            "" if row.words is None else ", ".join(row.words.words[:3]),
        )
    return table
