"""sweep: every method on every data set and tower of a plan, as one table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from residual_kernels.cli.inputs import device_of
from residual_kernels.cli.options import DataRoot, Device, Download, Json, Workers
from residual_kernels.cli.printing import err, out, write_numbers
from residual_kernels.experiments.sweep import Sweep, SweepPlan, SweepTable


def sweep(
    plan: Annotated[Path, typer.Argument(help="YAML file with towers, data and methods; README shows one")],
    out_folder: Annotated[
        Path,
        typer.Option("--out", help="folder for caches, results and the table; a stopped sweep goes on there"),
    ],
    workers: Workers = 0,
    device: Device = None,
    data_root: DataRoot = None,
    download: Download = False,
    json_file: Json = None,
) -> None:
    """Fit every method on every data set with every tower, and lay the accuracies out as the paper's main table."""
    chosen = SweepPlan.read(plan)
    with err.status("starting") as status:
        rows = Sweep(
            chosen, out_folder, say=status.update, workers=workers, device=device_of(device),
            root=data_root, download=download,
        ).run()  # fmt: skip
    table = SweepTable.of(rows)
    paths = table.write(out_folder)
    out.print(Markdown(table.markdown()))
    for path in paths:
        out.print(f"  {path}")
    write_numbers(json_file, {"rows": rows})
