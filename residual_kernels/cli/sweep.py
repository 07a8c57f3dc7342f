"""sweep: every method on every data set and tower of a plan, as one table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from residual_kernels.cli.apart import SWEEP_FILES
from residual_kernels.cli.inputs import device_of
from residual_kernels.cli.options import DataRoot, Device, Download, Json, Workers
from residual_kernels.cli.outputs import folder_of
from residual_kernels.cli.printing import out, status, write_numbers
from residual_kernels.experiments.sweep import Sweep, SweepPlan, SweepTable


def sweep(
    plan: Annotated[
        Path, typer.Argument(help="YAML file with towers, data and methods; docs/COMMANDS.md shows one")
    ],
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out",
            callback=folder_of(*SWEEP_FILES),
            help="folder for caches, results and the table; a stopped sweep resumes there",
        ),
    ],
    workers: Workers = 0,
    device: Device = None,
    data_root: DataRoot = None,
    download: Download = False,
    json_file: Json = None,
) -> None:
    """Fit every method on every data set with every tower, and lay the accuracies out as the paper's main table."""
    chosen = SweepPlan.read(plan)
    with status("starting") as say:
        work = Sweep(
            chosen, out_folder, say=say, workers=workers, device=device_of(device),
            root=data_root, download=download,
        )  # fmt: skip
        rows = work.run()
    table = SweepTable.of(rows)
    paths = table.write(out_folder)
    write_numbers(json_file, {"rows": rows, "reading": [one.to_dict() for one in work.accounts]})
    for one in work.accounts:
        out.print(one.summary(), soft_wrap=True)
    out.print(Markdown(table.markdown()))
    for path in paths:
        out.print(f"  {path}")
