"""encode and bases: the passes of the tower over data."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from residual_kernels.cli.apart import CACHE_FILES
from residual_kernels.cli.image_options import reads_images
from residual_kernels.cli.options import (
    Device,
    DType,
    Identified,
    Identity,
    Json,
    Kind,
    Model,
    Placement,
    Pretrained,
    Source,
    Tokens,
)
from residual_kernels.cli.outputs import folder_of, new_file
from residual_kernels.cli.printing import bar, err, out, write_numbers
from residual_kernels.data.model_names import BUNDLED

if TYPE_CHECKING:
    from residual_kernels.bases.spectral_bases import SpectralBases
    from residual_kernels.cli.inputs import Reader


@reads_images
def encode_command(
    data: Source,
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out",
            callback=folder_of(*CACHE_FILES),
            help="folder for the cache; an interrupted run resumes there",
        ),
    ],
    reader: "Reader",
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    kinds: Annotated[
        list[Kind] | None,
        typer.Option(help="kind of units to keep, head by default; repeat the option for several"),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="number type of the stored units")] = DType.float32,
    shard_images: Annotated[
        int | None,
        typer.Option(min=1, help="images per file of the cache; by default, as many as fit in 64 MiB"),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=1, help="under torchrun: seconds to wait for the slowest process; 1800 by default"),
    ] = None,
    identity: Identified = Identity.auto,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Run the tower over a folder of images once and keep its units.

    If the command is interrupted, run it again to resume. Under torchrun the processes share the work. Images
    that are not in class folders are encoded without labels.
    """
    from residual_kernels import distributed
    from residual_kernels.cli.inputs import prepare
    from residual_kernels.data import models as sources
    from residual_kernels.units.cache import DTYPES, encode, kept_images

    distributed.initialise()
    reader.identity = identity
    clip, preprocess, _ = prepare(model, pretrained, device)
    images = reader.images(data, preprocess, labelled=None)
    chosen = tuple(kind.value for kind in kinds or [Kind.head])
    kept = kept_images(out_folder)
    first = distributed.rank() == 0
    if kept and first:
        err.print(f"{out_folder} holds about {kept} images of an interrupted run; going on from there")
    start, seen = time.perf_counter(), 0

    def count(done: int) -> None:
        nonlocal seen
        seen += done
        step(done)

    with bar("encoding", len(images) // distributed.world(), quiet=not first) as step:
        cache = encode(
            sources.image_tower(clip),
            reader.loader(images),
            out_folder,
            chosen,
            DTYPES[dtype.value],
            class_names=images.class_names,
            progress=count,
            shard_images=shard_images,
            timeout=timeout or distributed.TIMEOUT,
        )
    seconds = time.perf_counter() - start
    if first:
        size = sum(p.stat().st_size for p in out_folder.iterdir())
        classes = "no classes" if images.class_names is None else f"{len(images.class_names)} classes"
        write_numbers(
            json_file,
            {"images": len(cache), "new": seen > 0, "seconds": seconds, "bytes": size, **reader.account()},
        )
        reader.report()
        if seen:
            out.print(
                f"{len(cache)} images of {classes} in {seconds:.1f} s ({len(cache) / seconds:.0f} a second), "
                f"{size / 1e6:.1f} MB in {out_folder}"
            )
        else:
            out.print(f"nothing new: {len(cache)} images of {classes} already there, in {out_folder}")
    distributed.finish()


@reads_images
def bases(
    files: Annotated[
        list[Path] | None, typer.Argument(help="with --merge: files of `bases --moments`")
    ] = None,
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="images (as for `encode`), or a cache; repeat the option for several"),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="merge files that were fitted separately")] = False,
    out_file: Annotated[
        Path, typer.Option("--out", callback=new_file, help="the bases file to write (.safetensors)")
    ],
    reader: "Reader",
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    kinds: Annotated[
        list[Kind] | None, typer.Option(help="kind of units, head by default; repeat the option for several")
    ] = None,
    moments: Annotated[bool, typer.Option(help="keep the moments too, so that files can be merged")] = False,
    placement: Annotated[
        Placement,
        typer.Option(
            help="where weights will act: on the output, or inside the tower on the residual stream"
        ),
    ] = Placement.output,
    tokens: Annotated[
        Tokens | None, typer.Option(help="with --placement stream: the tokens to use; by default all")
    ] = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Fit the principal components of every unit on images (labels are not used),
    or merge files fitted apart.

    Under torchrun its processes share the images.
    """
    from residual_kernels import distributed
    from residual_kernels.bases.pca import fit_bases
    from residual_kernels.bases.spectral_bases import SpectralBases
    from residual_kernels.cli.inputs import prepare
    from residual_kernels.data import models as sources

    data, files = data or [], files or []
    if merge == bool(data) or merge != bool(files):
        raise typer.BadParameter("give --data, or --merge and the files to merge")
    distributed.initialise()
    first = distributed.rank() == 0
    start = time.perf_counter()
    if merge:
        fitted = functools.reduce(SpectralBases.merge, [SpectralBases.load(file) for file in files])
    else:
        clip, preprocess, _ = prepare(model, pretrained, device)
        tower = sources.image_tower(clip)
        chosen = tuple(kind.value for kind in kinds or [Kind.head])
        by_source = []
        for source in data:
            images = reader.open(source, preprocess, labelled=False)
            count = len(images)
            title = "fitting bases" if len(data) == 1 else f"fitting bases on {source}"
            with bar(title, count // distributed.world(), quiet=not first) as step:
                by_source.append(
                    fit_bases(
                        tower,
                        reader.share(images),
                        chosen,
                        placement=placement.value,
                        tokens=tokens and tokens.value,
                        progress=step,
                    )
                )
        fitted = functools.reduce(SpectralBases.merge, by_source)
    if first:
        fitted.save(out_file, moments=moments)
        _report(fitted, time.perf_counter() - start, out_file, json_file, reader)
    distributed.finish()


def _report(
    fitted: "SpectralBases", seconds: float, out_file: Path, json_file: Path | None, reader: "Reader"
) -> None:
    kept = fitted.truncate(energy=0.90)
    total = {kind: len(fitted.parts[kind].components) for kind in fitted.kinds}
    used = {kind: len(kept.parts[kind].components) for kind in fitted.kinds}
    text = ", ".join(f"{kind}: {total[kind]:,} ({used[kind]:,} hold 90 % of the variance)" for kind in total)
    rows = "images" if fitted.tokens is None else "tokens"
    write_numbers(
        json_file,
        {
            rows: fitted.count,
            "seconds": seconds,
            "components": total,
            "energy_0.90": used,
            **reader.account(),
        },
    )
    reader.report()
    out.print(f"components of {fitted.count} {rows} in {seconds:.1f} s: {text}; written to {out_file}")
