"""report: what a fitted adapter learned, on one page."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from residual_kernels.cli import apart
from residual_kernels.cli.image_options import reads_images
from residual_kernels.cli.options import (
    Adapter,
    Data,
    Device,
    Json,
    Model,
    Pretrained,
    Run,
    Words,
    run_folder,
)
from residual_kernels.cli.outputs import new_file
from residual_kernels.cli.printing import STDOUT, out, status, write_numbers
from residual_kernels.data.model_names import BUNDLED

if TYPE_CHECKING:
    from residual_kernels.cli.inputs import Reader


@reads_images
def report(
    data: Data,
    reader: "Reader",
    run: Run = None,
    adapter: Adapter = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="if --data is a cache of `encode`: the images that it was made from, to show on the page"
        ),
    ] = None,
    dictionary: Words = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", callback=new_file, help="the page to write; RUN/report.html by default"),
    ] = None,
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """One HTML page of what an adapter learned, with its figures (PNG, SVG) and tables
    (CSV) in a folder beside it."""
    from residual_kernels.analysis import TextDictionary
    from residual_kernels.cli.fitted import aligned, kept
    from residual_kernels.cli.inputs import prepare
    from residual_kernels.data.images import Images
    from residual_kernels.report import gather, write_report
    from residual_kernels.report.facts import Source
    from residual_kernels.report.page import check_page

    run = run_folder(run, adapter)
    page = out_file or run / "report.html"
    check_page(page)
    outputs = [
        apart.Output("--out", page),
        apart.Output("the folder beside --out", page.with_suffix(""), apart.PICTURES),
    ]
    if json_file is not None and os.fspath(json_file) != STDOUT:
        outputs.append(apart.Output("--json", json_file))
    apart.check(outputs, {"RUN": run, "--data": data, "--images": images, "--words": dictionary})
    clip, preprocess, tokenizer = prepare(model, pretrained, device)
    module, folder = kept(clip, run)
    head, folders = folder.head, folder.class_names
    words = None
    if tokenizer is None and dictionary is not None:
        raise ValueError(f"{model} embeds no text, so --words cannot be encoded; leave it out")
    if tokenizer is not None:
        if dictionary is None:
            words = TextDictionary.bundled(clip, tokenizer)
        else:
            words = TextDictionary.from_file(clip, tokenizer, dictionary)
    kinds = tuple(dict.fromkeys(("head", *module.adapted)))
    source = reader.open(data, preprocess)
    pictures = source if isinstance(source, Images) else None
    if images is not None:
        if pictures is not None:
            raise ValueError(f"--images is for a cache, but {data} holds its images itself")
        pictures = reader.images_of(data, images, preprocess)
    cache = reader.cached(module.tower, source, kinds, "encoding")
    cache = aligned(cache, folders, data, head.class_names)
    if pictures is not None and int(cache.ids.max()) >= len(pictures):
        raise ValueError(
            f"{images} holds {len(pictures)} images, but the cache at {data} was made of "
            f"{int(cache.ids.max()) + 1}"
        )
    with status("reading") as say:
        facts = gather(
            module,
            head,
            cache,
            Source(model, str(data), str(run)),
            dictionary=words,
            base_head=folder.base_head,
            say=say,
        )
        say("drawing")
        page, files = write_report(facts, page, cache, pictures)
    size = page.stat().st_size / 1e6
    write_numbers(
        json_file,
        {
            "images": facts.images,
            "base_accuracy": facts.before.accuracy,
            "accuracy": facts.after.accuracy,
            "page": str(page),
            "files": [str(path) for path in files],
            **reader.account(),
        },
    )
    reader.report()
    out.print(
        f"accuracy {facts.before.accuracy:.4f} -> {facts.after.accuracy:.4f} on {facts.images} images; "
        f"{page} ({size:.1f} MB) and {len(files)} figures and tables in {page.with_suffix('')}"
    )
