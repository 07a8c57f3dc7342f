"""bench: how fast the operator is on this machine."""

from typing import Annotated

import typer
from rich.table import Table

from residual_kernels.cli.options import Device, DType, Json
from residual_kernels.cli.printing import out, status, write_numbers


def bench(
    shape: Annotated[str, typer.Option(help="heads of B/16, L/14, H/14 or bigG/14")] = "L/14",
    rows: Annotated[int, typer.Option(min=1, help="images at a time")] = 256,
    components: Annotated[
        str, typer.Option(help="components kept per head: ragged (energy 0.90), full (C + 2), or a number")
    ] = "ragged",
    dtype: Annotated[DType, typer.Option(help="number type of the inputs")] = DType.float32,
    rounds: Annotated[int, typer.Option(min=1, help="measurement rounds per backend")] = 7,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Time the operator on a real tower's heads by every backend that is ready,
    beside a plain matrix product."""
    import torch

    from residual_kernels.cli.inputs import device_of
    from residual_kernels.data.models import nearest
    from residual_kernels.experiments.bench import measure
    from residual_kernels.experiments.shapes import SHAPES
    from residual_kernels.units.cache import DTYPES

    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; {nearest(shape, list(SHAPES))}")
    if components not in ("ragged", "full") and not (components.isdecimal() and int(components) > 0):
        raise ValueError(f"components must be ragged, full or a number above 0; got {components!r}")
    place = device_of(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{torch.get_num_threads()} threads"
    with status("measuring"):
        found = measure(SHAPES[shape], rows, components, DTYPES[dtype.value], place, rounds)
    title = f"{shape}, {rows} images, components {components}, {dtype.value}, {place} ({name})"
    write_numbers(
        json_file, {"title": title, "torch": torch.__version__, "rows": [vars(speed) for speed in found]}
    )
    table = Table("mode", "backend", "ms", "GFLOP/s", "of a matrix product", title=title)
    for speed in found:
        table.add_row(
            speed.mode,
            speed.backend,
            f"{1e3 * speed.seconds:.2f}",
            f"{speed.flops / 1e9:.0f}",
            f"{speed.share:.0%}",
        )
    out.print(table)
