"""encode and bases: the passes of the tower over data."""

import time
from pathlib import Path
from typing import Annotated

import typer

from residual_kernels import distributed, sources
from residual_kernels.cache import DTYPES, encode, kept_images
from residual_kernels.cli.inputs import loader_of, prepare
from residual_kernels.cli.options import Batch, Data, Device, DType, Json, Kind, Model, Pretrained, Workers
from residual_kernels.cli.printing import bar, err, out, write_numbers
from residual_kernels.images import open_images
from residual_kernels.pca import fit_bases


def encode_command(
    data: Data,
    out_folder: Annotated[
        Path,
        typer.Option("--out", help="folder for the cache; one that an interrupted run left is gone on with"),
    ],
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    kinds: Annotated[
        list[Kind] | None, typer.Option(help="units to keep; repeat the option for several")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="of the stored units")] = DType.float32,
    shard_images: Annotated[
        int | None,
        typer.Option(min=1, help="images in a file of the cache; as many as make 64 MiB by default"),
    ] = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Run the tower over a folder of images once and keep its units.

    The same command goes on where an interrupted one stopped. Under torchrun its processes share the work.
    """
    distributed.initialise()
    clip, preprocess, _ = prepare(model, pretrained, device)
    images = open_images(data, preprocess)
    chosen = tuple(kind.value for kind in kinds or [Kind.head])
    kept = kept_images(out_folder)
    first = distributed.rank() == 0
    if kept and first:
        err.print(f"{out_folder} holds about {kept} images of an interrupted run; going on from there")
    start = time.perf_counter()
    with bar("encoding", len(images) // distributed.world(), quiet=not first) as step:
        cache = encode(
            sources.image_tower(clip), loader_of(images, batch_size, workers), out_folder, chosen, DTYPES[dtype.value],
            class_names=images.class_names, progress=step, shard_images=shard_images,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    if first:
        size = sum(p.stat().st_size for p in out_folder.iterdir())
        out.print(
            f"{len(cache)} images of {len(images.class_names)} classes in {seconds:.1f} s "
            f"({len(cache) / seconds:.0f} a second), {size / 1e6:.1f} MB in {out_folder}"
        )
        write_numbers(json_file, {"images": len(cache), "seconds": seconds, "bytes": size})
    distributed.finish()


def bases(
    data: Data,
    out_file: Annotated[Path, typer.Option("--out", help="the bases file to write (.safetensors)")],
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    kinds: Annotated[list[Kind] | None, typer.Option(help="units; repeat the option for several")] = None,
    moments: Annotated[bool, typer.Option(help="keep the moments too, so that files can be merged")] = False,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Fit the principal components of every unit on a folder of images (labels are not used)."""
    clip, preprocess, _ = prepare(model, pretrained, device)
    images = open_images(data, preprocess, labelled=False)
    chosen = tuple(kind.value for kind in kinds or [Kind.head])
    start = time.perf_counter()
    with bar("fitting bases", len(images)) as step:
        fitted = fit_bases(
            sources.image_tower(clip), loader_of(images, batch_size, workers), chosen, progress=step
        )
    fitted.save(out_file, moments=moments)
    seconds = time.perf_counter() - start
    kept = fitted.truncate(energy=0.90)
    total = {kind: len(fitted.parts[kind].components) for kind in fitted.kinds}
    used = {kind: len(kept.parts[kind].components) for kind in fitted.kinds}
    text = ", ".join(f"{kind}: {total[kind]:,} ({used[kind]:,} hold 90 % of the variance)" for kind in total)
    out.print(f"components of {fitted.count} images in {seconds:.1f} s: {text}; written to {out_file}")
    write_numbers(
        json_file, {"images": fitted.count, "seconds": seconds, "components": total, "energy_0.90": used}
    )
